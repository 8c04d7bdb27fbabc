"""Run folders: made under a free name or found again, and locked while a process writes into them."""

import glob
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path

from softmax_fused.training.errors import LabError
from softmax_fused.training.files import CHECKPOINT, COMPARISON, FIGURES, METRICS, write_error
from softmax_fused.training.runs.checkpoint import load_checkpoint
from softmax_fused.training.runs.lock import locked

RUNS = Path("runs")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make the folder of a new run and lock it inside the block.

    Raises:
        LabError: if it holds a run already, another process writes into it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with locked_folder(path):
        found = [name for name in (CHECKPOINT, COMPARISON, METRICS) if (path / name).exists()]
        if found:
            resume = f"continue that run with --resume {path}, or " if CHECKPOINT in found else ""
            raise LabError(
                f"expected --output to be a new folder, got {path} with {found[0]}; {resume}choose another folder"
            )
        yield path


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Lock the folder of a run inside the block, so that no other process resumes it meanwhile.

    Raises:
        LabError: if another process writes into it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise write_error(path, error) from error
        yield


def default_folder(label: str) -> Path:
    """Make and return ``runs/<date-time>-<label>``, numbered where another run has that name already."""
    name = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{label}"
    for number in count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another process may have made it a moment ago
            continue
        except OSError as error:
            raise write_error(folder, error) from error
        break
    return folder


def find_job_folder(output: Path | None, label: str, job: str | None) -> Path | None:
    """Return the run folder of a torchrun job, which it has if torchrun has restarted its ranks; else None.

    Args:
        output: The folder asked for; by default one under ``runs`` whose name ends with `label`.
        label: As of `default_folder`, with the job in it.
        job: As of `Ranks`.
    """
    if job is None:
        return None
    folders = [output] if output else sorted(RUNS.glob(f"*-{glob.escape(label)}"))
    return next((f for f in folders if (f / CHECKPOINT).exists() and load_checkpoint(f).get("job") == job), None)


def remove_figures(folder: Path) -> None:
    """Remove the figures of an earlier epoch, so that those in a run folder always show its last one."""
    for name in FIGURES:
        (folder / name).unlink(missing_ok=True)
