"""TensorBoard scalars of a run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from softmax_fused.training.runs.checkpoint import write_error
from softmax_fused.training.runs.record import Metrics

NAMES = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "test_accuracy": "accuracy/test",
    "test_loss": "loss/test",
    "epoch_seconds": "time/epoch_seconds",
}


class EventWriter:
    """TensorBoard's writer, with its errors turned into ours."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self.folder = folder
        with self._explained():
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add_epoch(self, metrics: Metrics) -> None:
        """Add the last epoch of a record and hand it to the system."""
        with self._explained():
            for curve, name in NAMES.items():
                if curve in metrics and metrics[curve][-1] is not None:
                    self.writer.add_scalar(name, metrics[curve][-1], len(metrics[curve]))
            self.writer.flush()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self.folder, error) from error


@contextmanager
def event_writer(folder: Path, metrics: Metrics) -> Iterator[EventWriter]:
    """Open the events of a run that stands where `metrics` does.

    The last epoch is written again: a run that was cut off may have lost it. The writer's own thread meets a full disk
    first and would print a traceback; the next flush raises the same error here, which is enough.
    """
    epochs = len(metrics["train_loss"])
    hook = threading.excepthook
    threading.excepthook = lambda thread: None if issubclass(thread.exc_type, OSError) else hook(thread)
    try:
        events = EventWriter(folder, purge_step=epochs or None)
        try:
            if epochs:
                events.add_epoch(metrics)
            yield events
        finally:
            with suppress(OSError):  # every epoch was flushed; an earlier error is the one to report
                events.writer.close()
    finally:
        threading.excepthook = hook
