"""What the pytest-benchmark suites share: parameters by device, and a case handed to the benchmark fixture.

pytest-benchmark runs one provider after the other and times until the device is done, the host included. The ratios in
docs/performance.md come from bench.cpu and bench.gpu, where providers take turns; on a GPU their figures, which are the
device's alone, are added here as extra information.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import pytest
import torch

from bench.cases import JOBS, Case, Inputs
from bench.clocks import CpuClock, CudaClock
from bench.measure import counts, rates, time_in_turns, timing, warm_up
from bench.providers import PROVIDERS, Unavailable

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from bench.clocks import Clock

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def cases(on_cpu: list[Case], on_gpu: list[Case]) -> pytest.MarkDecorator:
    """Parametrize `device` and `case`."""
    here = [pytest.param("cpu", case, id=f"cpu-{case}") for case in on_cpu]
    there = [pytest.param("cuda", case, id=f"cuda-{case}", marks=gpu) for case in on_gpu]
    return pytest.mark.parametrize(("device", "case"), here + there)


def providers(mode: str) -> pytest.MarkDecorator:
    """Parametrize `provider` with those that have the mode."""
    return pytest.mark.parametrize("provider", [name for name, it in PROVIDERS.items() if mode in it.modes])


@functools.cache
def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def run(benchmark: BenchmarkFixture, provider: str, mode: str, case: Case, device: str) -> None:
    """Time one provider; skip with the reason where it cannot do the case."""
    clock = clock_of(device)
    clock.release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what compilers and rivals warn of while they start is theirs
        try:
            loss = PROVIDERS[provider].build(case, device)
        except Unavailable as reason:
            pytest.skip(str(reason))
        job = warm_up(JOBS[mode](loss, Inputs(case, device), PROVIDERS[provider].overwrites))

    def prepare() -> None:
        job.prepare()
        clock.flush()
        clock.synchronize()

    def call() -> None:
        job.call()
        clock.synchronize()

    benchmark.group = f"{device} {case} {mode}"
    benchmark.extra_info.update(provider=provider, mode=mode, shape=case.shape, dtype=str(case.dtype), device=device)
    if device == "cuda":
        times = time_in_turns({provider: job}, clock, calls=1, until=0)[provider]
        figures = timing(times, None)
        figures |= rates(case, mode, figures["p50_us"], None)
        figures |= {key: count() for key, count in counts(job, case, mode, clock).items()}
        benchmark.extra_info.update(figures)
    benchmark.pedantic(call, setup=prepare, rounds=min(500, max(10, 2_000_000 // case.logits)))
