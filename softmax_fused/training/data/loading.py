"""How fast a data set is read: image by image through a DataLoader, as textbooks do it, and from memory, as we do."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softmax_fused.training.data.batches import Batch, MemoryBatches, leave_signals_to_the_parent
from softmax_fused.training.data.datasets import Split
from softmax_fused.training.errors import Stopped
from softmax_fused.training.report.console import UPDATES, Reporter
from softmax_fused.training.signals import signals_held
from softmax_fused.training.wording import plural

WORKERS = (0, 1, 2, 4)


class OneByOne(Dataset[tuple[Tensor, int]]):
    """A split as torchvision's data sets give it: a Pillow image each time, through `ToTensor`."""

    def __init__(self, split: Split) -> None:
        from torchvision.transforms import ToTensor

        self.split, self.transform = split, ToTensor()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image: Tensor = self.transform(Image.fromarray(self.split.images[row].numpy()))
        return image, int(self.split.labels[row])


def time_loading(split: Split, batch_size: int, reporter: Reporter, kept: Path) -> dict[str, float]:
    """Read one shuffled epoch in each way, workers' start included, and print how long it took.

    Args:
        split: The images, on the CPU.
        batch_size: Images a step.
        reporter: Where the lines go.
        kept: A file written before, which a message after Ctrl-C names.

    Returns:
        Seconds by the name of the way.

    Raises:
        Stopped: on Ctrl-C or SIGTERM; what was printed holds.
    """
    steps = -(-len(split) // batch_size)
    seconds: dict[str, float] = {}
    try:
        for name, batches in ways(split, batch_size):
            start = perf_counter()
            started = start_workers(batches)
            images = sum(len(labels) for _, labels in tracked(started, steps, name, reporter))
            seconds[name] = perf_counter() - start
            speed = f"{images / seconds[name]:13,.0f} images/s"
            reporter.line(f"{name:22}{seconds[name]:8.2f} s{speed}")
    except (KeyboardInterrupt, Stopped) as stop:
        done = f"{len(seconds)} of {len(WORKERS) + 1} ways timed"
        raise Stopped(f"stopped; {kept} is written, {done}", getattr(stop, "status", 130)) from None
    return seconds


def start_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Return an iterator whose workers run, if it has any; one forked here inherits a handler that does not raise."""
    with signals_held(), more_workers_than_cores():
        return iter(batches)


@contextmanager
def more_workers_than_cores() -> Iterator[None]:
    """Leave out torch's warning of them, when a loader is made and when it starts: they are measured on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def ways(split: Split, batch_size: int) -> Iterator[tuple[str, Iterable[Batch]]]:
    """Yield the names of ways to read an epoch, and its batches, which are read when they are iterated over."""
    for workers in WORKERS:
        yield f"DataLoader, {workers} {plural('worker', workers)}", book_loader(split, batch_size, workers)
    yield "tensor in memory", MemoryBatches(split, batch_size, 0, torch.device("cpu")).epoch(1)


def book_loader(split: Split, batch_size: int, workers: int) -> Iterable[Batch]:
    """Return the DataLoader of Dive into Deep Learning, section 4.2."""
    with more_workers_than_cores():
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            OneByOne(split),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator().manual_seed(0),
        )
    return loader


def tracked(batches: Iterable[Batch], steps: int, name: str, reporter: Reporter) -> Iterator[Batch]:
    """Yield the same batches, counted by a bar on a terminal.

    The bar is redrawn from here: a thread of its own would run while worker processes are forked.
    """
    if not reporter.console.is_terminal:
        yield from batches
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, console=reporter.console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(name, total=steps)
        stride = max(1, steps // UPDATES)
        for step, batch in enumerate(batches, start=1):
            yield batch
            if step % stride == 0 or step == steps:
                bar.update(task, completed=step, refresh=True)
