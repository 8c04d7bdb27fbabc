"""Ranks one after another in this process: each runs as far as the all-reduces are known, until all know them all.

What ranks compute is the same each time, so running anew replays it. It takes no processes, which take seconds to
start, and counts what is communicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from softmax_fused.distributed import linear, merge, row_autograd, rows, vocab_parallel

REDUCE = {
    "SUM": lambda parts: parts.sum(0),
    "MAX": lambda parts: parts.amax(0),
    "MIN": lambda parts: parts.amin(0),
}


class AllReduce(NamedTuple):
    """One that the ranks have been through."""

    operation: str
    result: Tensor


class WaitingError(Exception):
    """A rank has come to an all-reduce whose result is not known yet."""


class Ranks:
    """The ranks of a group, and their all-reduces so far."""

    def __init__(self) -> None:
        self.done: list[AllReduce] = []
        self.rank = self.calls = 0
        self.part: tuple[str, Tensor] | None = None

    def all_reduce(self, tensor: Tensor, operation: str, group: Any) -> Tensor:
        if group is None or not tensor.numel():
            return tensor
        self.calls += 1
        if self.calls <= len(self.done):
            assert self.done[self.calls - 1].operation == operation
            return tensor.copy_(self.done[self.calls - 1].result)
        self.part = (operation, tensor.clone())
        raise WaitingError

    def run(self, world: int, work: Callable[[int], Any]) -> list[Any]:
        """Return what `work(rank)` returns on every rank."""
        self.done = []
        while True:
            found, parts = [], []
            for self.rank in range(world):
                self.calls = 0
                try:
                    found.append(work(self.rank))
                except WaitingError:
                    parts.append(self.part)
            if not parts:
                return found
            assert len(parts) == world, "some ranks wait for others that are through"
            operations, tensors = zip(*parts, strict=True)
            assert len(set(operations)) == 1
            self.done.append(AllReduce(operations[0], REDUCE[operations[0]](torch.stack(tensors))))

    @property
    def operations(self) -> list[str]:
        return [it.operation for it in self.done]


def as_group(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Return ranks that the functions of `softmax_fused.distributed` take for a group, where sizes are given."""
    found = Ranks()
    for module in (merge, row_autograd):
        monkeypatch.setattr(module, "all_reduce", found.all_reduce)
    for module in (rows, linear):
        monkeypatch.setattr(module, "members", lambda group: ("ranks", found.rank))
    monkeypatch.setattr(vocab_parallel.dist, "get_world_size", lambda group: None)
    monkeypatch.setattr(vocab_parallel, "check_sizes", lambda *_: None)
    return found
