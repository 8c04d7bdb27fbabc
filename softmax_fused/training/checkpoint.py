"""The run folder: what a run leaves behind, never half-written.

The checkpoint holds everything, the content of metrics.json included, and is written first. A crash between the two
files leaves metrics.json one epoch behind, and resuming writes it again from the checkpoint.
"""

import errno
import glob
import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from softmax_fused.training.claim import claimed
from softmax_fused.training.errors import LabError, WriteError
from softmax_fused.training.signals import signals_held

FORMAT = 1
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.json"
COMPARISON = "compare.json"
FIGURES = ("curves.png", "predictions.png", "confusion.png", "fit.png")

Checkpoint = dict[str, Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it has its old or its new content at every moment, a power cut included."""
    side = path.with_name(f".{path.name}.tmp")
    try:
        with side.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        side.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        side.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make the folder of a new run and claim it until the run ends.

    Raises:
        LabError: if it holds a run already, another process trains in it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with claimed_folder(path):
        held = [name for name in (CHECKPOINT, COMPARISON, METRICS) if (path / name).exists()]
        if held:
            go_on = f"continue that run with --resume {path}, or " if CHECKPOINT in held else ""
            raise LabError(
                f"expected --output to be a new folder, got {path} with {held[0]}; {go_on}choose another folder"
            )
        yield path


@contextmanager
def claimed_folder(path: Path) -> Iterator[None]:
    """Claim the folder of a run, so that no other process goes on with it meanwhile.

    Raises:
        LabError: if another process trains in it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(path))
        except OSError as error:
            raise write_error(path, error) from error
        yield


def begun_folder(output: Path | None, label: str, job: str | None) -> Path | None:
    """Return the run folder that torchrun's job has begun already, if it has: its ranks were started again.

    Args:
        output: The folder asked for; by default one under ``runs`` whose name ends with `label`.
        label: As of `default_folder`, with the job in it.
        job: As of `Ranks`.
    """
    if job is None:
        return None
    folders = [output] if output else sorted(Path("runs").glob(f"*-{glob.escape(label)}"))
    return next((f for f in folders if (f / CHECKPOINT).exists() and load_checkpoint(f).get("job") == job), None)


def save_run(folder: Path, checkpoint: Checkpoint) -> None:
    """Write checkpoint.pt and metrics.json; Ctrl-C and SIGTERM wait until both are there."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    with signals_held():
        write_atomically(folder / CHECKPOINT, buffer.getvalue())
        write_json(folder / METRICS, checkpoint["metrics"])


def write_json(path: Path, content: Any) -> None:
    """Write JSON that any parser reads: no NaN."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def remove_figures(folder: Path) -> None:
    """Remove pictures of an earlier state, so that those in a run folder always show its last epoch."""
    for name in FIGURES:
        (folder / name).unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code in it.

    Args:
        path: The file, or the folder of a run.

    Returns:
        Its content, with tensors on the CPU.

    Raises:
        LabError: if the file cannot be read or is no checkpoint of this package.
    """
    path = path / CHECKPOINT if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LabError(f"expected a checkpoint in {path}, got {error.strerror or error}; check the path") from error
    except Exception as error:  # the restricted unpickler fails in many ways on other files
        raise LabError(f"expected a checkpoint in {path}, got another or a damaged file; train again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LabError(f"expected a checkpoint of softmax-fused (format {FORMAT}) in {path}, got another; train again")
    return content


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_error(path: Path, error: OSError) -> WriteError:
    """Return what to tell somebody whose disk, or permissions, refused `path`."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some disk space" if full else "choose a folder that you may write to"
    return WriteError(f"expected to write {path}, got {error.strerror or error}; {advice}")
