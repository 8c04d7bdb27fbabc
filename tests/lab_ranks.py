"""Ranks for tests, and the functions that they run. Each rank imports this module, which therefore imports little."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data.datasets import ImageData
from softmax_fused.training.errors import LabError, UsageError
from softmax_fused.training.ranks.group import Ranks
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.runs import run as run_module
from softmax_fused.training.runs.run import resume, train

LIMIT = 150  # seconds for anything that ends within 20 on an idle machine

Runs = dict[str, tuple[TrainConfig, ImageData]]


def on_ranks(size: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run ``function(ranks, *arguments)`` in `size` processes that meet in a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.start_processes(
        _rank, (size, function, str(folder), arguments), nprocs=size, join=False, start_method="spawn"
    )
    assert context is not None
    try:
        end = time.monotonic() + LIMIT
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"expected {size} ranks to end within {LIMIT} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join(10)


def _rank(rank: int, size: int, function: Callable[..., None], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    function(Ranks(rank, size, rank, size), *arguments)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a thread of gloo may outlive its group, and abort the interpreter at its end


def train_all(ranks: Ranks, folder: Path, runs: Runs) -> None:
    """Train each run in a folder of its name, without figures, which take longer than training."""
    run_module.draw_figures = lambda *_: None
    for name, (config, data) in runs.items():
        train(config, output=folder / name, data=data, ranks=ranks, reporter=Reporter(quiet=True))


def train_and_communicate(ranks: Ranks, folder: Path, runs: Runs, begun: Path, data: ImageData) -> None:
    """Train, resume the run of a single process, and try every communication between ranks."""
    train_all(ranks, folder, runs)
    resume(begun, {"epochs": 2}, data=data, ranks=ranks, reporter=Reporter(quiet=True))
    assert ranks.sum(torch.tensor(2**53 - ranks.rank)).item() == ranks.size * 2**53 - sum(range(ranks.size))
    assert ranks.call_on_first(lambda: ranks.rank) == 0
    assert ranks.call_local_first(lambda: ranks.rank) == ranks.rank
    ranks.check_equal("settings", {"lr": 0.1})
    with pytest.raises(LabError, match=r"expected the same data on every rank, got 0 on rank 0 and 1 on rank 1; give"):
        ranks.check_equal("data", ranks.rank)

    def fail() -> None:
        raise UsageError("reported by rank 0")

    with pytest.raises(SystemExit if ranks.rank else UsageError) as stop:
        ranks.call_on_first(fail)
    assert ranks.rank == 0 or (isinstance(stop.value, SystemExit) and stop.value.code == UsageError.status)
