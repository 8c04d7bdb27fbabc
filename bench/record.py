"""The JSON file of a machine: a header that says what was measured with what, and a list of points.

Written after every case, to a file beside it that then takes its place: who interrupts keeps what was measured.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bench.cases import Case
from bench.clocks import Clock, CudaClock, copy_bandwidth
from bench.measure import Result, attempt, measure_case
from softmax_fused.functional import explain_backend

RESULTS = Path(__file__).parent / "results"
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numba": "numba",
    "Liger": "liger_kernel",
    "flash-attn": "flash_attn",
    "QuACK": "quack",
}
DISTRIBUTIONS = {"quack": "quack-kernels"}  # where pip calls it otherwise
NO_TIME = "no time was left"


def write_json(path: Path, content: object) -> None:
    """Never leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The model's name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str | None:
    """The GPU driver's version."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().partition("\n")[0] or None


def machine(clock: Clock) -> dict[str, Any]:
    if isinstance(clock, CudaClock):
        return {"device": "cuda", "name": clock.cuda.get_device_name(), "driver": driver()}
    return {"device": clock.device, "name": processor(), "threads": torch.get_num_threads()}


def version(module: str) -> str | None:
    """A package's version, also of one that merely lies on PYTHONPATH; None where it is absent."""
    if importlib.util.find_spec(module) is None:
        return None
    own = getattr(sys.modules.get(module), "__version__", None)  # says more: 2.11.0+cu130
    try:
        return own or importlib.metadata.version(DISTRIBUTIONS.get(module, module.replace("_", "-")))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def company(processes: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile, as DataLoader workers are."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: version(it) for name, it in PACKAGES.items()}


def header(clock: Clock, copy_gb_per_s: float, command: str, busy: int) -> dict[str, Any]:
    return {
        "machine": machine(clock) | ({"busy": busy} if busy else {}),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": command,
        "copy_gb_per_s": round(copy_gb_per_s, 1),
        "complete": False,
    }


def run(
    cases: Sequence[Case], clock: Clock, path: Path, minutes: float, command: str, copy_bytes: int, busy: int = 0
) -> dict[str, Any]:
    """Measure a machine; returns what it wrote."""
    end = monotonic() + 60 * minutes
    bandwidth = copy_bandwidth(clock, copy_bytes)
    clock.release()
    record = header(clock, bandwidth, command, busy) | {"points": [], "skipped": []}
    print(f"{record['machine']['name']}: copy {bandwidth:,.0f} GB/s; writing {path}", flush=True)
    measure_all(cases, clock, record, path, end - monotonic())
    record["complete"] = True
    write_json(path, record)
    return record


def measure_all(
    cases: Sequence[Case], clock: Clock, record: dict[str, Any], path: Path, seconds: float, latest: float = math.inf
) -> None:
    """Measure case after case; each gets an equal share of the time that is left, and none begins after `latest`."""
    begin = monotonic()
    for number, case in enumerate(cases):
        start = monotonic()
        if start > begin + latest:
            left = [{"provider": "every provider", "case": str(it), "reason": NO_TIME} for it in cases[number:]]
            record["skipped"] += left
            write_json(path, record)
            return
        result = Result([], [])
        share = (begin + seconds - start) / (len(cases) - number)
        act = functools.partial(measure_case, case, clock, share, record["copy_gb_per_s"] or None, result=result)
        try:
            attempt(result, case, "every provider", act)
        finally:  # also of a case that is interrupted
            record["points"] += result.points
            record["skipped"] += result.skipped
            write_json(path, record)  # before anything that a broken GPU would refuse
        gc.collect()
        clock.release()
        print(progress(case, result.points, monotonic() - start), flush=True)


def progress(case: Case, points: list[dict[str, Any]], seconds: float) -> str:
    last = [f"{point['provider']} {point['p50_us']:,.0f}" for point in points if point["mode"] in ("both", "step")]
    rounds = max((point["rounds"] for point in points), default=0)
    return f"{case} {seconds:.0f} s, {rounds} rounds: {' | '.join(last)} us"


def main(module: str, cases: Sequence[Case], make_clock: Callable[[], Clock], minutes: float, copy_bytes: int) -> Path:
    """The command line that the CPU's and the GPU's table share; returns what it wrote."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--json", type=Path, help="default: bench/results/MACHINE.json")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--busy", action="store_true", help="beside one busy process a core")
    options = parser.parse_args()
    clock = make_clock()
    compiled = explain_backend(torch.device("cpu"))[0] == "numba"
    name = f"cpu{'-numba' if compiled else ''}" if clock.device == "cpu" else slug(torch.cuda.get_device_name())
    busy = (os.cpu_count() or 1) if options.busy else 0
    path = options.json or RESULTS / f"{name}{'-busy' if busy else ''}.json"
    command = " ".join([f"python -m {module}", *sys.argv[1:]])
    with company(busy):
        run(cases, clock, path, options.minutes, command, copy_bytes, busy)
    return path
