"""A linear layer and its loss in one, against one after the other: python -m bench.linear [--operation loss|rows].

Time and peak memory of loss and gradients of input and weight; in the cases of rows, of each row's loss and entropy
with the gradients of both together, and of each row's prediction. Providers take turns within each round, A B C, C B A;
peaks are measured in a process each, beyond input, weight and target. The table in docs/performance.md is what
`table` makes of the JSON file, which is written after every case.
"""

import argparse
import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_fused
from bench import cases
from bench.cases import Job
from bench.clocks import Clock, CpuClock, CudaClock
from bench.formulas import BASE, OURS, ratios
from bench.measure import COMPILE_SECONDS, Result, attempt, warm_up
from bench.memory import ROOT, resident_peak
from bench.providers import COMPILED, LIGER, Unavailable, rival
from bench.record import RESULTS, header, slug, write_json
from bench.tables import ABSENT, markdown, show

CHUNKED = "torch, chunked"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Rows of features and a weight of a dtype, with class indices as targets, and what is computed of them."""

    rows: int
    features: int
    classes: int
    dtype: str
    operation: str = "loss"

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}x{self.classes}-{self.dtype}-{self.operation}"


LARGE = Case(8192, 1024, 50257, "float32")
CASES = [
    LARGE,
    Case(2048, 512, 10_000, "float32"),
    Case(4096, 256, 1000, "float32"),
    Case(60_000, 784, 10, "float32"),
    Case(512, 512, 16_384, "bfloat16"),
    LARGE._replace(operation="rows"),
    Case(2048, 512, 10_000, "float32", "rows"),
]
ON_GPU = [*(Case(8192, 4096, classes, "bfloat16") for classes in (32_000, 128_256, 50_257)), LARGE]
ROWS_ON_GPU = [Case(8192, 4096, 128_256, "bfloat16", "rows")]


def one_after_the_other(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def torch_chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions())


def rows_one_after_the_other(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """A pass over the logits for each output of rows."""
    logits = F.linear(x, w)
    entropy = torch.logsumexp(logits, 1) - (torch.softmax(logits, 1) * logits).sum(1)
    return summed(F.cross_entropy(logits, target, reduction="none"), entropy, logits.argmax(1), target)


def rows_in_chunks(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    found = softmax_fused.linear_cross_entropy_rows(x, w, target, outputs=("loss", "entropy", "prediction"))
    return summed(found.loss, found.entropy, found.prediction, target)


def summed(loss: Tensor, entropy: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """The mean loss with an entropy bonus, beside the accuracy, which has no gradient."""
    return (loss - 0.01 * entropy).mean() + 0 * (prediction == target).float().mean()


PROVIDERS: dict[str, Layer] = {
    BASE: one_after_the_other,
    OURS: softmax_fused.linear_cross_entropy,
}
if hasattr(F, "linear_cross_entropy"):
    PROVIDERS[CHUNKED] = torch_chunked
ROWS_PROVIDERS: dict[str, Layer] = {BASE: rows_one_after_the_other, OURS: rows_in_chunks}
RIVALS = (COMPILED, "Liger")  # on a GPU; QuACK's tries out its matrix products for minutes first


def providers_of(case: Case) -> dict[str, Layer]:
    return ROWS_PROVIDERS if case.operation == "rows" else PROVIDERS


def rival_layer(name: str, case: Case, device: str, seconds: float) -> Layer:
    if name == "Liger":
        if case.operation == "rows":
            raise Unavailable("it has the loss alone")
        logits = cases.Case((case.rows, case.classes), getattr(torch, case.dtype))
        layer: Layer = rival(LIGER, logits, device).liger_fused_linear_cross_entropy
        return layer
    if seconds < COMPILE_SECONDS:
        raise Unavailable(f"{seconds:.0f} s are too little time to compile")
    torch.compiler.reset()
    return torch.compile(providers_of(case)[BASE], dynamic=False)


def make_job(provider: str, case: Case, device: str, seconds: float = 0) -> Job:
    """Loss and gradients, the gradients thrown away."""
    layer = providers_of(case).get(provider) or rival_layer(provider, case, device, seconds)
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": device}
    x = torch.randn(case.rows, case.features, **options).requires_grad_()
    w = (torch.randn(case.classes, case.features, **options) / case.features**0.5).requires_grad_()
    target = torch.randint(case.classes, (case.rows,), device=device)

    def call() -> None:
        torch.autograd.grad(layer(x, w, target), (x, w))

    return Job(lambda: None, call)


def peak(provider: str, case: Case) -> int:
    """Bytes by which a call on the CPU raises the peak of its process."""
    make_job(provider, case._replace(rows=8, features=8), "cpu").call()  # libraries and threads are there
    job = make_job(provider, case, "cpu")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: what an import took for a moment is no peak any more
    before = resident_peak()
    job.call()
    return resident_peak() - before


def peak_bytes(provider: str, case: Case, clock: Clock, job: Job) -> int | None:
    if isinstance(clock, CudaClock):
        return clock.peak_bytes(job)
    command = [sys.executable, "-m", "bench.linear", "--peak", provider, *map(str, case)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def ready_job(provider: str, case: Case, clock: Clock, seconds: float) -> Job:
    """A job that has been called: on a GPU at its full size, for which kernels are compiled."""
    if isinstance(clock, CudaClock):
        return warm_up(make_job(provider, case, clock.device, seconds))
    make_job(provider, case._replace(rows=min(case.rows, 128)), clock.device).call()
    return make_job(provider, case, clock.device)


def times(jobs: dict[str, Job], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Microseconds by provider and round."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in list(jobs)[:: -1 if number % 2 else 1]:
            clock.flush()
            found[name].append(clock.microseconds(jobs[name].call))
    return found


def measure(case: Case, clock: Clock, rounds: int, result: Result, seconds: float = 0) -> None:
    """Add a point a provider; what takes long to compile wants `seconds`."""
    names = [*providers_of(case), *(RIVALS if isinstance(clock, CudaClock) else ())]
    jobs: dict[str, Job] = {}
    for name in names:
        job = attempt(result, case, name, functools.partial(ready_job, name, case, clock, seconds))
        jobs |= {name: job} if job else {}
    peaks = {name: peak_bytes(name, case, clock, job) for name, job in jobs.items()}
    found = times(jobs, clock, rounds)
    for name in jobs:
        point = {"provider": name, **case._asdict(), "rounds": len(found[name]), "p50_us": round(median(found[name]))}
        point |= {"peak_bytes": peaks[name]}
        if BASE in jobs:
            point |= {"time_to_torch": round(median(ratios(found[name], found[BASE])), 3)}
            point |= {"peak_to_torch": round(peaks[name] / peaks[BASE], 3)}
        result.points.append(point)


def table(rows: list[dict[str, Any]], operation: str = "loss") -> str:
    """Markdown: times and peaks of each case, those of torch's layer and loss first, then the others' over them."""
    rows = [row for row in rows if row.get("operation", "loss") == operation]
    if not rows:
        return ""
    names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != BASE]
    titles = ["rows, features, classes", "dtype", f"{BASE}: time", f"{BASE}: peak memory"]
    titles += [f"{name}: {what}" for what in ("time", "peak memory") for name in names]
    lines = []
    sizes = ("rows", "features", "classes", "dtype")
    for case in dict.fromkeys(tuple(row[key] for key in sizes) for row in rows):
        of_case = {row["provider"]: row for row in rows if tuple(row[key] for key in sizes) == case}
        base = of_case.get(BASE)
        line = [", ".join(map(str, case[:3])), case[3]]
        line += [f"{base['p50_us'] / 1e6:,.3f} s", f"{base['peak_bytes'] / 1e6:,.0f} MB"] if base else [ABSENT] * 2
        line += [show(of_case.get(name, {}).get(key)) for key in ("time_to_torch", "peak_to_torch") for name in names]
        lines.append(line)
    return markdown(titles, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear")
    parser.add_argument("--json", type=Path, help="default: bench/results/linear-MACHINE.json")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operation", choices=("loss", "rows"), help="default: both")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        provider, *sizes, dtype, operation = options.peak
        print(peak(provider, Case(*map(int, sizes), dtype, operation)))
        return
    clock: Clock = CudaClock() if options.gpu else CpuClock()
    path = options.json or RESULTS / f"linear-{slug(torch.cuda.get_device_name()) if options.gpu else 'cpu'}.json"
    record = header(clock, 0, " ".join(["python -m bench.linear", *sys.argv[1:]]), 0) | {"rows": [], "skipped": []}
    del record["copy_gb_per_s"]  # products bound the time, not copies
    sizes = [*ON_GPU, *ROWS_ON_GPU] if options.gpu else CASES
    sizes = [case for case in sizes if options.operation in (None, case.operation)]
    shown: set[str] = set()
    for case in sizes:
        measure(case, clock, options.rounds, Result(record["rows"], record["skipped"]), seconds=60)
        record["complete"] = case == sizes[-1]
        write_json(path, record)
        lines = table(record["rows"], case.operation).splitlines()
        if case.operation not in shown:
            print(f"\n{case.operation}:\n" if shown else "", *lines[:-1], sep="\n")
        print(lines[-1], flush=True)
        shown.add(case.operation)


if __name__ == "__main__":
    main()
