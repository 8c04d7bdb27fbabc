"""Peak memory of forward and backward on the CPU, beyond logits and target, each provider in a process of its own.

Usage: python -m bench.memory PROVIDER SHAPE DTYPE (32x1000 float32), prints bytes. bench.cpu calls it.
torch.compile is left out: what its compiler needs would hide what its code needs.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Inputs, both_job
from bench.providers import PROVIDERS

ROOT = Path(__file__).parents[1]
MEASURED = ("ours", "ours, grad_in_forward", "ours, inplace_backward", "ours, backend torch", "torch")


def resident_peak() -> int:
    """Bytes; a peak can only grow, hence the processes.

    Not getrusage's figure where Linux has another: a child starts that one at its parent's size.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(name: str, case: Case) -> int:
    """Peak of the call over the peak of what was there before it."""
    provider = PROVIDERS[name]
    small = Inputs(Case((8, *case.shape[1:]), case.dtype), "cpu")
    both_job(provider.build(small.case, "cpu"), small, provider.overwrites).call()  # libraries and threads are there
    inputs = Inputs(case, "cpu")
    job = both_job(provider.build(case, "cpu"), inputs, provider.overwrites)
    before = resident_peak()
    job.call()
    return resident_peak() - before


def fill_peaks(points: list[dict[str, Any]], case: Case) -> None:
    """Ask a process a provider, and add the answer to the provider's point of the case."""
    dtype = str(case.dtype).removeprefix("torch.")
    for point in points:
        found = point["mode"], point["dtype"], tuple(point["shape"]), point["provider"] in MEASURED
        if found == ("both", dtype, case.shape, True):
            command = [sys.executable, "-m", "bench.memory", point["provider"], "x".join(map(str, case.shape)), dtype]
            answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            point["peak_bytes"] = int(answer.stdout)


if __name__ == "__main__":
    provider, shape, dtype = sys.argv[1:]
    print(growth(provider, Case(tuple(map(int, shape.split("x"))), getattr(torch, dtype))))
