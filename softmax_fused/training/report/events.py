"""TensorBoard scalars of a run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softmax_fused.training.files import write_error
from softmax_fused.training.report.records import Metrics

SCALARS = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "test_accuracy": "accuracy/test",
    "test_loss": "loss/test",
    "epoch_seconds": "time/epoch_seconds",
}


class EventWriter:
    """TensorBoard's writer, whose OSErrors become `WriteError`."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with self._write_errors():
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add_epoch(self, metrics: Metrics) -> None:
        """Write the last epoch of a record."""
        with self._write_errors():
            for curve, name in SCALARS.items():
                if curve in metrics and metrics[curve][-1] is not None:
                    self.writer.add_scalar(name, metrics[curve][-1], len(metrics[curve]))
            self.writer.flush()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self.folder, error) from error


@contextmanager
def event_writer(folder: Path, metrics: Metrics) -> Iterator[EventWriter]:
    """Open the events of a run whose record so far is `metrics`.

    The last epoch is written again, because a run that was interrupted may have lost its events.

    A full disk first fails in a thread of TensorBoard's, which would print a traceback. That is suppressed: the next
    flush raises the same error here.
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
            with suppress(OSError):  # all epochs have been flushed, so that an earlier error is the one to report
                events.writer.close()
    finally:
        threading.excepthook = hook
