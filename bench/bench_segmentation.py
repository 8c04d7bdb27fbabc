"""Loss and gradient of logits (N, C, H, W), a class a pixel: classes are strided, pixels contiguous."""

import pytest

pytest.importorskip("pytest_benchmark")

from pytest_benchmark.fixture import BenchmarkFixture

from bench import cpu, gpu, suite
from bench.cases import LOSS_MODES, Case


def images(cases: list[Case]) -> list[Case]:
    return [case for case in cases if len(case.shape) == 4]


@pytest.mark.parametrize("mode", LOSS_MODES)
@suite.providers("forward")
@suite.cases(images(cpu.CASES), images(gpu.CASES))
def bench_segmentation(benchmark: BenchmarkFixture, device: str, case: Case, mode: str, provider: str) -> None:
    suite.run(benchmark, provider, mode, case, device)
