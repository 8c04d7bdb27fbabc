"""The loss alone, its gradient alone, and both, of logits (N, C): `make bench ARGS="-k 'loss and both and 32000'"`."""

import pytest

pytest.importorskip("pytest_benchmark")

from pytest_benchmark.fixture import BenchmarkFixture

from bench import cpu, gpu, suite
from bench.cases import Case


def rows(cases: list[Case]) -> list[Case]:
    return [case for case in cases if len(case.shape) == 2 and "both" in case.modes and case.operation == "loss"]


CASES = suite.cases(rows(cpu.CASES), rows(gpu.CASES))


@suite.providers("forward")
@CASES
def bench_loss_forward(benchmark: BenchmarkFixture, device: str, case: Case, provider: str) -> None:
    suite.run(benchmark, provider, "forward", case, device)


@suite.providers("backward")
@CASES
def bench_loss_backward(benchmark: BenchmarkFixture, device: str, case: Case, provider: str) -> None:
    suite.run(benchmark, provider, "backward", case, device)


@suite.providers("both")
@CASES
def bench_loss_both(benchmark: BenchmarkFixture, device: str, case: Case, provider: str) -> None:
    suite.run(benchmark, provider, "both", case, device)
