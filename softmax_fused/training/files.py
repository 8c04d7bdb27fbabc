"""The files of a run folder: their names, and writes that leave either the old or the new content, never half of it."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from softmax_fused.training.errors import WriteError

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.json"
COMPARISON = "compare.json"
FIGURES = ("curves.png", "predictions.png", "confusion.png", "fit.png")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it holds its old or its new content at every moment, even if the power fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON without NaN and infinity, which the format does not have."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_error(path: Path, error: OSError) -> WriteError:
    """Return the error that names the path, the system's reason, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some disk space" if full else "choose a folder that you may write to"
    return WriteError(f"expected to write {path}, got {error.strerror or error}; {advice}")


def _sync_folder(path: Path) -> None:
    """Make the renaming of a file in this folder durable, on systems that can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
