"""TensorBoard scalars of a run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

NAMES = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "test_accuracy": "accuracy/test",
    "epoch_seconds": "time/epoch_seconds",
}


@contextmanager
def event_writer(folder: Path, epochs_done: int) -> Iterator[SummaryWriter]:
    """Opens the run's events; those of later epochs, left by a run that was cut off, are purged.

    The writer's own thread meets a full disk first and would print a traceback; the error is raised again here by the
    next flush, which is enough.
    """
    hook = threading.excepthook
    threading.excepthook = lambda thread: None if issubclass(thread.exc_type, OSError) else hook(thread)
    try:
        writer = SummaryWriter(str(folder), purge_step=epochs_done + 1 if epochs_done else None)
        try:
            yield writer
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                writer.close()
            raise
        writer.close()
    finally:
        threading.excepthook = hook


def add_epoch(writer: SummaryWriter, epoch: int, results: dict[str, float]) -> None:
    """Adds one epoch and hands it to the system."""
    for name, value in results.items():
        writer.add_scalar(NAMES[name], value, epoch)
    writer.flush()
