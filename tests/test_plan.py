"""Launch plans: decided once for a signature, launched without Triton's dispatch, and never for other memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from softmax_fused import CrossEntropyLoss, cross_entropy, cross_entropy_rows, softmax
from softmax_fused.backends.triton import cross_entropy as triton_cross_entropy
from softmax_fused.backends.triton import plan, tiles
from softmax_fused.backends.triton.plan import Launch
from tests.cases import make_indices, make_logits
from tests.conftest import Place

ROOT = Path(__file__).parents[1]


def test_compiled_launches() -> None:
    """On a driver that remembers what it was to launch; see launches.py."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "tests/launches.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


# The library's own launches, in Triton's interpreter or on a GPU


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is launched."""
    found: list[Launch] = []
    real = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: (found.append(self), real(self, *tensors))[1])
    return found


def loss_and_gradient(logits: torch.Tensor, **options: Any) -> None:
    target = make_indices(tuple(logits.shape), logits.device.type)
    cross_entropy(logits, target, backend="triton", **options).backward()


def outputs_of_rows(logits: torch.Tensor) -> None:
    rows = cross_entropy_rows(logits, make_indices(tuple(logits.shape), logits.device.type), backend="triton")
    (rows.loss + rows.entropy).sum().backward()


def softmax_and_gradient(logits: torch.Tensor) -> None:
    softmax(logits, 1, backend="triton").square().sum().backward()


CALLS = {
    "loss": loss_and_gradient,
    "loss with gradient": lambda logits: loss_and_gradient(logits, grad_in_forward=True),
    "rows": outputs_of_rows,
    "softmax": softmax_and_gradient,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(6, 10), (3, 200)], ids=str)
def test_unaligned_memory_has_launches_of_its_own(
    kernels: Place, used: list[Launch], name: str, shape: tuple[int, int]
) -> None:
    memory = torch.randn(shape[0] * shape[1] + 1, device=kernels.device)
    aligned, unaligned = (memory[start:][: shape[0] * shape[1]].view(shape) for start in (0, 1))
    assert aligned.data_ptr() % 16 == 0
    launches = []
    for logits in (aligned, unaligned, aligned, unaligned):
        used.clear()
        CALLS[name](logits.detach().requires_grad_())
        launches.append([id(it) for it in used])
    assert launches[:2] == launches[2:]
    assert launches[0][0] != launches[1][0]
    if name != "softmax":  # whose backward reads the output, which is aligned in any case
        assert not set(launches[0]) & set(launches[1])


def test_other_tile_sizes_make_other_plans(kernels: Place, used: list[Launch]) -> None:
    logits = make_logits((2, 5000), torch.float32, kernels.device)
    for programs in (8, 1):
        with tiles.override(target_programs=programs):
            loss_and_gradient(logits)
    forward, _, other, _ = used
    assert forward.programs > other.programs == 2


@pytest.mark.parametrize("shape", [(600, 10), (2, 5000)], ids=str)
def test_tickets_are_given_back(kernels: Place, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    shared = torch.zeros(1, dtype=torch.int32, device=kernels.device)
    monkeypatch.setattr(Launch, "ticket", lambda _: shared)
    logits, target = make_logits(shape, torch.float32, kernels.device), make_indices(shape, kernels.device)
    losses = [cross_entropy(logits, target, backend="triton") for _ in range(2)]
    assert shared.item() == 0
    assert torch.equal(*losses)


def test_a_decision_holds_under_its_circumstances_alone(kernels: Place, used: list[Launch]) -> None:
    shape = (4, 10)
    logits, target = make_logits(shape, torch.bfloat16, kernels.device), make_indices(shape, kernels.device)
    for _ in range(2):
        assert cross_entropy(logits, target, backend="triton").dtype is torch.bfloat16
        with torch.autocast(kernels.device, torch.bfloat16):
            assert cross_entropy(logits, target, backend="triton").dtype is torch.float32
    used.clear()
    cross_entropy(logits, target, backend="torch")
    assert not used


def test_plans_are_bounded(kernels: Place) -> None:
    kept = triton_cross_entropy.plan_loss.cache_info()
    assert kept.maxsize == plan.PLANS


def test_few_frames_lie_between_the_module_and_the_launch(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[list[str]] = []
    real = Launch.__call__

    def record(self: Launch, *tensors: Any) -> None:
        frame, chain = sys._getframe(1), []
        while frame is not None and not frame.f_code.co_filename.endswith("modules.py"):
            if "softmax_fused" in frame.f_code.co_filename:
                chain.append(frame.f_code.co_name)
            frame = frame.f_back
        chains.append(chain[::-1])
        real(self, *tensors)

    logits, target = make_logits((6, 10), torch.float32, kernels.device), make_indices((6, 10), kernels.device)
    monkeypatch.setattr(Launch, "__call__", record)
    with torch.no_grad():
        CrossEntropyLoss(backend="triton")(logits, target)
    CrossEntropyLoss(backend="triton")(logits, target)
    assert chains == [["cross_entropy", "loss"], ["cross_entropy", "forward", "loss"]]  # and Launch.__call__ itself


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 10), (600, 10), (5, 1500), (2, 5000)], ids=str)
def test_few_tensors_are_allocated(
    kernels: Place, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], reduction: str
) -> None:
    made: list[str] = []

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if "softmax_fused" in sys._getframe(1).f_code.co_filename:  # and not in Triton's interpreter
                made.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    logits, target = make_logits(shape, torch.float32, kernels.device), make_indices(shape, kernels.device)
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")):
        count(owner, name)
    with torch.no_grad():
        cross_entropy(logits, target, reduction=reduction, backend="triton")
    cross_entropy(logits, target, reduction=reduction, backend="triton")  # decides
    made.clear()
    loss = cross_entropy(logits, target, reduction=reduction, backend="triton")
    assert made == ["empty_like", "new_empty"]  # the loss, and scratch memory
    made.clear()
    upstream = torch.ones_like(loss)
    triton_gradient = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    assert made == ["empty_strided", "empty_like", "empty_like"]  # of the plan, and the gradient
    made.clear()
    assert torch.equal(torch.autograd.grad(loss, logits, upstream)[0], triton_gradient[0])
    assert made == ["empty_like"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    def test_streams_side_by_side(self) -> None:
        problems = []
        for seed in range(4):
            torch.manual_seed(seed)
            logits = torch.randn(5000, 1000, device="cuda")
            target = torch.randint(1000, (5000,), device="cuda")
            problems.append((logits, target, cross_entropy(logits, target, backend="torch")))
        streams = [torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        losses: list[list[torch.Tensor]] = [[] for _ in problems]
        for _ in range(20):
            for stream, (logits, target, _), found in zip(streams, problems, losses, strict=True):
                with torch.cuda.stream(stream):
                    found.append(cross_entropy(logits, target))
        torch.cuda.synchronize()
        for (_, _, expected), found in zip(problems, losses, strict=True):
            for loss in found:
                torch.testing.assert_close(loss, expected)

    def test_unaligned_views(self) -> None:
        memory = torch.randn(64 * 1000 + 1, device="cuda", dtype=torch.bfloat16)
        target = torch.randint(1000, (64,), device="cuda")
        for start in (0, 1, 0, 1):
            logits = memory[start:][: 64 * 1000].view(64, 1000)
            expected = torch.nn.functional.cross_entropy(logits.float(), target)
            torch.testing.assert_close(cross_entropy(logits, target).float(), expected, rtol=1e-2, atol=1e-2)

    def test_profiler_hooks_see_every_launch(self) -> None:
        if plan.VERSION < (3, 4):
            pytest.skip("Triton before 3.4 has no knobs")
        logits, target = torch.randn(64, 1000, device="cuda"), torch.randint(1000, (64,), device="cuda")
        cross_entropy(logits, target)
        seen: list[Any] = []
        hook = triton.knobs.runtime.launch_enter_hook
        triton.knobs.runtime.launch_enter_hook = seen.append
        try:
            for _ in range(3):
                cross_entropy(logits, target)
        finally:
            triton.knobs.runtime.launch_enter_hook = hook
        assert len(seen) == 3
