"""Jobs of torchrun for tests. None outlives its test."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.lab import subprocess_environment
from tests.lab_ranks import LIMIT

PROC = Path("/proc")


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
