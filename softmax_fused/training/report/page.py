"""One HTML page about runs, which needs neither a network nor scripts: its figures are inside the file."""

import base64
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from softmax_fused import __version__
from softmax_fused.training.errors import LabError
from softmax_fused.training.files import write_atomically
from softmax_fused.training.report import charts
from softmax_fused.training.report.charts import Chart
from softmax_fused.training.report.records import RunRecord, read_runs
from softmax_fused.training.report.sentences import describe_identical
from softmax_fused.training.report.summaries import (
    LossRow,
    curves_by_loss,
    loss_rows,
    overlay_charts,
    run_charts,
    summary_rows,
)
from softmax_fused.training.wording import format_setting, format_value, heading

CAPTIONS = {
    "predictions": "Predictions on the test set",
    "gallery": "Predictions on the test set, drawn later",
    "curves": "Curves",
    "confusion": "Confusion matrix",
    "compare": "Comparison",
    "data": "Samples of the data set",
}


@dataclass(frozen=True)
class Picture:
    """A PNG file of a run folder, as a data URI."""

    caption: str
    source: str


@dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    anchor: str
    run: RunRecord
    charts: list[Chart]
    losses: list[LossRow]
    identical: str
    pictures: list[Picture]


def write_report(folders: list[Path], output: Path | None = None) -> Path:
    """Write the page.

    Args:
        folders: Run folders of `train` and `compare`.
        output: The file; by default report.html in the first folder.

    Returns:
        The file.

    Raises:
        LabError: if a folder holds no run, or the file cannot be written.
    """
    path = output or folders[0] / "report.html"
    write_atomically(path, render(read_runs(folders)).encode())
    return path


def render(runs: list[RunRecord]) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("softmax_fused.training.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": format_value, "setting": format_setting, "heading": heading}
    rows = [row for number, run in enumerate(runs, start=1) for row in summary_rows(run, f"run-{number}")]
    return environment.get_template("report.html").render(
        sections=[run_section(run, f"run-{number}") for number, run in enumerate(runs, start=1)],
        columns=list(dict.fromkeys(name for row in rows for name in row.cells)),
        rows=rows,
        overlays=overlay_charts(runs),
        box=charts,
        version=__version__,
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
    )


def run_section(run: RunRecord, anchor: str) -> Section:
    """Return the section of a run; figures that the page draws itself are left out of its pictures."""
    drawn = run_charts(run)
    repeated = {"curves", "compare"} if drawn else set()
    repeated |= {"confusion"} if run.confusion else set()
    files = sorted(path for path in run.folder.glob("*.png") if not path.name.startswith("."))
    pictures = [read_png(path) for path in files if path.stem not in repeated]
    return Section(anchor, run, drawn, loss_rows(run), describe_identical(curves_by_loss(run)), pictures)


def read_png(path: Path) -> Picture:
    """Return a PNG file as a data URI.

    Raises:
        LabError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"expected a picture in {path}, got {error.strerror or error}; check the file") from error
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Picture(CAPTIONS.get(path.stem, heading(path.stem)), source)
