"""How long it takes to read a data set: image by image through a DataLoader, as textbooks do it, or from memory."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softmax_fused.training.data.batches import Batch, MemoryBatches, ignore_signals_in_worker
from softmax_fused.training.data.datasets import Split
from softmax_fused.training.signals import signals_delayed
from softmax_fused.training.wording import plural

WORKERS = (0, 1, 2, 4)

Track = Callable[[Iterable[Batch], int, str], Iterable[Batch]]


class PillowDataset(Dataset[tuple[Tensor, int]]):
    """A split as torchvision's data sets present it: each image as a Pillow image, converted by `ToTensor`."""

    def __init__(self, split: Split) -> None:
        from torchvision.transforms import ToTensor

        self.split, self.transform = split, ToTensor()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image: Tensor = self.transform(Image.fromarray(self.split.images[row].numpy()))
        return image, int(self.split.labels[row])


def time_loading(split: Split, batch_size: int, track: Track) -> Iterator[tuple[str, float]]:
    """Read one shuffled epoch with each loader, and yield the loader's name and its seconds, workers' start included.

    Args:
        split: The images, on the CPU.
        batch_size: Images per batch.
        track: Called with batches, their number and the loader's name; returns the same batches and shows progress.
    """
    steps = -(-len(split) // batch_size)
    for name, batches in loaders(split, batch_size):
        start = perf_counter()
        for _ in track(start_workers(batches), steps, name):
            pass
        yield name, perf_counter() - start


def loaders(split: Split, batch_size: int) -> Iterator[tuple[str, Iterable[Batch]]]:
    """Yield the name of each loader, and its batches of one epoch, which are read while they are iterated over."""
    for workers in WORKERS:
        yield f"DataLoader, {workers} {plural('worker', workers)}", textbook_loader(split, batch_size, workers)
    yield "tensor in memory", MemoryBatches(split, batch_size, 0, torch.device("cpu")).epoch(1)


def textbook_loader(split: Split, batch_size: int, workers: int) -> Iterable[Batch]:
    """Return the DataLoader of Dive into Deep Learning, section 4.2."""
    with ignore_worker_count_warning():
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            PillowDataset(split),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            worker_init_fn=ignore_signals_in_worker,
            generator=torch.Generator().manual_seed(0),
        )
    return loader


def start_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Return an iterator whose workers, if it has any, have started.

    Workers start with signals delayed: a worker inherits the handler of the moment, and the usual one raises.
    """
    with signals_delayed(), ignore_worker_count_warning():
        return iter(batches)


@contextmanager
def ignore_worker_count_warning() -> Iterator[None]:
    """Ignore torch's warning of more workers than cores, which are timed on purpose.

    torch warns when a DataLoader is made and again when it starts its workers.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield
