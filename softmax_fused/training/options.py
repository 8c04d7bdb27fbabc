"""Options that several modules of commands share."""

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets, a torchvision root; else $SOFTMAX_FUSED_DATA, else a per-user cache."),
]
