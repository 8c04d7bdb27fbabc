"""Ranks for tests: spawned ones that run a function, and torchrun's jobs, of which none outlives its test."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from softmax_fused.training.ranks import Ranks
from tests.lab import subprocess_environment

PROC = Path("/proc")
LIMIT = 150  # seconds for anything that ends within 20 on an idle machine


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


class Job:
    """A torchrun process, its ranks by number, and what they print."""

    def __init__(self, process: "subprocess.Popen[str]", job: str, out: Path, err: Path) -> None:
        self.process, self.job, self._out, self._err = process, job, out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def pids(self) -> dict[int, int]:
        """Return the process of each rank that runs."""
        found = {}
        for entry in PROC.glob("[0-9]*"):
            with suppress(OSError):
                lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"TORCHELASTIC_RUN_ID={self.job}" in lines:
                    found[int(next(line for line in lines if line.startswith("RANK="))[5:])] = int(entry.name)
        return found

    def wait_for(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not ready():
            assert self.process.poll() is None, self.err
            assert time.monotonic() < end, self.out + self.err
            time.sleep(0.1)


@contextmanager
def torchrun(folder: Path, ranks: int, *arguments: object, restarts: int = 0) -> Iterator[Job]:
    """Start ``torchrun -m softmax_fused`` with a rendezvous on a free port."""
    job = uuid.uuid4().hex
    meet = "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={job}"
    start = "-m", "torch.distributed.run", *meet, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"
    out, err = folder / f"{job}.out", folder / f"{job}.err"
    command = [sys.executable, *start, "-m", "softmax_fused", *map(str, arguments)]
    with out.open("w") as to_out, err.open("w") as to_err:
        process = subprocess.Popen(command, env=subprocess_environment(), stdout=to_out, stderr=to_err, text=True)
    run = Job(process, job, out, err)
    try:
        yield run
    finally:
        process.kill()
        process.wait(10)
        for pid in run.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
