"""An epoch of softmax regression in the lab against a bare loop over tensors in memory, interleaved.

Usage: python bench/epoch.py [ROUNDS]. Wants Fashion-MNIST under $SOFTMAX_FUSED_DATA; digits would be too short.
bench.gpu measures the same on a GPU, with random pixels.

The bare loop is what one would write without the lab: float32 pixels ready in memory, a shuffle, nn.CrossEntropyLoss,
SGD, and nothing measured. The lab holds a quarter of the bytes, and counts the loss and the training accuracy; its
whole epoch also evaluates the test set.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench.clocks import Clock, CpuClock
from softmax_fused.training.data.batches import MemoryBatches
from softmax_fused.training.data.datasets import Split, data_root, load_dataset, to_input
from softmax_fused.training.models.architectures import build_model
from softmax_fused.training.models.evaluation import predict_classes
from softmax_fused.training.models.learner import build_learner
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.models.losses import build_loss

BATCH = 256
BARE = "bare loop"
LEAST_ROUNDS = 2


def random_split(images: int) -> Split:
    """As many bytes as pixels; what they are changes no time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.randint(10, (images,), generator=generator))


def bare_epoch(split: Split, device: torch.device) -> Callable[[int], None]:
    images, labels = to_input(split.images).to(device), split.labels.to(device)
    model = build_model("softmax", 10).to(device)
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)

    def epoch(number: int) -> None:  # noqa: ARG001
        for rows in torch.randperm(len(labels), device=device).split(BATCH):
            optimizer.zero_grad()
            loss(model(images.index_select(0, rows)), labels.index_select(0, rows)).backward()
            optimizer.step()

    return epoch


def lab_epoch(loss: str, split: Split, device: torch.device) -> Callable[[int], None]:
    learner = build_learner(build_model("softmax", 10), build_loss(loss), device=device)
    batches = MemoryBatches(split, BATCH, 0, device)
    return lambda number: train_epoch(learner, batches.epoch(number))


def evaluation(split: Split, device: torch.device) -> Callable[[int], None]:
    learner, there = build_learner(build_model("softmax", 10), build_loss("torch"), device=device), split.to(device)
    return lambda number: (predict_classes(learner, there) == there.labels).sum().item()  # noqa: ARG005


def sides(train: Split, test: Split, device: torch.device) -> dict[str, Callable[[int], None]]:
    """What is timed; each is called with an epoch's number."""
    losses = {f"lab, {loss}": lab_epoch(loss, train, device) for loss in ("torch", "fused")}
    return {BARE: bare_epoch(train, device), **losses, "test set": evaluation(test, device)}


def measure(
    epochs: dict[str, Callable[[int], None]], clock: Clock, rounds: int, seconds: float = float("inf")
) -> list[dict[str, Any]]:
    """A row a side: median seconds and, by round, the ratio to the bare loop's; the first round warms up."""
    end = monotonic() + seconds
    found: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and monotonic() > end:
            break
        for name in list(epochs)[:: 1 if number % 2 else -1]:  # no side always runs on a warmer machine
            start = perf_counter()
            epochs[name](number)
            clock.synchronize()
            found[name].append(perf_counter() - start)
    rows = []
    for name, times in found.items():
        to_bare = [ours / bare for ours, bare in zip(times[1:], found[BARE][1:], strict=True)]
        rows.append({"side": name, "rounds": len(times) - 1, "seconds": round(median(times[1:]), 4)})
        rows[-1]["to_bare_loop"] = round(median(to_bare), 3)
    return rows


def main(rounds: int) -> None:
    """Prints medians over rounds in which every side ran once."""
    data = load_dataset("fashion-mnist", data_root())
    rows = measure(sides(data.train, data.test, torch.device("cpu")), CpuClock(), rounds)
    print(f"medians of {rounds} rounds on {torch.get_num_threads()} threads, torch {torch.__version__}")
    for row in rows:
        print(f"{row['side']:12} {row['seconds']:7.3f} s   {row['to_bare_loop']:5.2f} of the bare loop")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
