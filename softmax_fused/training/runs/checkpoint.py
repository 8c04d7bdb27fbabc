"""Checkpoints: written whole, and read without running any code in them.

A checkpoint holds everything about a run, the content of metrics.json included, and is written first. A crash between
the two files leaves metrics.json one epoch behind; resuming the run writes it again from the checkpoint.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from softmax_fused.training.errors import AllRanksError, LabError
from softmax_fused.training.files import CHECKPOINT, METRICS, write_atomically, write_json
from softmax_fused.training.signals import signals_delayed

FORMAT = 1
PARTS = ("config", "metrics", "model", "optimizer", "scaler", "generators")
ZIP = b"PK\x03\x04"  # the first bytes of every file that torch.save writes

Checkpoint = dict[str, Any]


def save_run(folder: Path, checkpoint: Checkpoint) -> None:
    """Write checkpoint.pt and metrics.json; Ctrl-C and SIGTERM take effect after both."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    with signals_delayed():
        write_atomically(folder / CHECKPOINT, buffer.getvalue())
        write_json(folder / METRICS, checkpoint["metrics"])


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint in `path` if that is a run folder, else `path`."""
    return path / CHECKPOINT if path.is_dir() else path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code in it.

    Args:
        path: The file, or the folder of a run.

    Returns:
        Its content, with tensors on the CPU. There is a dictionary for each of `PARTS`; their contents are unchecked.

    Raises:
        LabError: if the file cannot be read, is damaged, or is no checkpoint of this package.
    """
    path = checkpoint_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"expected a checkpoint in {path}, got {error.strerror or error}; check the path") from error
    content = _unpickle(path, data)
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int) or found < FORMAT:
        raise _another_file(path)
    if found > FORMAT:
        raise LabError(
            f"expected a checkpoint of format {FORMAT} in {path}, got format {found}, of a newer softmax-fused; "
            "upgrade softmax-fused, or train again"
        )
    for part in PARTS:
        if not isinstance(content.get(part), dict):
            raise damaged(path, f"no {part}")
    return content  # type: ignore[no-any-return]


def _unpickle(path: Path, data: bytes) -> Any:
    """Return what was saved, after verifying the archive's checksums, which torch.load does not do."""
    if not data.startswith(ZIP):
        raise _another_file(path) if data else damaged(path, "an empty file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile raises many exceptions on damaged archives
        raise damaged(path, "its end is missing" if isinstance(error, zipfile.BadZipFile) else str(error)) from error
    if wrong:
        raise damaged(path, f"the checksum of {wrong} is wrong")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many exceptions on files that hold more than tensors
        raise _another_file(path) from error


def _another_file(path: Path) -> LabError:
    return LabError(f"expected a checkpoint of softmax-fused in {path}, got another file; name a run's {CHECKPOINT}")


def damaged(path: Path, what: str) -> AllRanksError:
    """Return the error for a checkpoint that differs from what was written."""
    return AllRanksError(
        f"expected a checkpoint in {path}, got a damaged one ({what}); train again, or use a copy of it"
    )
