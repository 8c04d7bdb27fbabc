"""Log-probabilities of chosen classes: values and gradients against float64, one and several a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softmax_fused import log_prob
from tests.cases import ULPS, make_indices, make_logits, row_shape
from tests.conftest import GPU_TORCH, INTERPRETER, Place

SHAPES = [(10,), (7, 10), (5, 1), (3, 1003), (2, 6, 40), (2, 19, 3, 3)]


def reference(z: Tensor, classes: Tensor, *, logit_scale: Tensor | float = 1.0, softcap: float | None = None) -> Tensor:
    """The definition, in float64."""
    dim = min(z.ndim - 1, 1)
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.double().unsqueeze(dim)
    x = z.double() * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    several = classes if classes.ndim == z.ndim else classes.unsqueeze(dim)
    ignored = several == -100
    found = torch.log_softmax(x, dim).gather(dim, several.masked_fill(ignored, 0)).masked_fill(ignored, 0)
    return found.view(classes.shape)


def make_classes(shape: tuple[int, ...], count: int | None, device: str) -> Tensor:
    """Random classes, `count` a row, some of them ignored, and one named twice; None for one class a row."""
    if count is None:
        return make_indices(shape, device)
    dim = min(len(shape) - 1, 1)
    classes = torch.randint(shape[dim], (*shape[:dim], count, *shape[dim + 1 :]))
    if count > 2:
        classes.narrow(dim, 2, 1).copy_(classes.narrow(dim, 0, 1))
        classes.narrow(dim, 1, 1).masked_fill_(torch.rand(classes.narrow(dim, 1, 1).shape) < 0.5, -100)
    return classes.to(device)


def assert_right(place: Place, z: Tensor, classes: Tensor, dtype: torch.dtype | None = None, **options: Any) -> None:
    """Compare the log-probabilities, and the gradient under a random upstream gradient, with float64."""
    before = z.detach().clone()
    found = log_prob(z, classes, dtype=dtype, backend=place.backend, **options)
    leaf = z.detach().double().requires_grad_()
    truth = reference(leaf, classes, **options)
    assert (found.shape, found.dtype) == (classes.shape, dtype or z.dtype)
    size = max(1.0, leaf.detach().abs().max().item())
    eps = ULPS[found.dtype] * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.detach().double(), truth.detach(), rtol=eps, atol=eps * size)
    g = torch.randn(truth.shape, dtype=torch.float64).to(z.device, found.dtype)
    (grad,) = torch.autograd.grad(found, z, g)
    (exact,) = torch.autograd.grad(truth, leaf, g.double())
    eps = ULPS[z.dtype] * torch.finfo(z.dtype).eps
    assert (grad.shape, grad.dtype) == (z.shape, z.dtype)
    torch.testing.assert_close(grad.double(), exact, rtol=eps, atol=eps * max(1, exact.abs().max().item()))
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("count", [None, 1, 4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(place: Place, shape: tuple[int, ...], dtype: torch.dtype, count: int | None) -> None:
    assert_right(place, make_logits(shape, dtype, place.device), make_classes(shape, count, place.device))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logit_scale", [0.3, -2.0])
@pytest.mark.parametrize("shape", [(7, 11), (3, 333)], ids=str)
def test_scaled_and_capped(place: Place, shape: tuple[int, ...], logit_scale: float, softcap: float | None) -> None:
    for dtype in (torch.float32, torch.float64):
        z = make_logits(shape, dtype, place.device)
        assert_right(place, z, make_classes(shape, 3, place.device), logit_scale=logit_scale, softcap=softcap)


@pytest.mark.parametrize("count", [None, 3], ids=str)
@pytest.mark.parametrize("shape", [(7, 11), (3, 333), (2, 11, 3)], ids=str)
def test_a_scale_for_each_row(place: Place, shape: tuple[int, ...], count: int | None) -> None:
    z, scale = make_logits(shape, torch.float32, place.device), torch.randn(row_shape(shape)).to(place.device)
    assert_right(place, z, make_classes(shape, count, place.device), logit_scale=scale)
    assert_right(place, z, make_classes(shape, count, place.device), logit_scale=scale, softcap=4.0)


@pytest.mark.parametrize("count", [None, 3], ids=str)
def test_float32_of_16_bit_logits(place: Place, count: int | None) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        if place == INTERPRETER and dtype is torch.bfloat16:
            continue  # it cuts the gradient off where a GPU rounds
        z = make_logits((5, 300), dtype, place.device)
        assert_right(place, z, make_classes((5, 300), count, place.device), dtype=torch.float32)


def test_the_gradient_of_16_bit_logits_is_rounded_once(place: Place) -> None:
    """Where p is 0.999, 1 and p apart would be rounded to 16 bits before they cancel."""
    z = torch.zeros(4, 10)
    z[:, 3] = 9.0
    z = z.to(place.device, torch.float16).requires_grad_()
    classes = torch.tensor([[3, 3]] * 4, device=place.device)
    (grad,) = torch.autograd.grad(log_prob(z, classes, dtype=torch.float32, backend=place.backend).sum(), z)
    leaf = z.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(leaf, classes).sum(), leaf)
    torch.testing.assert_close(grad.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", ["classes first", "gaps"])
def test_layouts(place: Place, layout: str) -> None:
    z = make_logits((6, 300), torch.float32, place.device).detach()
    z = z.t().contiguous().t() if layout == "classes first" else z.repeat_interleave(2, 1)[:, ::2]
    classes = make_classes((6, 300), 3, place.device)
    assert_right(place, z.requires_grad_(), classes.t().contiguous().t() if layout == "gaps" else classes)


@pytest.mark.parametrize("count", [None, 3], ids=str)
def test_second_derivatives(place: Place, count: int | None) -> None:
    z, classes = make_logits((3, 5), torch.float64, place.device, 1.0), make_classes((3, 5), count, place.device)
    quick = {"fast_mode": place == INTERPRETER}
    scale = torch.tensor([0.5, 1.0, -2.0], dtype=z.dtype, device=place.device)
    for options in ({}, {"logit_scale": 0.7, "softcap": 4.0}, {"logit_scale": scale}):
        function = lambda x: log_prob(x, classes, backend=place.backend, **options)  # noqa: B023, E731 - called here
        assert torch.autograd.gradcheck(function, (z,), **quick)
        assert torch.autograd.gradgradcheck(function, (z,), **quick)


def test_torch_func_and_compile(place: Place) -> None:
    z, classes = make_logits((3, 5), torch.float64, place.device).detach(), make_classes((3, 5), 3, place.device)

    def total(x: Tensor) -> Tensor:
        return log_prob(x, classes, softcap=4.0, backend=place.backend).exp().sum()

    def exact(x: Tensor) -> Tensor:
        return reference(x, classes, softcap=4.0).exp().sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(total)(z), transform(exact)(z))
    torch.testing.assert_close(torch.compile(total, fullgraph=True, backend="aot_eager")(z), exact(z))
    batches = torch.func.vmap(lambda x, c: log_prob(x, c, backend=place.backend))(z, classes)
    torch.testing.assert_close(batches, reference(z, classes))
    leaf = z.clone().requires_grad_()
    found = log_prob(leaf, classes, backend=place.backend)
    rows = torch.autograd.grad(
        found, leaf, torch.eye(9, dtype=z.dtype).view(9, 3, 3).to(z.device), is_grads_batched=True
    )
    jacobian = torch.func.jacrev(lambda x: reference(x, classes))(z)
    torch.testing.assert_close(rows[0].view(3, 3, 3, 5), jacobian)


def test_rows_of_ignored_classes_have_no_gradient(place: Place) -> None:
    z = make_logits((3, 300), torch.float32, place.device)
    classes = make_classes((3, 300), 4, place.device)
    classes[1] = -100
    if place == GPU_TORCH:
        pytest.skip("torch operations multiply 0 by NaN there: to find such rows, the host would wait")
    with torch.no_grad():
        z[1, 7] = float("nan")
    found = log_prob(z, classes, backend=place.backend)
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert found[1].eq(0).all()
    assert grad[1].eq(0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("count", [None, 3], ids=str)
def test_a_class_that_does_not_exist(place: Place, count: int | None) -> None:
    z, classes = make_logits((3, 5), torch.float32, place.device), make_classes((3, 5), count, place.device)
    classes.view(-1)[0] = 5
    if place.device == "cpu" and (count or place.backend == "torch"):
        with pytest.raises(IndexError, match="target must hold class indices from 0 to 4 or ignore_index"):
            log_prob(z, classes, backend=place.backend)
    elif count or place.backend == "triton":
        found = log_prob(z, classes, backend=place.backend)
        assert found.view(-1)[0].isnan()
        assert found.view(-1)[1:].isfinite().all()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"shape \(2,\) or \(2, K\) for logits of shape \(2, 4\); got a int64"),
        (torch.zeros(2, 3), "classes must be an int64 tensor of shape"),
        (torch.zeros(3, 3, dtype=torch.long), "classes must be an int64 tensor of shape"),
        ([0, 1], "classes must be an int64 tensor of shape"),
    ],
    ids=str,
)
def test_errors_say_what_was_expected(classes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_prob(torch.zeros(2, 4), classes)
    with pytest.raises(ValueError, match="logits must be a tensor of shape"):
        log_prob(torch.tensor(1.0), torch.tensor(0))
    with pytest.raises(ValueError, match="softcap must be a positive number"):
        log_prob(torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long), softcap=-1.0)


def test_no_digit_is_lost_to_the_size_of_the_logits(place: Place) -> None:
    """A float32 near 1000 has 6e-5 to spare; what is near the log-sum-exp keeps the digits of the difference."""
    z = (torch.randn(6, 300) * 3 + 1000).to(place.device).requires_grad_()
    classes = torch.cat([z.detach().topk(3, 1).indices, make_classes((6, 300), 3, place.device)], 1)
    found, truth = log_prob(z, classes, backend=place.backend), reference(z.detach(), classes)
    torch.testing.assert_close(found.detach().double(), truth, rtol=2e-7, atol=1e-6)
    leaf = z.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(found.sum(), z)
    (exact,) = torch.autograd.grad(reference(leaf, classes).sum(), leaf)
    torch.testing.assert_close(grad.double(), exact, rtol=2e-6, atol=2e-6)
