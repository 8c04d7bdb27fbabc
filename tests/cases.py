"""Inputs and comparisons that several test modules share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from softmax_fused import cross_entropy
from tests import reference
from tests.conftest import Place

ULPS = {torch.float64: 64, torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}


def combinations(factors: list[Sequence[Any]]) -> Iterable[Sequence[Any]]:
    try:
        from allpairspy import AllPairs
    except ImportError:
        return itertools.product(*factors)
    return AllPairs(factors)


def crossed(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize over the fewest combinations in which any two values of two factors still meet.

    A fault that takes two values to show is found as by the full product, in a fraction of the cases. Where allpairspy
    is missing, as on a GPU machine without our extras, it is the full product.
    """
    rows = [tuple(row) for row in combinations(list(factors.values()))]
    ids = ["-".join(str(value).replace("torch.", "") for value in row) for row in rows]
    return pytest.mark.parametrize(list(factors), rows, ids=ids)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else ()


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()


def make_indices(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randint(0, shape[min(len(shape) - 1, 1)], row_shape(shape)).to(device)


def make_probabilities(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).softmax(min(len(shape) - 1, 1)).to(device, dtype)


def assert_right(place: Place, logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: object) -> None:
    """Compare loss and gradient, under a random upstream gradient, with float64; the inputs must stay as they are."""
    inputs = [tensor for tensor in (logits, target, weight) if tensor is not None]
    before = [(tensor.detach().clone(), tensor._version) for tensor in inputs]
    loss = cross_entropy(logits, target, weight, backend=place.backend, **options)
    upstream = torch.randn(loss.shape, device=loss.device, dtype=torch.float64).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    ours = ("grad_in_forward", "inplace_backward", "batch_invariant")
    maths = {name: value for name, value in options.items() if name not in ours}
    truth = reference.cross_entropy(logits, target, weight, upstream=upstream, **maths)
    assert loss.shape == truth.loss.shape
    assert (grad.shape, grad.dtype) == (logits.shape, logits.dtype)
    eps = ULPS[logits.dtype] * torch.finfo(logits.dtype).eps
    size = truth.grad.nan_to_num().abs().max().item()
    torch.testing.assert_close(loss.double(), truth.loss, rtol=eps, atol=eps, equal_nan=True)
    torch.testing.assert_close(
        grad.double(), truth.grad, rtol=eps, atol=eps * size + 1e-7 * (eps > 1e-4), equal_nan=True
    )
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(), value.nan_to_num()), "an input was written to"
        assert tensor._version == version
