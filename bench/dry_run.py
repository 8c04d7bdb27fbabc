"""A GPU that is not there: a clock whose events cost nothing, and sizes small enough for Triton's interpreter."""

import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench.cases import STEP, Case
from bench.clocks import CudaClock

SMALL = Case((4, 6), torch.bfloat16)


class FakeCuda:
    """Stands in for torch.cuda: every call takes 2 ms and allocates 64 bytes.

    It insists on what torch insists on: times between events that both are recorded, the later of which is over.
    """

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timed, self.recorded, self.over = enable_timing, False, False

        def record(self) -> None:
            self.recorded = True

        def synchronize(self) -> None:
            self.over = True

        def elapsed_time(self, end_event: Any) -> float:
            if not (self.timed and end_event.timed and self.recorded and end_event.recorded and end_event.over):
                raise RuntimeError("both events must be recorded with timing, and the end be over")
            return 2.0

    def __init__(self) -> None:
        self.released = 0
        self.watched = False

    def get_device_name(self) -> str:
        return "No GPU"

    def synchronize(self) -> None: ...

    def reset_peak_memory_stats(self) -> None:
        self.watched = True

    def memory_allocated(self) -> int:
        return 36

    def max_memory_allocated(self) -> int:
        return 100 if self.watched else 0

    def empty_cache(self) -> None:
        self.released += 1


def make_clock(flush_bytes: int = 64) -> CudaClock:
    """A clock for a GPU, all of whose own lines run."""
    return CudaClock("cpu", FakeCuda(), ProfilerActivity.CPU, flush_bytes, calls=1)


def sizes() -> dict[str, Any]:
    """What bench.gpu measures, in small: one case of each kind."""
    return {
        "loss": [SMALL, Case((1, 3, 2, 2), torch.bfloat16)],
        "loss_float32": [Case((2, 130), torch.float32)],
        "step": [STEP._replace(shape=(4, 10))],
        "softmax": [SMALL._replace(operation="softmax")],
        "linear": [(4, 8, 10, "float32")],
        "images": 300,
        "kernels": [((2, 300), "indices"), ((2, 300), "softmax"), ((2, 300), "loss, prediction")],
        "tests": [[sys.executable, "-c", "print('3 passed, 2 skipped in 0.1s')"]],
        "copy_bytes": 2**20,
    }
