"""A float32 loss of 16-bit logits without autocast, against float64; float32 class weights with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_rows,
)
from tests import reference
from tests.cases import ULPS, crossed, make_indices, make_logits, make_probabilities
from tests.conftest import INTERPRETER, Place

SHAPES = [(11,), (7, 10), (3, 333), (600, 10), (2, 6, 40)]


def assert_right(z: Tensor, loss: Tensor, truth_of: Any) -> None:
    """Compare the loss, in the precision of its type, and the gradient, in that of the logits, with float64."""
    g = torch.randn(loss.shape, dtype=torch.float64).to(z.device, loss.dtype)
    (grad,) = torch.autograd.grad(loss, z, g)
    truth = truth_of(g)
    eps = ULPS[loss.dtype] * torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.detach().double(), truth.loss, rtol=eps, atol=eps)
    assert grad.dtype is z.dtype
    eps = ULPS[z.dtype] * torch.finfo(z.dtype).eps
    torch.testing.assert_close(grad.double(), truth.grad, rtol=eps, atol=eps * truth.grad.abs().max().item() + 1e-7)


@crossed(
    shape=SHAPES,
    kind=["indices", "weights", "16-bit weights", "probabilities", "float32 probabilities"],
    reduction=["mean", "sum", "none"],
    options=[{}, {"grad_in_forward": True}, {"inplace_backward": True}],
    backend=["auto", "its own"],
    dtype=[torch.float16, torch.bfloat16],
)
def test_float32(
    place: Place, shape: tuple[int, ...], kind: str, reduction: str, options: dict[str, bool], backend: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if place == INTERPRETER and dtype is torch.bfloat16:
        pytest.skip("it cuts the gradient off where a GPU rounds")
    z = make_logits(shape, dtype, place.device)
    of_target = torch.float32 if kind == "float32 probabilities" else dtype
    soft = "probabilities" in kind
    target = make_probabilities(shape, of_target, place.device) if soft else make_indices(shape, place.device)
    classes = shape[min(len(shape) - 1, 1)]
    weight = torch.rand(classes, device=place.device) if "weights" in kind else None
    weight = weight.to(dtype) if kind == "16-bit weights" else weight
    given = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1 * (kind != "indices")}
    loss = cross_entropy(
        z * 1 if "inplace_backward" in options else z, target, **given, **options, dtype=torch.float32,
        backend=place.backend if backend == "its own" else "auto",
    )  # fmt: skip
    assert loss.dtype is torch.float32
    assert_right(z, loss, lambda g: reference.cross_entropy(z, target, **given, upstream=g))


def test_any_type(place: Place) -> None:
    z, target = make_logits((7, 10), torch.float32, place.device), make_indices((7, 10), place.device)
    exact = cross_entropy(z.detach().double(), target)
    for backend in ("auto", place.backend):
        for dtype in (torch.float64, torch.float16, None):
            loss = cross_entropy(z, target, dtype=dtype, backend=backend)
            assert loss.dtype is (dtype or torch.float32)
            torch.testing.assert_close(
                loss.detach().double(), exact, rtol=1e-3 if dtype is torch.float16 else 1e-6, atol=0
            )


def test_as_under_autocast(place: Place) -> None:
    z, target = make_logits((64, 300), torch.bfloat16, place.device), make_indices((64, 300), place.device)
    found = cross_entropy(z, target, dtype=torch.float32, backend=place.backend)
    with torch.autocast(place.device, torch.bfloat16):
        expected = cross_entropy(z, target, backend=place.backend)
        assert torch.equal(CrossEntropyLoss(dtype=torch.float32, backend=place.backend)(z, target), found)
    assert torch.equal(found, expected)
    assert cross_entropy(z, target, backend=place.backend).dtype is torch.bfloat16  # torch's, by default


def test_transforms_and_compile(place: Place) -> None:
    z, target = make_logits((6, 11), torch.float16, place.device), make_indices((6, 11), place.device)
    weight = torch.rand(11, device=place.device)

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(z, target, weight, dtype=torch.float32, backend=place.backend)

    value, (grad,) = loss(z), torch.autograd.grad(loss(z), z)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found in (torch.func.grad(loss)(z.detach()), torch.autograd.grad(compiled(z), z)[0]):
        torch.testing.assert_close(found, grad)
    assert compiled(z).dtype is torch.float32
    torch.testing.assert_close(compiled(z), value)
    auto = torch.compile(lambda z: cross_entropy(z, target, weight, dtype=torch.float32), backend="aot_eager")
    torch.testing.assert_close(auto(z), value)
    (first,) = torch.autograd.grad(loss(z), z, create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), z)
    leaf = z.detach().double().requires_grad_()
    exact = cross_entropy(leaf, target, weight.double())
    (first,) = torch.autograd.grad(exact, leaf, create_graph=True)
    (exact,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(second.double(), exact, rtol=5e-3, atol=1e-4)


@crossed(
    kind=["indices", "weights", "16-bit weights", "probabilities"],
    transform=[(1.0, None), (0.5, 2.0)],
    way=["small", "chunks", "compiled"],
    function=["loss", "rows"],
)
def test_linear(place: Place, kind: str, transform: tuple[float, float | None], way: str, function: str) -> None:
    """The digits are those of the 16-bit logits' float32 loss; by default the loss has 16 bits, as torch's."""
    x = make_logits((9, 8), torch.float16, place.device)
    head = make_logits((40, 8), torch.float16, place.device)
    target = make_indices((9, 40), place.device)
    if kind == "probabilities":
        target = make_probabilities((9, 40), torch.float16, place.device)
    weight = torch.rand(40, device=place.device) if "weights" in kind else None
    weight = weight.half() if weight is not None and "16-bit" in kind else weight
    logit_scale, softcap = transform
    options = {
        "weight": weight, "logit_scale": logit_scale, "softcap": softcap, "dtype": torch.float32,
        "chunk_rows": None if way == "small" else 4, "backend": "auto" if way == "small" else place.backend,
    }  # fmt: skip

    def compute(x: Tensor, head: Tensor) -> Tensor:
        if function == "rows":
            return linear_cross_entropy_rows(x, head, target, **options).loss
        return linear_cross_entropy(x, head, target, **options, reduction="none")

    torch.compiler.reset()  # else one place after the other would reach the limit of recompilations
    found = (
        torch.compile(compute, fullgraph=True, backend="aot_eager")(x, head) if way == "compiled" else compute(x, head)
    )
    assert found.dtype is torch.float32
    exact_product = place.device == "cpu" and way != "small"  # float32 in chunks on a CPU, or the logits' 16 bits
    product = F.linear(*(it.detach().to(torch.float64 if exact_product else torch.float16) for it in (x, head)))
    logits = logit_scale * product.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    of_target = target.double() if kind == "probabilities" else target
    exact = F.cross_entropy(logits, of_target, None if weight is None else weight.double(), reduction="none")
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), (x, head))
    assert [grad.dtype for grad in gradients] == [torch.float16] * 2
    if weight is None or weight.dtype is torch.float16:
        options["dtype"] = None
        assert compute(x, head).dtype is torch.float16


def test_rows_take_float32_weights(place: Place) -> None:
    z, target = make_logits((7, 50), torch.bfloat16, place.device), make_indices((7, 50), place.device)
    weight = torch.rand(50, device=place.device)
    for backend in ("auto", place.backend):
        found = cross_entropy_rows(z, target, weight, outputs=("loss",), dtype=torch.float32, backend=backend).loss
        truth = reference.cross_entropy(z, target, weight=weight, reduction="none")
        torch.testing.assert_close(found.double(), truth.loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="weight must be a bfloat16 tensor"):
        cross_entropy_rows(z, target, weight)


class Marked(torch.Tensor):
    """A subclass that torch's functions know nothing of."""


def test_subclasses_and_modules() -> None:
    z, target = torch.randn(4, 5).half(), torch.tensor([0, 1, 2, 3])
    loss = cross_entropy(z.as_subclass(Marked), target, dtype=torch.float32)
    assert (type(loss), loss.dtype) == (Marked, torch.float32)
    head = LinearCrossEntropyLoss(5, 3, dtype=torch.float16, loss_dtype=torch.float32, softcap=2.0, chunk_rows=2)
    assert head(z, torch.tensor([0, 1, 2, 0])).dtype is torch.float32
    criterion = CrossEntropyLoss(torch.rand(5), dtype=torch.float32)
    assert "dtype=torch.float32" in repr(criterion)
    assert criterion(z, target).dtype is torch.float32


def test_errors() -> None:
    z, target = torch.zeros(2, 3, dtype=torch.float16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"dtype must be a floating point type or None; got torch.int64"):
        cross_entropy(z, target, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"weight must be a float16 tensor of shape \(3,\)"):
        cross_entropy(z, target, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"weight must be a float32 tensor of shape \(3,\), one value a class"):
        cross_entropy(z, target, torch.ones(4), dtype=torch.float32)
