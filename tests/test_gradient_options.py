"""grad_in_forward and inplace_backward: when and where the gradient is computed, never what it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_fused
from softmax_fused import CrossEntropyLoss, cross_entropy, functional
from softmax_fused.backends.triton import cross_entropy as triton_cross_entropy
from tests.cases import ULPS, crossed, make_indices, make_logits, make_probabilities, row_shape
from tests.conftest import Place

SHAPES = [(10,), (7, 10), (600, 10), (5, 1500), (2, 19, 5, 7)]
OPTIONS = ["grad_in_forward", "inplace_backward"]


def made(leaf: Tensor) -> Tensor:
    """Logits that an operation made, as a network's last layer does."""
    return leaf * 1


def compare(place: Place, option: str, logits: Tensor, target: Tensor, upstream: Tensor | None, **rest: object) -> None:
    """The option's loss and gradient against those without it."""
    expected = cross_entropy(logits, target, backend=place.backend, **rest)
    upstream = torch.ones_like(expected) if upstream is None else upstream
    (right,) = torch.autograd.grad(expected, logits, upstream)
    loss = cross_entropy(made(logits), target, backend=place.backend, **{option: True}, **rest)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    eps = ULPS[logits.dtype] * torch.finfo(logits.dtype).eps
    torch.testing.assert_close(loss, expected, rtol=eps, atol=eps, equal_nan=True)
    torch.testing.assert_close(grad, right, rtol=eps, atol=eps * right.abs().max().item(), equal_nan=True)


@crossed(shape=SHAPES, reduction=["mean", "sum", "none"], option=OPTIONS)
def test_every_upstream_gradient(place: Place, option: str, reduction: str, shape: tuple[int, ...]) -> None:
    logits, target = make_logits(shape, torch.float32, place.device), make_indices(shape, place.device)
    compare(place, option, logits, target, None, reduction=reduction)
    upstream = torch.randn(row_shape(shape) if reduction == "none" else (), device=place.device)
    compare(place, option, logits, target, upstream, reduction=reduction)
    if upstream.ndim:
        upstream.flatten()[::2] = 1
        compare(place, option, logits, target, upstream, reduction=reduction)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(place: Place, option: str, dtype: torch.dtype) -> None:
    for shape in ((7, 10), (3, 1500)):
        logits, target = make_logits(shape, dtype, place.device), make_indices(shape, place.device)
        compare(place, option, logits, target, None)


@crossed(
    kind=["weights and smoothing", "weights", "smoothing alone", "probabilities", "all ignored"],
    shape=[(600, 10), (5, 1500), (2, 19, 5, 7)],
    option=OPTIONS,
)
def test_every_kind_of_target(place: Place, kind: str, shape: tuple[int, ...], option: str) -> None:
    logits, target = make_logits(shape, torch.float32, place.device), make_indices(shape, place.device)
    weight = torch.rand(shape[1], device=place.device) + 0.1
    target.flatten()[::3] = -100
    options = {
        "weights and smoothing": {"weight": weight, "label_smoothing": 0.1},
        "weights": {"weight": weight},
        "smoothing alone": {"label_smoothing": 1.0, "reduction": "sum"},
        "probabilities": {"weight": weight, "label_smoothing": 0.1},
        "all ignored": {},
    }[kind]
    if kind == "probabilities":
        target = make_probabilities(shape, torch.float32, place.device)
    if kind == "all ignored":
        target.fill_(-100)  # a mean of nothing
    compare(place, option, logits, target, None, **options)


@pytest.mark.parametrize("option", OPTIONS)
def test_strided_logits(place: Place, option: str) -> None:
    base, target = make_logits((9, 1700), torch.float32, place.device), make_indices((9, 1500), place.device)
    for take in (lambda z: z[:, 3:1503], lambda z: z[:, :1500]):
        expected = cross_entropy(take(base), target, backend=place.backend)
        (right,) = torch.autograd.grad(expected, base)
        loss = cross_entropy(take(made(base)), target, backend=place.backend, **{option: True})
        torch.testing.assert_close(torch.autograd.grad(loss, base)[0], right)


def test_backward_twice_gives_the_same_gradient_twice(place: Place) -> None:
    logits, target = make_logits((9, 1500), torch.float32, place.device), make_indices((9, 1500), place.device)
    loss = cross_entropy(logits, target, backend=place.backend, grad_in_forward=True)
    first, second, doubled = (
        torch.autograd.grad(loss, logits, torch.tensor(scale, device=place.device), retain_graph=True)[0]
        for scale in (1.0, 1.0, 2.0)
    )
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)
    torch.testing.assert_close(doubled, 2 * first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("option", OPTIONS)
def test_second_derivatives(place: Place, option: str) -> None:
    logits, target = make_logits((9, 1500), torch.float64, place.device), make_indices((9, 1500), place.device)

    def second(**options: bool) -> Tensor:
        (grad,) = torch.autograd.grad(
            cross_entropy(made(logits), target, backend=place.backend, **options), logits, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    torch.testing.assert_close(second(**{option: True}), second())


def test_in_place_writes_over_the_logits(place: Place) -> None:
    leaf, target = make_logits((9, 1500), torch.float32, place.device), make_indices((9, 1500), place.device)
    logits = made(leaf)
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    cross_entropy(logits, target, backend=place.backend, inplace_backward=True).backward()
    assert seen[0].data_ptr() == logits.data_ptr()
    assert torch.equal(logits.detach(), leaf.grad)


def test_in_place_leaves_the_logits_alone_until_backward(place: Place) -> None:
    leaf, target = make_logits((9, 1500), torch.float32, place.device), make_indices((9, 1500), place.device)
    logits = made(leaf)
    cross_entropy(logits, target, backend=place.backend, inplace_backward=True)
    assert torch.equal(logits, leaf)
    assert logits._version == 0


def test_in_place_is_refused_to_whoever_needs_the_logits_later(place: Place) -> None:
    leaf, target = make_logits((9, 1500), torch.float32, place.device), make_indices((9, 1500), place.device)
    logits = made(leaf)
    square = logits.square().sum()
    loss = cross_entropy(logits, target, backend=place.backend, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_needs_logits_that_may_be_overwritten(place: Place) -> None:
    leaf, target = make_logits((9, 1500), torch.float32, place.device), make_indices((9, 1500), place.device)
    with pytest.raises(RuntimeError, match="must not overwrite a leaf"):
        cross_entropy(leaf, target, backend=place.backend, inplace_backward=True)
    with pytest.raises(RuntimeError, match="nor a view of one"):
        cross_entropy(leaf[:, :], target, backend=place.backend, inplace_backward=True)
    wide = made(leaf[:1]).expand(9, 1500)
    with pytest.raises(RuntimeError, match=r"share memory; got strides \(0, 1\)"):
        cross_entropy(wide, target, backend=place.backend, inplace_backward=True)
    cross_entropy(leaf.detach(), target, backend=place.backend, inplace_backward=True)  # no gradient, nothing written


def test_both_at_once_are_refused() -> None:
    logits, target = torch.randn(4, 10), torch.randint(10, (4,))
    with pytest.raises(ValueError, match="exclude each other"):
        cross_entropy(logits, target, grad_in_forward=True, inplace_backward=True)


def test_without_gradient_they_change_nothing(kernels: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_cross_entropy, "loss_and_gradient", None)
    logits, target = make_logits((9, 1500), torch.float32, kernels.device), make_indices((9, 1500), kernels.device)
    with torch.no_grad():
        loss = cross_entropy(logits, target, backend="triton", grad_in_forward=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target).detach())


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_compile(option: str) -> None:
    logits, target = torch.randn(9, 1500, requires_grad=True), torch.randint(1500, (9,))
    compiled = torch.compile(
        lambda z: cross_entropy(z * 1, target, backend="torch", **{option: True}), fullgraph=True, backend="aot_eager"
    )
    (grad,) = torch.autograd.grad(compiled(logits), logits)
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(logits, target), logits)[0])


def test_the_module_passes_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(softmax_fused.modules, "cross_entropy", lambda *args, **options: seen.update(options))
    criterion = CrossEntropyLoss(grad_in_forward=True)
    criterion(torch.randn(4, 10), torch.randint(10, (4,)))
    assert (seen["grad_in_forward"], seen["inplace_backward"]) == (True, False)
    assert repr(criterion) == "CrossEntropyLoss(grad_in_forward=True)"
    assert repr(CrossEntropyLoss(inplace_backward=True)) == "CrossEntropyLoss(inplace_backward=True)"


def test_the_torch_function_protocol_sees_them() -> None:
    seen: dict[str, object] = {}

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.cross_entropy:
                seen.update(kwargs or {})
            return func(*args, **(kwargs or {}))

    with Mode():
        cross_entropy(torch.randn(4, 10), torch.randint(10, (4,)), grad_in_forward=True)
    given = {"backend": "auto", "grad_in_forward": True, "inplace_backward": False}
    assert seen == {"dtype": None, **given, "batch_invariant": False}
