"""An epoch of softmax regression in the lab against a bare loop over tensors in memory, interleaved.

Usage: python bench/epoch.py [ROUNDS]. Wants Fashion-MNIST under $SOFTMAX_FUSED_DATA; digits would be too short.

The bare loop is what one would write without the lab: float32 pixels ready in memory, a shuffle, nn.CrossEntropyLoss,
SGD, and nothing measured. The lab holds a quarter of the bytes, and counts the loss and the training accuracy; its
whole epoch also evaluates the test set.
"""

import sys
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from softmax_fused.training.data.batches import MemoryBatches
from softmax_fused.training.data.datasets import data_root, load_dataset, to_input
from softmax_fused.training.models.architectures import Model, build_model
from softmax_fused.training.models.evaluation import predict_classes
from softmax_fused.training.models.learner import Learner, build_learner
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.models.losses import build_loss
from softmax_fused.training.wording import plural

BATCH = 256


def bare_epoch(model: Model, images: Tensor, labels: Tensor) -> float:
    """Seconds of one epoch."""
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    start = perf_counter()
    for rows in torch.randperm(len(labels)).split(BATCH):
        optimizer.zero_grad()
        loss(model(images.index_select(0, rows)), labels.index_select(0, rows)).backward()
        optimizer.step()
    return perf_counter() - start


def main(rounds: int) -> None:
    """Prints medians over rounds in which every side ran once."""
    cpu = torch.device("cpu")
    data = load_dataset("fashion-mnist", data_root())
    pixels = to_input(data.train.images)
    batches = MemoryBatches(data.train, BATCH, 0, cpu)
    bare = build_model("softmax", 10)
    learners: dict[str, Learner] = {
        name: build_learner(build_model("softmax", 10), build_loss(name), device=cpu) for name in ("torch", "fused")
    }
    seconds: dict[str, list[float]] = {"bare loop": [], **{f"lab, {name}": [] for name in learners}, "test set": []}
    for number in range(rounds + 1):  # the first round warms up
        seconds["bare loop"].append(bare_epoch(bare, pixels, data.train.labels))
        order = list(learners.items())[:: 1 if number % 2 else -1]  # no side always runs on a warmer machine
        for name, learner in order:
            start = perf_counter()
            train_epoch(learner, batches.epoch(number))
            seconds[f"lab, {name}"].append(perf_counter() - start)
        start = perf_counter()
        (predict_classes(learners["torch"], data.test) == data.test.labels).sum().item()
        seconds["test set"].append(perf_counter() - start)
    threads = torch.get_num_threads()
    machine = f"{threads} {plural('thread', threads)}, torch {torch.__version__}"
    print(f"median of {rounds} {plural('round', rounds)}, {machine}")
    for side, times in seconds.items():
        ratios = [ours / base for ours, base in zip(times[1:], seconds["bare loop"][1:], strict=True)]
        print(f"{side:12} {median(times[1:]):7.3f} s   {median(ratios):5.2f} of the bare loop")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
