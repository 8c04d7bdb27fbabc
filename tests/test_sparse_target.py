"""Targets of K classes a row: what the dense probabilities give, in every function that takes a target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    SparseTarget,
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    patch,
    sparse_target,
)
from softmax_fused.backends import sparse as operations
from tests.cases import ULPS, crossed, make_logits, row_shape
from tests.conftest import INTERPRETER, Place

SHAPES = [(10,), (7, 10), (5, 333), (3, 1003), (2, 19, 3, 3)]


def make_target(shape: tuple[int, ...], count: int, dtype: torch.dtype, device: str) -> SparseTarget:
    """Random classes and probabilities; some entries and whole rows are ignored, one class is named twice."""
    dim = min(len(shape) - 1, 1)
    of_entries = (*shape[:dim], count, *shape[dim + 1 :])
    classes = torch.randint(shape[dim], of_entries)
    if count > 2:
        classes.narrow(dim, 2, 1).copy_(classes.narrow(dim, 0, 1))
        classes.narrow(dim, 1, 1).masked_fill_(torch.rand(classes.narrow(dim, 1, 1).shape) < 0.5, -100)
    if len(shape) > 1:
        classes[-1] = -100
    probabilities = torch.rand(of_entries, dtype=torch.float64).softmax(dim)
    return sparse_target(classes.to(device), probabilities.to(device, dtype))


def dense(target: SparseTarget, shape: tuple[int, ...]) -> Tensor:
    """The same target with a probability of each class, in float64."""
    dim, valid = min(len(shape) - 1, 1), target.classes != -100
    t = torch.zeros(shape, dtype=torch.float64, device=target.classes.device)
    shares = target.probabilities.double().masked_fill(~valid, 0)
    return t.scatter_add(dim, target.classes.masked_fill(~valid, 0), shares)


def kept(target: SparseTarget) -> Tensor:
    """Which rows name a class."""
    return (target.classes != -100).any(min(target.classes.ndim - 1, 1))


def losses_of(z: Tensor, target: SparseTarget, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """Torch's loss of each row for the dense target, 0 for rows that name no class."""
    w = None if weight is None else weight.to(z.dtype)
    t = dense(target, tuple(z.shape)).to(z.dtype)
    losses = F.cross_entropy(z, t, w, reduction="none", label_smoothing=label_smoothing)
    return losses.masked_fill(~kept(target), 0)


def reduced(losses: Tensor, target: SparseTarget, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / (kept(target).sum() if reduction == "mean" else 1)


@crossed(
    shape=SHAPES,
    count=[1, 3, 8],
    dtype=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
    reduction=["mean", "sum", "none"],
    options=[{}, {"label_smoothing": 0.1}],
    weighted=[False, True],
)
def test_loss_and_gradient(
    place: Place, shape: tuple[int, ...], count: int, dtype: torch.dtype, reduction: str, options: dict[str, float],
    weighted: bool,
) -> None:  # fmt: skip
    if place == INTERPRETER and dtype is torch.bfloat16:
        pytest.skip("it cuts the gradient off where a GPU rounds")
    z, target = make_logits(shape, dtype, place.device), make_target(shape, count, dtype, place.device)
    weight = torch.rand(shape[min(len(shape) - 1, 1)]).to(place.device, dtype) if weighted else None
    loss = cross_entropy(z, target, weight, reduction=reduction, backend=place.backend, **options)
    leaf = z.detach().double().requires_grad_()
    truth = reduced(losses_of(leaf, target, weight, options.get("label_smoothing", 0.0)), target, reduction)
    assert (loss.shape, loss.dtype) == (truth.shape, dtype)
    eps = ULPS[dtype] * torch.finfo(dtype).eps
    size = max(1.0, z.detach().abs().max().item())
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=eps, atol=size * eps)
    g = torch.randn(loss.shape, dtype=torch.float64).to(z.device, dtype)
    (grad,), (exact,) = torch.autograd.grad(loss, z, g), torch.autograd.grad(truth, leaf, g.double())
    assert (grad.shape, grad.dtype) == (z.shape, dtype)
    torch.testing.assert_close(
        grad.double(), exact, rtol=eps, atol=eps * exact.abs().max().item() + 1e-7 * (eps > 1e-4)
    )


def test_no_digit_is_lost_to_the_size_of_the_logits(place: Place) -> None:
    """Within 1.5 times torch's error with the dense target: a logsumexp of 500 has 3e-5 to spare in float32."""
    z = (torch.randn(8, 300) * 5 + 500).to(place.device).requires_grad_()
    p, classes = (z.detach() + torch.randn(8, 300, device=place.device)).softmax(1).topk(6, 1)
    target, leaf = sparse_target(classes, p), z.detach().double().requires_grad_()
    ours = cross_entropy(z, target, reduction="none", backend=place.backend)
    torchs = F.cross_entropy(z, dense(target, (8, 300)).float(), reduction="none")
    truth = losses_of(leaf, target, None, 0.0)
    (exact,) = torch.autograd.grad(truth.sum(), leaf, retain_graph=True)
    errors = [(it.detach().double() - truth.detach()).abs().max() for it in (ours, torchs)]
    slopes = [(torch.autograd.grad(it.sum(), z)[0].double() - exact).abs().max() for it in (ours, torchs)]
    for mine, theirs in (errors, slopes):
        assert mine <= 1.5 * theirs + 2e-7


def test_one_class_with_all_of_the_probability_is_a_class_index(place: Place) -> None:
    z = make_logits((50, 40), torch.float32, place.device)
    labels = torch.randint(40, (50,), device=place.device)
    labels[::7] = -100
    target = sparse_target(labels.unsqueeze(1), torch.ones(50, 1, device=place.device))
    for reduction in ("mean", "sum", "none"):
        found = cross_entropy(z, target, reduction=reduction, backend=place.backend)
        expected = cross_entropy(z, labels, reduction=reduction, backend=place.backend)
        torch.testing.assert_close(found, expected)
        (mine,) = torch.autograd.grad(found.sum(), z)
        torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), z)[0])


def test_16_bit_gradients_are_rounded_once(place: Place) -> None:
    """Where student and teacher agree, p - t would be lost if p were rounded first."""
    if place == INTERPRETER:
        pytest.skip("its gradients of other classes are cut off where a GPU rounds")
    z = torch.randn(64, 300).mul(2).bfloat16().to(place.device).requires_grad_()
    p, classes = (z.detach().float() + 0.01).softmax(1).topk(8, 1)
    target = sparse_target(classes, p * torch.linspace(0.99, 1.01, 64, device=z.device).unsqueeze(1))
    (grad,) = torch.autograd.grad(cross_entropy(z, target, reduction="sum", backend=place.backend), z)
    leaf = z.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(losses_of(leaf, target, None, 0.0).sum(), leaf)
    torch.testing.assert_close(grad.gather(1, classes).double(), exact.gather(1, classes), rtol=2**-8, atol=1e-6)


@crossed(
    shape=[(7, 10), (5, 333), (2, 19, 3, 3)],
    transform=[{}, {"logit_scale": 0.5, "softcap": 2.0}, {"logit_scale": "each row's"}],
    options=[{}, {"label_smoothing": 0.1}],
    weighted=[False, True],
    outputs=[("loss", "entropy"), ("loss", "logsumexp", "prediction", "entropy"), ("entropy", "prediction"), ("loss",)],
    backend=["auto", "its own"],
)
def test_rows(
    place: Place, shape: tuple[int, ...], transform: dict[str, Any], options: dict[str, float], weighted: bool,
    outputs: tuple[str, ...], backend: str,
) -> None:  # fmt: skip
    z, target = make_logits(shape, torch.float32, place.device), make_target(shape, 4, torch.float32, place.device)
    weight = torch.rand(shape[1], device=place.device) if weighted else None
    scale: Any = transform.get("logit_scale", 1.0)
    if scale == "each row's":
        scale = torch.rand(row_shape(shape), device=place.device) + 0.5
    rows = cross_entropy_rows(
        z, target, weight, logit_scale=scale, softcap=transform.get("softcap"), outputs=outputs,
        backend=place.backend if backend == "its own" else "auto", **options,
    )  # fmt: skip
    leaf = z.detach().double().requires_grad_()
    x = leaf * (scale if isinstance(scale, float) else scale.double().unsqueeze(1))
    x = x if "softcap" not in transform else 2 * torch.tanh(x / 2)
    log_p = x.log_softmax(1)
    truth = {
        "loss": losses_of(x, target, weight, options.get("label_smoothing", 0.0)),
        "logsumexp": x.logsumexp(1),
        "prediction": x.argmax(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
    }
    assert [name for name, it in rows._asdict().items() if it is not None] == [n for n in rows._fields if n in outputs]
    total, exact = torch.zeros((), device=z.device), torch.zeros((), device=z.device, dtype=torch.float64)
    for name in outputs:
        torch.testing.assert_close(
            getattr(rows, name).detach().to(truth[name].dtype), truth[name].detach(), rtol=1e-5, atol=2e-5
        )
        if name != "prediction":
            g = torch.randn(row_shape(shape), device=z.device)
            total, exact = total + (g * getattr(rows, name)).sum(), exact + (g.double() * truth[name]).sum()
    (grad,), (expected,) = torch.autograd.grad(total, z), torch.autograd.grad(exact, leaf)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=2e-5)


@crossed(
    kind=["loss", "rows"],
    reduction=["mean", "none"],
    transform=[{}, {"logit_scale": 0.5, "softcap": 2.0}],
    options=[{}, {"label_smoothing": 0.1}],
    weighted=[False, True],
    way=["small", "chunks", "compiled", "one row"],
)
def test_linear(
    place: Place, kind: str, reduction: str, transform: dict[str, float], options: dict[str, float], weighted: bool,
    way: str,
) -> None:  # fmt: skip
    shape = (40,) if way == "one row" else (9, 40)
    x = torch.randn(*shape[:-1], 8, device=place.device, requires_grad=True)
    w, b = (
        torch.randn(40, 8, device=place.device).requires_grad_(),
        torch.randn(40, device=place.device).requires_grad_(),
    )
    target = make_target(shape, 4, torch.float32, place.device)
    weight = torch.rand(40, device=place.device) if weighted else None
    where = {"backend": "auto"} if way == "small" else {"backend": place.backend, "chunk_rows": 4}

    def compute(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        common = {"linear_bias": b, "weight": weight, **transform, **options, **where}
        if kind == "rows":
            return reduced(linear_cross_entropy_rows(x, w, target, **common).loss, target, reduction)
        return linear_cross_entropy(x, w, target, reduction=reduction, **common)

    found = (
        torch.compile(compute, fullgraph=True, backend="aot_eager")(x, w, b) if way == "compiled" else compute(x, w, b)
    )
    tensors = [it.detach().double().requires_grad_() for it in (x, w, b)]
    logits = F.linear(*tensors)
    logits = 2 * torch.tanh(0.5 * logits / 2) if transform else logits
    truth = reduced(losses_of(logits, target, weight, options.get("label_smoothing", 0.0)), target, reduction)
    torch.testing.assert_close(found.detach().double(), truth.detach(), rtol=1e-5, atol=2e-5)
    g = torch.randn(found.shape, device=x.device)
    grads, exact = torch.autograd.grad(found, (x, w, b), g), torch.autograd.grad(truth, tensors, g.double())
    for mine, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_that_name_no_class_take_part_in_no_product_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmax_fused.functional import chunked_linear

    sizes: list[int] = []
    project = chunked_linear.project
    monkeypatch.setattr(chunked_linear, "project", lambda *args: (sizes.append(len(args[0])), project(*args))[1])
    classes = torch.randint(40, (9, 4))
    classes[:6] = -100
    target = sparse_target(classes, torch.rand(9, 4))
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    linear_cross_entropy(x, w, target, chunk_rows=100).backward()
    rows = linear_cross_entropy_rows(x, w, target, chunk_rows=100)
    rows.loss.sum().backward()
    assert sizes == [3, 3, 3]
    assert not x.grad[:6].any()


def test_derivatives_of_every_order(place: Place) -> None:
    z = make_logits((2, 4), torch.float64, place.device, scale=1.0)
    target, weight = make_target((2, 4), 3, torch.float64, place.device), torch.rand(4, device=place.device).double()

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(z, target, weight, label_smoothing=0.1, reduction="none", backend=place.backend)

    def rows(z: Tensor) -> tuple[Tensor, ...]:
        found = cross_entropy_rows(
            z, target, weight, label_smoothing=0.1, softcap=2.0, outputs=("loss", "entropy"), backend=place.backend
        )
        return found.loss, found.entropy

    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)
    assert torch.autograd.gradcheck(rows, z)
    assert torch.autograd.gradgradcheck(rows, z)


def test_transforms_and_compile(place: Place) -> None:
    z, target = make_logits((6, 11), torch.float32, place.device), make_target((6, 11), 3, torch.float32, place.device)

    def loss(z: Tensor, *target: Tensor) -> Tensor:
        return cross_entropy(z, SparseTarget(*target), label_smoothing=0.1, backend=place.backend)

    (grad,) = torch.autograd.grad(loss(z, *target), z)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, *target), loss(z, *target))
    torch.testing.assert_close(torch.autograd.grad(compiled(z, *target), z)[0], grad)
    leaf = z.detach()
    torch.testing.assert_close(torch.func.grad(loss)(leaf, *target), grad)
    _, along = torch.func.jvp(lambda z: loss(z, *target), (leaf,), (torch.ones_like(leaf),))
    torch.testing.assert_close(along, grad.sum(), atol=1e-6, rtol=1e-4)
    each = torch.func.vmap(lambda z, *t: cross_entropy(z, SparseTarget(*t)))(leaf[:5], *(it[:5] for it in target))
    torch.testing.assert_close(each, cross_entropy(leaf, target, reduction="none")[:5])


def test_the_loss_can_be_differentiated_by_the_probabilities(place: Place) -> None:
    z, target = make_logits((6, 11), torch.float64, place.device), make_target((6, 11), 3, torch.float64, place.device)
    p = target.probabilities.requires_grad_()
    by_p = -z.detach().log_softmax(1).gather(1, target.classes.clamp(min=0)).masked_fill(target.classes == -100, 0)
    for compute in (
        lambda: cross_entropy(z, target, reduction="sum", backend=place.backend),
        lambda: cross_entropy_rows(z, target, outputs=("loss",), backend=place.backend).loss.sum(),
    ):
        torch.testing.assert_close(torch.autograd.grad(compute(), p)[0], by_p)
    head = torch.eye(11, dtype=torch.float64, device=place.device)
    loss = linear_cross_entropy(z, head, target, reduction="sum", chunk_rows=2, backend=place.backend)
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], by_p)


def test_modules_and_patch(place: Place) -> None:
    z, target = make_logits((6, 11), torch.float32, place.device), make_target((6, 11), 3, torch.float32, place.device)
    expected = cross_entropy(z, target, label_smoothing=0.1)
    torch.testing.assert_close(CrossEntropyLoss(label_smoothing=0.1, backend=place.backend)(z, target), expected)
    with patch():
        torch.testing.assert_close(F.cross_entropy(z, target, label_smoothing=0.1), expected)
    head = LinearCrossEntropyLoss(11, 11, label_smoothing=0.1, backend=place.backend, device=place.device)
    torch.testing.assert_close(head(z, target), cross_entropy(head.linear(z), target, label_smoothing=0.1))


def test_types_of_the_loss(place: Place) -> None:
    z, target = make_logits((6, 11), torch.float16, place.device), make_target((6, 11), 3, torch.float32, place.device)
    for backend in ("auto", place.backend):
        assert cross_entropy(z, target, backend=backend).dtype is torch.float32  # promoted, as with dense probabilities
        assert cross_entropy(z, target, dtype=torch.float16, backend=backend).dtype is torch.float16
        half = SparseTarget(target.classes, target.probabilities.half())
        assert cross_entropy(z, half, backend=backend).dtype is torch.float16
        rows = cross_entropy_rows(z, half, outputs=("loss", "entropy"), dtype=torch.float32, backend=backend)
        assert {rows.loss.dtype, rows.entropy.dtype} == {torch.float32}
        with torch.autocast(place.device, torch.bfloat16):
            assert cross_entropy(z, half, backend=backend).dtype is torch.float32


def test_ignored_rows_may_hold_anything(place: Place) -> None:
    z = make_logits((6, 300), torch.float32, place.device).detach()
    z[2, ::2], z[4] = torch.nan, -torch.inf
    z.requires_grad_()
    target = make_target((6, 300), 3, torch.float32, place.device)
    target.classes[2] = target.classes[4] = -100
    for backend in ("auto", place.backend):
        loss = cross_entropy(z, target, label_smoothing=0.1, backend=backend)
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        if backend == place.backend:
            assert not grad[[2, 4, 5]].any()
    assert cross_entropy(z, SparseTarget(target.classes[2:3].expand(6, 3), target.probabilities)).isnan()  # 0 / 0


def test_a_share_of_0_meets_a_probability_of_0(place: Place) -> None:
    z = torch.tensor([[0.0, -torch.inf, 1.0]], device=place.device, requires_grad=True)
    classes = torch.tensor([[0, 1]], device=place.device)
    for backend in ("auto", place.backend):
        target = sparse_target(classes, torch.tensor([[1.0, 0.0]], device=place.device))
        loss = cross_entropy(z, target, backend=backend)
        torch.testing.assert_close(loss, cross_entropy(z, classes[:, 0]))
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
        target = sparse_target(classes, torch.tensor([[0.9, 0.1]], device=place.device))
        assert cross_entropy(z, target, backend=backend).item() == torch.inf


def test_many_classes_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    label, share = torch.randint(5, (6, 9, 2)), torch.rand(6, 9, 2)
    expected = torch.where(label.unsqueeze(1) == label.unsqueeze(2), share.unsqueeze(1), 0).sum(2)
    for pairs in (2**22, 200, 1):
        monkeypatch.setattr(operations, "MOST_PAIRS", pairs)
        torch.testing.assert_close(operations.sum_of_same_class(label, share, 1), expected)


def test_layouts(place: Place) -> None:
    target = make_target((6, 200), 3, torch.float32, place.device)
    z = torch.randn(200, 6, device=place.device).t().requires_grad_()
    apart = SparseTarget(target.classes.t().contiguous().t(), target.probabilities.t().contiguous().t())
    found = cross_entropy(z, apart, backend=place.backend)
    expected = losses_of(z.double(), target, None, 0.0).sum() / kept(target).sum()
    torch.testing.assert_close(found.double(), expected)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0])


def test_errors(place: Place) -> None:
    classes, p = torch.zeros(4, 2, dtype=torch.int64, device=place.device), torch.rand(4, 2, device=place.device)
    z = torch.randn(4, 5, device=place.device)
    with pytest.raises(TypeError, match="classes must be a tensor; got list"):
        sparse_target([[0]], p)
    expected = "a sparse target must have int64 classes and floating point probabilities of one shape; got"
    for wrong in ((classes.int(), p), (classes, p.long()), (classes, p[:3])):
        with pytest.raises(ValueError, match=expected):
            sparse_target(*wrong)
    target = sparse_target(classes, p)
    expected = r"a sparse target must have shape \(3, K\) on .* for logits of shape \(3, 5\); got a int64 tensor of"
    head = torch.randn(5, 5, device=place.device)
    for call in (
        lambda **options: cross_entropy(z[:3], target, **options),
        lambda **options: cross_entropy_rows(z[:3], target, outputs=("loss",), **options),
        lambda **options: linear_cross_entropy(z[:3], head, target, **options),
        lambda **options: linear_cross_entropy_rows(z[:3], head, target, **options),
    ):
        with pytest.raises(ValueError, match=expected):
            call(backend=place.backend)
    for outputs in ("log_prob", "rank"):
        with pytest.raises(ValueError, match=f"'{outputs}' in outputs needs class indices as the target"):
            cross_entropy_rows(z, target, outputs=(outputs,), backend=place.backend)
        with pytest.raises(ValueError, match=f"'{outputs}' in outputs needs class indices as the target"):
            linear_cross_entropy_rows(z, head, target, outputs=(outputs,), chunk_rows=2, backend=place.backend)
    with pytest.raises(RuntimeError, match=r"weight must be a float32 tensor of shape \(5,\)"):
        cross_entropy(z, target, torch.ones(4, device=place.device), backend=place.backend)
    with pytest.raises(RuntimeError, match="label_smoothing must be a number of at most 1"):
        cross_entropy(z, target, label_smoothing=2.0, backend=place.backend)
    with pytest.raises(TypeError, match="input must be a tensor; got str"):
        cross_entropy("z", target)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_class_that_does_not_exist(backend: str) -> None:
    z, p = torch.randn(4, 5), torch.rand(4, 2)
    target = sparse_target(torch.tensor([[0, 1], [-100, 5], [2, 3], [4, 4]]), p)
    for call in (
        lambda: cross_entropy(z, target, backend=backend),
        lambda: cross_entropy_rows(z, target, outputs=("loss",), backend=backend),
        lambda: linear_cross_entropy(z, torch.eye(5), target, chunk_rows=2, backend=backend),
    ):
        with pytest.raises(
            IndexError, match=r"target must hold class indices from 0 to 4 or ignore_index \(-100\); got 5"
        ):
            call()


def test_a_tensor_with_one_dimension_more_is_no_sparse_target() -> None:
    with pytest.raises(RuntimeError, match="target must have shape"):
        cross_entropy(torch.randn(4, 5), torch.rand(4, 2, 3).double())
