"""Runs on one HTML page that needs nothing else: no network, no scripts, pictures inside."""

import base64
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from softmax_fused import __version__
from softmax_fused.training.errors import LabError
from softmax_fused.training.report import charts
from softmax_fused.training.report.charts import Chart, line_chart
from softmax_fused.training.report.comparison import describe_identical
from softmax_fused.training.report.records import RunRecord, read_runs
from softmax_fused.training.report.summaries import (
    LossRow,
    as_number,
    as_setting,
    as_words,
    grouped,
    loss_rows,
    overlays,
    plotted,
    series,
    summary_rows,
)
from softmax_fused.training.runs.checkpoint import write_atomically

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
    """What the page shows of a run."""

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
    environment.filters |= {"number": as_number, "setting": as_setting, "words": as_words}
    rows = [row for place, run in enumerate(runs, start=1) for row in summary_rows(run, f"run-{place}")]
    return environment.get_template("report.html").render(
        sections=[section(run, f"run-{place}") for place, run in enumerate(runs, start=1)],
        columns=list(dict.fromkeys(name for row in rows for name in row.cells)),
        rows=rows,
        overlays=overlays(runs),
        box=charts,
        version=__version__,
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
    )


def section(run: RunRecord, anchor: str) -> Section:
    """Return a run as the page shows it; pictures that it draws itself are left out."""
    drawn = [line_chart(as_words(group), lines) for group, lines in grouped(plotted(run)).items()]
    again = {"curves", "compare"} if drawn else set()
    again |= {"confusion"} if run.confusion else set()
    kept = [picture(path) for path in pictures(run.folder) if path.stem not in again]
    return Section(anchor, run, drawn, loss_rows(run), describe_identical(series(run)), kept)


def pictures(folder: Path) -> list[Path]:
    """Return the PNG files of a folder."""
    return sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))


def picture(path: Path) -> Picture:
    """Return a PNG file as a data URI.

    Raises:
        LabError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"expected a picture in {path}, got {error.strerror or error}; check the file") from error
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Picture(CAPTIONS.get(path.stem, as_words(path.stem)), source)
