"""The run folder: what a run leaves behind, never half-written.

The checkpoint holds everything, the content of metrics.json included, and is written first. A crash between the two
files leaves metrics.json one epoch behind, and resuming writes it again from the checkpoint.
"""

import errno
import glob
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from softmax_fused.training.errors import CommonError, LabError, WriteError
from softmax_fused.training.runs.lock import claimed
from softmax_fused.training.signals import signals_held

FORMAT = 1
CHECKPOINT = "checkpoint.pt"
PARTS = ("config", "metrics", "model", "optimizer", "scaler", "generators")
ZIP = b"PK\x03\x04"  # how torch's files begin
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


def checkpoint_file(path: Path) -> Path:
    """Return the checkpoint that `path` is, or that of the run folder that it is."""
    return path / CHECKPOINT if path.is_dir() else path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code in it.

    Args:
        path: The file, or the folder of a run.

    Returns:
        Its content, with tensors on the CPU; a dictionary for each of `PARTS`, whose contents are not checked.

    Raises:
        LabError: if the file cannot be read, is damaged, or is no checkpoint of this package.
    """
    path = checkpoint_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"expected a checkpoint in {path}, got {error.strerror or error}; check the path") from error
    content = _unpickled(path, data)
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


def _unpickled(path: Path, data: bytes) -> Any:
    """Return what was saved; the checksums in the archive are checked too, which torch does not do."""
    if not data.startswith(ZIP):
        raise _another_file(path) if data else damaged(path, "an empty file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile fails in many ways on damaged archives
        raise damaged(path, "its end is missing" if isinstance(error, zipfile.BadZipFile) else str(error)) from error
    if wrong:
        raise damaged(path, f"the checksum of {wrong} is wrong")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # as does the restricted unpickler, on files that hold more than tensors
        raise _another_file(path) from error


def _another_file(path: Path) -> LabError:
    return LabError(f"expected a checkpoint of softmax-fused in {path}, got another file; name a run's {CHECKPOINT}")


def damaged(path: Path, what: str) -> CommonError:
    """Return what to tell somebody whose checkpoint is not as it was written."""
    return CommonError(f"expected a checkpoint in {path}, got a damaged one ({what}); train again, or use a copy of it")


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
