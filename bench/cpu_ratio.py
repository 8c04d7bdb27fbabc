"""Time of torch's cross_entropy over ours on the CPU, above 1 where ours is faster: interleaved rounds, medians.

Usage: python bench/cpu_ratio.py [--rounds N] [--busy] [--only TEXT] [--json FILE]

`--busy` starts one busy process a core beside it, as on a shared machine. A round times both once, in an order that
turns; the gradient is made anew each time. The spread is that of the ratio of single rounds, its 20th and 80th
percentile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_fused

if TYPE_CHECKING:
    from collections.abc import Callable

LOSSES: dict[str, Callable[..., Tensor]] = {"ours": softmax_fused.cross_entropy, "torch": F.cross_entropy}
LARGE = [(2048, 10_000), (512, 32_000), (256, 128_256)]
IMAGES = [(16, 19, 128, 256), (1, 19, 512, 1024)]
CASES = [(shape, torch.float32) for shape in [(256, 10), (60_000, 10), (4096, 1000), *LARGE, *IMAGES]]
CASES += [(shape, torch.bfloat16) for shape in LARGE]


def forward(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> None:
    """Compute the loss alone."""
    with torch.no_grad():
        loss(logits, target)


def both(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> None:
    """Compute the loss and the gradient."""
    torch.autograd.grad(loss(logits, target), logits)


def measure(
    call: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of every round of each provider."""
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    calls = max(1, 200_000 // logits.numel())
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(rounds + 2):  # the first two warm up
        for name in list(LOSSES)[:: 1 if number % 2 else -1]:
            start = perf_counter()
            for _ in range(calls):
                call(LOSSES[name], logits, target)
            seconds[name].append((perf_counter() - start) / calls)
    return {name: times[2:] for name, times in seconds.items()}


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the ratio of the medians, the spread of the rounds' ratios, and the medians in milliseconds."""
    fifths = quantiles((torch / ours for ours, torch in zip(seconds["ours"], seconds["torch"], strict=True)), n=5)
    ours, torchs = median(seconds["ours"]), median(seconds["torch"])
    return {
        "ratio": torchs / ours,
        "p20": fifths[0],
        "p80": fifths[-1],
        "ours_ms": 1e3 * ours,
        "torch_ms": 1e3 * torchs,
    }


def cpu_name() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(rounds: int, only: str) -> list[dict[str, object]]:
    """Measure every case, print a line each, and return the records."""
    records = []
    for shape, dtype in CASES:
        for mode in (forward, both):
            name = f"{mode.__name__:7} {str(dtype)[6:]:8} {'x'.join(map(str, shape))}"
            if only not in name:
                continue
            record = summary(measure(mode, shape, dtype, max(rounds, 101 if shape[0] * shape[1] < 10_000 else 0)))
            records.append({"mode": mode.__name__, "dtype": str(dtype), "shape": shape, **record})
            times = f"ours {record['ours_ms']:8.3f} ms, torch {record['torch_ms']:8.3f} ms"
            print(
                f"{name:35} {record['ratio']:5.2f}  ({record['p20']:.2f} to {record['p80']:.2f})  {times}", flush=True
            )
    return records


def main() -> None:
    """Read the arguments, measure, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="rounds a case, each of one call a provider")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use")
    parser.add_argument("--busy", action="store_true", help="one busy process a core beside it")
    parser.add_argument("--only", default="", help="cases whose line contains this text")
    parser.add_argument("--json", type=Path, help="file for the medians")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spin = [sys.executable, "-c", "while True: pass"]
    beside = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)] if options.busy else []
    try:
        records = table(options.rounds, options.only)
    finally:
        for process in beside:
            process.kill()
            process.wait()
    if options.json:
        context = {"torch": torch.__version__, "threads": options.threads, "busy": options.busy, "cpu": cpu_name()}
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        options.json.write_text(json.dumps({**context, "date": date, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
