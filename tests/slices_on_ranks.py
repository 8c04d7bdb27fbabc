"""What ranks run to test the loss of slices: against float64, the collectives counted, the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from softmax_fused import distributed
from tests import reference
from tests.ranks import assert_close, assert_same_everywhere, part_of, problem, slices


def assert_right(
    rank: int,
    sizes: list[int],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    given: bool = False,
    backend: str = "torch",
    **options: Any,
) -> None:
    """Compare loss and the slice's gradient with float64; count the collectives; the inputs stay as they are."""
    dim = min(logits.ndim - 1, 1)
    soft = target.ndim == logits.ndim
    local = part_of(logits, sizes, rank, dim).detach().requires_grad_()
    local_target = part_of(target, sizes, rank, dim) if soft else target
    local_weight = None if weight is None else part_of(weight, sizes, rank, 0)
    version = local._version
    extra = {"sizes": sizes} if given else {}
    with CommDebugMode() as forward:
        loss = distributed.cross_entropy(local, local_target, local_weight, backend=backend, **extra, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, dtype=torch.float64, generator=generator).to(loss.dtype)
    with CommDebugMode() as backward:
        (grad,) = torch.autograd.grad(loss, local, upstream)
    counts = {str(kind): count for kind, count in forward.get_comm_counts().items() if count}
    reduces = sum(count for kind, count in counts.items() if "allreduce" in kind)
    gathers = sum(count for kind, count in counts.items() if "allgather" in kind)
    assert (reduces, gathers, forward.get_total_counts()) == (2, 1 - given, 3 - given), counts
    assert backward.get_total_counts() == 0
    truth = reference.cross_entropy(logits, target, weight, upstream=upstream, **options)
    assert loss.shape == truth.loss.shape
    assert (grad.shape, grad.dtype, loss.dtype) == (local.shape, logits.dtype, logits.dtype)
    assert_close(loss, truth.loss, logits.dtype)
    assert_close(grad, part_of(truth.grad, sizes, rank, dim), logits.dtype)
    assert_same_everywhere(loss, len(sizes))
    assert local._version == version
    assert torch.equal(local.detach().nan_to_num(), part_of(logits, sizes, rank, dim).nan_to_num())


def arguments() -> Iterator[tuple[tuple[int, ...], torch.dtype, bool, bool, dict[str, Any]]]:
    dtypes = (torch.float64, torch.float32)
    for dtype, soft, weighted, reduction, smoothing in itertools.product(
        dtypes, (False, True), (False, True), ("mean", "sum", "none"), (0.0, 0.1)
    ):
        yield (9, 23), dtype, soft, weighted, {"reduction": reduction, "label_smoothing": smoothing}
    for shape in ((23,), (2, 13, 5), (2, 13, 2, 3), (1, 300)):
        for soft in (False, True):
            yield shape, torch.float64, soft, True, {"label_smoothing": 0.1}
            yield shape, torch.float32, soft, False, {"reduction": "none"}
    for dtype in (torch.bfloat16, torch.float16):
        yield (9, 23), dtype, False, True, {"label_smoothing": 0.1}
    yield (9, 23), torch.float32, False, True, {"label_smoothing": 1.0}
    yield (9, 23), torch.float32, False, True, {"ignore_index": 3}


def every_argument(rank: int, world: int) -> None:
    kinds = itertools.cycle(("even", "uneven", "empty"))
    for seed, (shape, dtype, soft, weighted, options) in enumerate(arguments()):
        sizes = slices(shape[min(len(shape) - 1, 1)], world, next(kinds))
        whole = problem(shape, dtype, soft, weighted, seed, options.get("ignore_index", -100))
        try:
            assert_right(rank, sizes, *whole, given=seed % 5 == 0, **options)
        except AssertionError as error:
            raise AssertionError(f"{shape} {dtype} soft={soft} weighted={weighted} {options} {sizes}") from error


def kernels(rank: int, world: int) -> None:
    """The kernels in Triton's interpreter: tiles of rows, pixels, long rows, and long rows in parts."""
    from softmax_fused.backends.triton import tiles

    tiles.use(tiles.tables._replace(target_programs=8, row_block=8))  # several programs, of few rows
    shapes = {(5, 23): "empty", (2, 7, 6): "uneven", (3, 150 * world): "uneven", (1, 600 * world): "even"}
    for (shape, kind), soft, smoothing in itertools.product(shapes.items(), (False, True), (0.0, 0.1)):
        whole = problem(shape, torch.float32, soft, smoothing > 0, 7)
        options = {"label_smoothing": smoothing, "reduction": ("mean", "sum", "none")[(len(shape) + soft) % 3]}
        try:
            assert_right(rank, slices(shape[1], world, kind), *whole, backend="triton", **options)
        except AssertionError as error:
            raise AssertionError(f"{shape} soft={soft} {options}") from error
    assert_right(rank, [4] * world, *problem((5, 4 * world), torch.float64, False, True, 8), backend="triton")
    hard_rows(rank, world, "triton", (torch.float32,))
    confident_rows(rank, world, "triton")
    no_rows(rank, world)


def hard_rows(
    rank: int, world: int, backend: str = "torch", dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
) -> None:
    """Logits at which the maximum, the logarithm or a product with 0 goes wrong first."""
    for dtype, soft in itertools.product(dtypes, (False, True)):
        logits, target, weight = problem((12, 20), dtype, soft, True, 5)
        sizes = [20 // world] * world
        logits[0, : sizes[0]] = -torch.inf  # a slice wholly -inf
        logits[1, sizes[0] :] = -torch.inf  # all but one
        logits[2] = -torch.inf
        logits[3, 7] = torch.nan
        logits[4, 19] = torch.inf
        logits[5] += 1e4
        logits[6] -= 3e4
        logits[7, 11] = 1e30
        if soft:
            target[0, : sizes[0]] = 0
            target[1, sizes[0] :] = 0
        else:
            target[:9] = torch.tensor([19, 0, 5, 3, 0, 10, 10, 11, 4])
        assert_right(rank, sizes, logits, target, weight, reduction="none", backend=backend)
        if not soft:
            target[2:5] = -100  # what ignored rows hold touches nothing
            assert_right(rank, sizes, logits, target, weight, backend=backend)
            assert_right(rank, sizes, logits, torch.full_like(target, -100), weight, backend=backend)
            assert_right(rank, sizes, logits, torch.full_like(target, -100), weight, reduction="sum", backend=backend)
            truth = distributed.cross_entropy(part_of(logits[2:5], sizes, rank, 1), target[2:5], label_smoothing=0.2)
            assert truth.isnan()


def confident_rows(rank: int, world: int, backend: str = "torch") -> None:
    """p = 1 - 1e-9 at the true class: loss and gradient keep their digits in float32, on every rank."""
    logits = torch.full((4, 4 * world), -21.0)
    target = torch.arange(4) * world
    logits[torch.arange(4), target] = 0.0
    local = part_of(logits, [4] * world, rank, 1).detach().requires_grad_()
    losses = distributed.cross_entropy(local, target, reduction="none", backend=backend)
    truth = reference.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(losses.double(), truth.loss, rtol=1e-5, atol=0)
    losses.sum().backward()
    torch.testing.assert_close(local.grad.double(), part_of(truth.grad, [4] * world, rank, 1), rtol=1e-5, atol=0)


def no_rows(rank: int, world: int) -> None:
    local = torch.zeros(0, 3, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    assert distributed.cross_entropy(local, target).isnan()
    total = distributed.cross_entropy(local, target, reduction="sum")
    total.backward()
    assert total == 0
    assert local.grad.shape == (0, 3)
    assert distributed.cross_entropy(local, target, reduction="none").shape == (0,)


def subgroups(rank: int, world: int) -> None:
    """Two groups of two ranks, each with a problem of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    logits, target, _ = problem((6, 8), torch.float64, False, False, rank // 2)
    local = part_of(logits, [3, 5], rank % 2, 1)
    loss = distributed.cross_entropy(local, target, group=groups[rank // 2])
    torch.testing.assert_close(loss, reference.cross_entropy(logits, target).loss)
    with pytest.raises(RuntimeError, match="must contain the calling rank"):
        distributed.cross_entropy(local, target, group=groups[1 - rank // 2])


def second_derivatives(rank: int, world: int) -> None:
    local = torch.randn(3, 4, requires_grad=True)
    loss = distributed.cross_entropy(local, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, local, create_graph=True)


def under_compile(rank: int, world: int) -> None:
    """The graph breaks at the loss, which is computed as ever."""
    local, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 5])
    step = torch.compile(lambda z: 2 * distributed.cross_entropy(z * 3, target), backend="eager")
    truth = 2 * distributed.cross_entropy(local * 3, target)
    loss = step(local)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(it, local)[0] for it in (loss, truth)))


def wrong_on_one_rank(rank: int, world: int) -> None:
    """Every rank raises, the one at fault the error of the whole loss; the group is of use afterwards."""
    logits, target, weight = torch.randn(4, 3), torch.tensor([0, 2, 1, -100]), torch.ones(3)
    right: dict[str, Any] = {"local_logits": logits, "target": target, "weight": weight}
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "target must have shape", {"target": target[:3]}),
        (RuntimeError, "target must have shape", {"target": target.float()}),
        (RuntimeError, "weight must be a float32 tensor of shape", {"weight": torch.ones(4)}),
        (ValueError, "reduction must be", {"reduction": "median"}),
        (RuntimeError, "label_smoothing must be", {"label_smoothing": 1.5}),
        (TypeError, "input must be", {"local_logits": None}),
        (RuntimeError, "must not require a gradient", {"weight": torch.ones(3, requires_grad=True)}),
        (ValueError, "backend must be", {"backend": "cuda"}),
    ]
    for kind, message, change in wrong:
        if rank != 1:
            kind, message, change = RuntimeError, "refused on rank 1: the error is raised there", {}
        with pytest.raises(kind, match=message):
            distributed.cross_entropy(**(right | change))
    differing = [
        ("ignore_index", {"ignore_index": -1}),
        ("class indices", {"target": target.flip(0)}),
        ("dtypes", {"weight": None}),
        ("shape", {"local_logits": logits[:3], "target": target[:3]}),
    ]
    for message, change in differing:
        with pytest.raises(ValueError, match=f"{message}.*the same on every rank; rank 1 differs from rank 0"):
            distributed.cross_entropy(**(right | change if rank == 1 else right))
    with pytest.raises(IndexError, match=f"class indices from 0 to {3 * world - 1}.*got {3 * world}"):
        distributed.cross_entropy(logits, torch.tensor([0, 0, 0, 3 * world]))
    with pytest.raises(RuntimeError, match="at least one class"):
        distributed.cross_entropy(logits[:, :0], target)
    with pytest.raises(IndexError, match="class indices"):
        distributed.cross_entropy(logits, torch.tensor([0, 0, 0, 3 * world]), sizes=[3] * world)
    with pytest.raises(ValueError, match="sizes must hold"):
        distributed.cross_entropy(logits, target, sizes=[2] * world)
    assert distributed.cross_entropy(**right).isfinite()


ALL = (every_argument, hard_rows, confident_rows, no_rows, second_derivatives, wrong_on_one_rank)
