"""``softmax-fused report``: runs on one page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders of train and compare.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", help="The HTML file; by default report.html in the first folder."),
    ] = None,
) -> None:
    """Put runs on one HTML page with everything inside: curves, tables, pictures, settings and versions."""
    from softmax_fused.training.report.page import write_report

    typer.echo(write_report(folders, output))
