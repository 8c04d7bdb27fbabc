"""Gloo ranks on this machine, and problems that every one of them makes whole, to take its part."""

from __future__ import annotations

import datetime
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

SECONDS = 240  # several times what it takes beside other processes
ULPS = {torch.float64: 64, torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}


def start(rank: int, world: int, folder: str, work: Callable[..., None], *args: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    try:
        work(rank, world, *args)
    except BaseException:
        Path(folder, f"{time.monotonic()} rank {rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run(folder: Path, world: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(rank, world, *args)` on every rank; raise what one raises; leave no process behind."""
    context = mp.start_processes(
        start, (world, str(folder), work, *args), nprocs=world, join=False, start_method="spawn"
    )
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f"the ranks did not end within {SECONDS} seconds")
    except Exception as error:
        first = min(folder.glob("* rank *"), default=None)  # the others only miss it
        raise AssertionError(first.read_text() if first else "no rank said why") from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def slices(classes: int, world: int, kind: str) -> list[int]:
    if kind == "even":
        return [classes // world + (rank < classes % world) for rank in range(world)]
    if kind == "uneven":
        return [*range(1, world), classes - world * (world - 1) // 2]
    return [0, classes - 2, *[1] * min(2, world - 2), *[0] * (world - 4)] if world > 2 else [0, classes]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, soft: bool, weighted: bool, seed: int, ignored: int = -100
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the whole logits, target and weights, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    dim = min(len(shape) - 1, 1)
    logits = (3 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)
    rows = (*shape[:dim], *shape[dim + 1 :])
    if soft:
        target = torch.randn(shape, dtype=torch.float64, generator=generator).softmax(dim).to(dtype)
    else:
        target = torch.randint(0, shape[dim], rows, generator=generator)
        if target.ndim:
            target.view(-1)[1::4] = ignored
    weight = torch.rand(shape[dim], dtype=torch.float64, generator=generator).to(dtype) if weighted else None
    return logits, target, weight


def part_of(whole: Tensor, sizes: list[int], rank: int, dim: int) -> Tensor:
    return whole.narrow(dim, sum(sizes[:rank]), sizes[rank])


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    eps = ULPS[dtype] * torch.finfo(dtype).eps
    size = truth.nan_to_num(posinf=0, neginf=0).abs().max().item() if truth.numel() else 1.0
    torch.testing.assert_close(
        ours.double(), truth, rtol=eps, atol=eps * max(size, 1e-3) + 1e-7 * (eps > 1e-4), equal_nan=True
    )


def assert_same_everywhere(loss: Tensor, world: int) -> None:
    everyone = [torch.empty_like(loss) for _ in range(world)]
    dist.all_gather(everyone, loss.detach().contiguous())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[loss.itemsize]
    assert all(torch.equal(other.view(bits), loss.detach().view(bits)) for other in everyone), everyone


def several(rank: int, world: int, works: Sequence[Callable[[int, int], None]]) -> None:
    for work in works:
        work(rank, world)
