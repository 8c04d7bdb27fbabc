"""Softmax, its gradient, and both, of logits (N, C); on a CPU ours is torch's own."""

import pytest

pytest.importorskip("pytest_benchmark")

from pytest_benchmark.fixture import BenchmarkFixture

from bench import cpu, gpu, suite

SOFTMAX = [case._replace(operation="softmax") for case in cpu.LARGE_CASES]
CASES = suite.cases(SOFTMAX, [case for case in gpu.CASES if case.operation == "softmax"])


@suite.providers("forward")
@CASES
def bench_softmax_forward(benchmark: BenchmarkFixture, device: str, case: suite.Case, provider: str) -> None:
    suite.run(benchmark, provider, "forward", case, device)


@suite.providers("backward")
@CASES
def bench_softmax_backward(benchmark: BenchmarkFixture, device: str, case: suite.Case, provider: str) -> None:
    suite.run(benchmark, provider, "backward", case, device)


@suite.providers("both")
@CASES
def bench_softmax_both(benchmark: BenchmarkFixture, device: str, case: suite.Case, provider: str) -> None:
    suite.run(benchmark, provider, "both", case, device)
