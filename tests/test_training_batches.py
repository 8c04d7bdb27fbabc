"""Batches: every image once, the same from memory and from workers."""

import signal

import pytest
import torch

from softmax_fused.training.data.batches import (
    LoaderBatches,
    MemoryBatches,
    ignore_signals_in_worker,
    make_batches,
)
from softmax_fused.training.ranks.shards import epoch_permutation
from softmax_fused.training.signals import SIGNALS
from tests.lab import few_digits

CPU = torch.device("cpu")


def test_an_epoch_holds_every_image_once_with_its_label() -> None:
    split = few_digits().train
    batches = MemoryBatches(split, 64, 0, CPU)
    images, labels = map(torch.cat, zip(*batches.epoch(1), strict=True))
    assert len(batches) == 5
    assert [len(labels) for _, labels in batches.epoch(1)] == [64, 64, 64, 64, 44]
    order = epoch_permutation(300, 0, 1)
    assert torch.equal(images, split.images[order].float() / 255)
    assert torch.equal(labels, split.labels[order])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [
        tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in (0, 1, 4096, 2**32 - 1) for epoch in (1, 2, 3)
    ]
    assert len(set(orders)) == len(orders)
    torch.manual_seed(5)
    assert epoch_permutation(50, 0, 1).tolist() == list(orders[0])
    assert sorted(orders[0]) == list(range(50))


def test_workers_yield_the_same_batches_and_leave_the_global_generator_alone() -> None:
    split = few_digits().train
    memory, loader = make_batches(split, 64, 3, CPU), make_batches(split, 64, 3, CPU, workers=2)
    assert isinstance(loader, LoaderBatches)
    assert len(memory) == len(loader)
    state = torch.get_rng_state()
    for epoch in (1, 2, 5):
        pairs = list(zip(memory.epoch(epoch), loader.epoch(epoch), strict=True))
        assert len(pairs) == 5
        for (images, labels), (read, classes) in pairs:
            assert torch.equal(images, read)
            assert torch.equal(labels, classes)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 299, 300, 301])
def test_odd_batch_sizes(size: int) -> None:
    batches = MemoryBatches(few_digits().train, size, 0, CPU)
    sizes = [len(labels) for _, labels in batches.epoch(1)]
    assert len(sizes) == len(batches)
    assert sum(sizes) == 300


def test_workers_ignore_both_signals() -> None:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        ignore_signals_in_worker(0)
        assert {signal.getsignal(signum) for signum in SIGNALS} == {signal.SIG_IGN}
    finally:
        for signum, known in before.items():
            signal.signal(signum, known)
