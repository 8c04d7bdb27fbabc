"""Slices of the classes, their statistics and terms brought together here instead of by ranks, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import functional
from softmax_fused._autograd import Spec, make_spec
from softmax_fused._slices import slice_operations
from tests import reference
from tests.conftest import Place
from tests.ranks import assert_close, part_of, problem

SHAPES = {(5, 23): [2, 0, 20, 1], (3, 6, 7): [1, 5], (2, 3, 4, 5): [3], (2, 700): [150, 550], (300, 5): [4, 1]}


def computed(
    place: Place,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: Spec,
    sizes: list[int],
    upstream: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each slice's loss, all alike, and gradient."""
    module = slice_operations(functional.operations(place.backend, logits.device))
    spec = spec._replace(classes=logits.shape[1])
    slices = []
    for rank, size in enumerate(sizes):
        z = part_of(logits, sizes, rank, 1)
        t = target if spec.indices else part_of(target, sizes, rank, 1)
        w = None if weight is None else part_of(weight, sizes, rank, 0)
        it = spec._replace(first=sum(sizes[:rank]))
        slices.append((z, module.prepare(z, t, it), w, it))
        assert z.shape[1] == size
    parts = [module.statistics(z, t, w, it) for z, t, w, it in slices]
    m = torch.stack([part[0] for part in parts]).amax(0)
    sums = sum(module.terms(part, m, z, t, w, it) for part, (z, t, w, it) in zip(parts, slices, strict=True))
    losses, grads = [], []
    for z, t, w, it in slices:
        loss, saved = module.close(sums, m, z, t, w, it)
        losses.append(loss)
        grads.append(torch.zeros(z.shape, dtype=logits.dtype, device=z.device))
        if z.numel():
            module.gradient(upstream, z, t, w, saved, it, grads[-1])
    return losses, grads


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_are_the_whole(place: Place, shape: tuple[int, ...], soft: bool, smoothing: float) -> None:
    for number, reduction in enumerate(("none", "sum", "mean")):
        dtype = (torch.float32, torch.float64)[soft]
        logits, target, weight = (
            it if it is None else it.to(place.device) for it in problem(shape, dtype, soft, number > 0, number)
        )
        upstream = torch.randn((), dtype=torch.float64, device=place.device).expand(
            (shape[0], *shape[2:]) if reduction == "none" else ()
        )
        spec = make_spec(logits, target, reduction, -100, smoothing, dtype)
        losses, grads = computed(place, logits, target, weight, spec, SHAPES[shape], upstream.to(dtype))
        truth = reference.cross_entropy(
            logits, target, weight, upstream=upstream, reduction=reduction, label_smoothing=smoothing
        )
        for rank, (loss, grad) in enumerate(zip(losses, grads, strict=True)):
            assert_close(loss, truth.loss, dtype)
            assert_close(grad, part_of(truth.grad, SHAPES[shape], rank, 1), dtype)


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
    spec = make_spec(logits, target, "none", -100, 0.1, torch.float32)
    here = (tensor.to(kernels.device) for tensor in (logits.detach(), target, weight))
    losses, grads = computed(kernels, *here, spec, SHAPES[shape], upstream.to(kernels.device))
    live = torch.ones(shape[0], dtype=torch.bool) if soft else target != -100
    assert torch.equal(losses[0].cpu(), expected.detach())
    torch.testing.assert_close(torch.cat(grads, 1).cpu()[live], expected_grad[live], equal_nan=True)


@pytest.mark.parametrize("shape", [(5, 23), (2, 700)], ids=str)
def test_float64_probabilities_of_bfloat16_logits(kernels: Place, shape: tuple[int, ...]) -> None:
    logits, target, _ = (
        it if it is None else it.to(kernels.device) for it in problem(shape, torch.float64, True, False, 0)
    )
    logits = logits.to(torch.bfloat16)
    spec = make_spec(logits, target, "sum", -100, 0.0, torch.float64)
    losses, grads = computed(kernels, logits, target, None, spec, SHAPES[shape], target.new_ones(()))
    truth = reference.cross_entropy(logits, target, reduction="sum")
    assert_close(losses[0], truth.loss, torch.float32)
    assert_close(torch.cat(grads, 1), truth.grad, torch.bfloat16)
