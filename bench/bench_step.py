"""A whole training step of softmax regression, batch 256, 784 -> 10: zero_grad, forward, loss, backward, SGD step."""

import pytest

pytest.importorskip("pytest_benchmark")

from pytest_benchmark.fixture import BenchmarkFixture

from bench import suite
from bench.cases import STEP, Case


@suite.providers("step")
@suite.cases([STEP], [STEP])
def bench_training_step(benchmark: BenchmarkFixture, device: str, case: Case, provider: str) -> None:
    suite.run(benchmark, provider, "step", case, device)
