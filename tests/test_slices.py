"""Slices of the classes, their statistics and terms brought together here instead of by ranks, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused._dispatch import get_backend, slice_operations
from softmax_fused._spec import Spec
from softmax_fused.backends.torch.targets import make_spec
from tests import reference
from tests.cases import crossed, make_probabilities
from tests.conftest import CPU, Place
from tests.ranks import assert_close, part_of, problem

SHAPES = {(5, 23): [2, 0, 20, 1], (3, 6, 7): [1, 5], (2, 3, 4, 5): [3], (2, 700): [150, 550], (300, 5): [4, 1]}


def brought_together(
    place: Place, logits: Tensor, target: Tensor, weight: Tensor | None, sizes: list[int], spec: Spec, upstream: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return the loss as each slice has it, and the slice's gradient."""
    operations = slice_operations(get_backend(place.backend, logits.device.type))
    slices = []
    for rank, size in enumerate(sizes):
        z = part_of(logits, sizes, rank, 1)
        t = target if spec.target.has_labels else part_of(target, sizes, rank, 1)
        w = None if weight is None else part_of(weight, sizes, rank, 0)
        it = spec._replace(first=sum(sizes[:rank]))
        slices.append((z, operations.prepare(z, t, it), w, it))
        assert z.shape[1] == size
    parts = [operations.statistics(*each) for each in slices]
    m = torch.stack([part[0] for part in parts]).amax(0)
    sums = sum(operations.terms(part, m, *each) for part, each in zip(parts, slices, strict=True))
    found = []
    for z, t, w, it in slices:
        loss, saved = operations.finalize(sums, m, z, t, w, it)
        grad = torch.zeros(z.shape, dtype=z.dtype, device=z.device)
        if z.numel():
            operations.gradient(upstream.to(z.dtype), z, t, w, saved, it, grad)
        found.append((loss, grad))
    return found


@crossed(
    shape=list(SHAPES),
    reduction=["none", "sum", "mean"],
    soft=[False, True],
    weighted=[False, True],
    smoothing=[0.0, 0.1],
)
def test_slices_are_the_whole(
    place: Place, shape: tuple[int, ...], reduction: str, soft: bool, weighted: bool, smoothing: float
) -> None:
    dtype = (torch.float32, torch.float64)[soft]
    logits, target, weight = (
        it if it is None else it.to(place.device) for it in problem(shape, dtype, soft, weighted, 0)
    )
    sizes = SHAPES[shape]
    spec = make_spec(logits, target, reduction, -100, smoothing, dtype)._replace(classes=shape[1])
    upstream = torch.randn((), dtype=torch.float64, device=place.device).expand(
        (shape[0], *shape[2:]) if reduction == "none" else ()
    )
    truth = reference.cross_entropy(
        logits, target, weight, upstream=upstream, reduction=reduction, label_smoothing=smoothing
    )
    for rank, (loss, grad) in enumerate(brought_together(place, logits, target, weight, sizes, spec, upstream)):
        assert_close(loss, truth.loss, dtype)
        assert_close(grad, part_of(truth.grad, sizes, rank, 1), dtype)


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 1, 5]], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_infinite_weights_do_what_they_do_in_torch(soft: bool, sizes: list[int]) -> None:
    logits = torch.randn(6, 7, dtype=torch.float64)
    logits[:3, 1] = 9  # the class with the infinite weight is the most probable, or not
    target = make_probabilities((6, 7), logits.dtype, "cpu") if soft else torch.tensor([0, 1, 2, 0, 1, 6])
    weight = torch.tensor([1, torch.inf, 1, 0.5, 1, 1, 0], dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        spec = make_spec(logits, target, "none", -100, smoothing, logits.dtype)._replace(classes=7)
        leaf = logits.clone().requires_grad_()
        truth = F.cross_entropy(leaf, target, weight, reduction="none", label_smoothing=smoothing)
        (exact,) = torch.autograd.grad(truth.sum(), leaf)
        found = brought_together(CPU, logits, target, weight, sizes, spec, torch.ones(6))
        for loss, _ in found:
            torch.testing.assert_close(loss, truth.detach())
        torch.testing.assert_close(torch.cat([grad for _, grad in found], 1), exact, equal_nan=True)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(5, 23), (2, 700)], ids=str)
def test_infinite_class_weight(kernels: Place, shape: tuple[int, ...], soft: bool) -> None:
    logits, target, weight = problem(shape, torch.float32, soft, True, 0)
    logits[0, 1] = 9  # the maximum, hence z - m = 0
    weight[1] = torch.inf
    logits.requires_grad_()
    expected = F.cross_entropy(logits, target, weight, label_smoothing=0.1, reduction="none")
    upstream = torch.rand(shape[0]) + 0.5
    (expected_grad,) = torch.autograd.grad(expected, logits, upstream)
    assert expected[0] == torch.inf
    spec = make_spec(logits, target, "none", -100, 0.1, torch.float32)._replace(classes=shape[1])
    here = (tensor.to(kernels.device) for tensor in (logits.detach(), target, weight))
    found = brought_together(kernels, *here, SHAPES[shape], spec, upstream.to(kernels.device))
    live = torch.ones(shape[0], dtype=torch.bool) if soft else target != -100
    assert torch.equal(found[0][0].cpu(), expected.detach())
    grad = torch.cat([grad for _, grad in found], 1)
    torch.testing.assert_close(grad.cpu()[live], expected_grad[live], equal_nan=True)


@pytest.mark.parametrize("shape", [(5, 23), (2, 700)], ids=str)
def test_float64_probabilities_of_bfloat16_logits(kernels: Place, shape: tuple[int, ...]) -> None:
    logits, target, _ = (
        it if it is None else it.to(kernels.device) for it in problem(shape, torch.float64, True, False, 0)
    )
    logits = logits.to(torch.bfloat16)
    spec = make_spec(logits, target, "sum", -100, 0.0, torch.float64)._replace(classes=shape[1])
    found = brought_together(kernels, logits, target, None, SHAPES[shape], spec, target.new_ones(()))
    truth = reference.cross_entropy(logits, target, reduction="sum")
    assert_close(found[0][0], truth.loss, torch.float32)
    assert_close(torch.cat([grad for _, grad in found], 1), truth.grad, torch.bfloat16)
