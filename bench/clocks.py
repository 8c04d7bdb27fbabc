"""How a call is timed: on the CPU by the clock on the wall, on a GPU between two events in its queue."""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Job

FLUSH_BYTES = 2**30
CALLS = 20
"""How often a call is repeated that is too short to be timed once."""


class CpuClock:
    """No flush: on the CPU logits are as warm as the layer before left them, and the large ones fit no cache."""

    device = "cpu"
    calls = CALLS

    def flush(self) -> None:
        """Nothing to do."""

    def microseconds(self, call: Callable[[], object]) -> float:
        start = perf_counter_ns()
        call()
        return (perf_counter_ns() - start) / 1e3

    def peak_bytes(self, job: Job) -> int | None:  # noqa: ARG002 (see memory.py: it takes a process of its own)
        return None

    def host_microseconds(self, job: Job) -> float | None:  # noqa: ARG002 (there is no queue)
        return None

    def loop_microseconds(self, job: Job) -> float | None:  # noqa: ARG002
        return None

    def launches(self, job: Job) -> int | None:  # noqa: ARG002
        return None

    def synchronize(self) -> None:
        """Calls return when they are done."""

    def release(self) -> None:
        """Freed memory is the system's again by itself."""


class CudaClock:
    """What it takes from torch.cuda can be replaced, so that every line runs in a test without a GPU."""

    def __init__(
        self,
        device: str = "cuda",
        cuda: Any = torch.cuda,
        activity: ProfilerActivity = ProfilerActivity.CUDA,
        flush_bytes: int = FLUSH_BYTES,
        calls: int = CALLS,
    ) -> None:
        self.device, self.cuda, self.activity, self.calls = device, cuda, activity, calls
        self.buffer = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Write more than any L2 holds; long enough, too, that the host is ahead when a small call's turn comes.

        So small calls are timed on the device alone, unless they wait for it themselves; their time on the host is
        `host_microseconds`.
        """
        self.buffer.zero_()

    def microseconds(self, call: Callable[[], object]) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def peak_bytes(self, job: Job) -> int | None:
        """Most memory that was allocated during the call beyond what was before."""
        job.prepare()
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        job.call()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - before

    def host_microseconds(self, job: Job) -> float | None:
        """Time until the call is enqueued, the device not waited for: the median of many."""
        times = []
        for _ in range(5 * self.calls):
            job.prepare()
            self.cuda.synchronize()  # else a full queue would be timed
            start = perf_counter_ns()
            job.call()
            times.append((perf_counter_ns() - start) / 1e3)
        self.cuda.synchronize()
        return statistics.median(times)

    def loop_microseconds(self, job: Job) -> float | None:
        """Time a call of a loop that never waits for the device but at its end: host or device, whoever is slower."""
        self.cuda.synchronize()
        start = perf_counter_ns()
        for _ in range(5 * self.calls):
            job.prepare()
            job.call()
        self.cuda.synchronize()
        return (perf_counter_ns() - start) / 1e3 / (5 * self.calls)

    def launches(self, job: Job) -> int | None:
        """Kernels, copies and fills that one call enqueues; None where the profiler sees nothing."""
        job.prepare()
        self.cuda.synchronize()
        with profile(activities=[self.activity]) as seen:
            job.call()
            self.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(trace))
            return count_launches(json.loads(trace.read_text())["traceEvents"])

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def release(self) -> None:
        """Give the last case's memory back before the next one asks for more."""
        self.cuda.empty_cache()


Clock = CpuClock | CudaClock


def count_launches(events: list[dict[str, Any]]) -> int | None:
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events) or None


def copy_bandwidth(clock: Clock, size: int) -> float:
    """GB/s of a copy, bytes read and bytes written: what the same machine does at best, in the same run."""
    source = torch.ones(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [clock.microseconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * size / statistics.median(times) / 1e3


def first_write_bandwidth(size: int) -> float:
    """GB/s of the CPU's first write to memory that the system has just given, and clears page by page."""
    times = [CpuClock().microseconds(lambda: torch.ones(size, dtype=torch.int8)) for _ in range(5)]
    return size / statistics.median(times) / 1e3
