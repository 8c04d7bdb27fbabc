"""What must hold for any input, drawn at random."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from softmax_fused import cross_entropy
from tests import reference
from tests.cases import make_probabilities, row_shape
from tests.conftest import Place

fixture_is_stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 3, 10, 15, 16, 17, 33])),
    st.tuples(st.integers(1, 4), st.integers(1, 18), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5)),
)


def scattered(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values elsewhere in memory: dimensions in another order, gaps between neighbours, an offset."""
    order = draw(st.permutations(range(x.ndim)))
    gap = draw(st.integers(1, 3))
    wide = x.permute(order).unsqueeze(-1).repeat(*[1] * x.ndim, gap)
    return wide[..., draw(st.integers(0, gap - 1))].permute(torch.tensor(order).argsort().tolist()) if x.ndim else x


@st.composite
def calls(draw: st.DrawFn, extreme: bool = False) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, target and options in any combination and layout, with ignored rows; `extreme` adds -inf and offsets."""
    shape = draw(shapes)
    classes = shape[min(len(shape) - 1, 1)]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    logits = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(shape, dtype=torch.float64)
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "weight": torch.rand(classes, dtype=torch.float64) if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        target = make_probabilities(shape, torch.float64, "cpu")
    else:
        target = torch.randint(0, classes, row_shape(shape))
        options["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1, classes, -1]))
        ignored = torch.rand(row_shape(shape)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        target = torch.where(ignored, options["ignore_index"], target)
    if extreme:
        logits = logits + draw(st.sampled_from([0.0, 1e4, -1e4]))
        logits[torch.rand(shape) < draw(st.sampled_from([0.0, 0.0, 0.2]))] = -torch.inf
    return scattered(draw, logits), scattered(draw, target), options


def ours(place: Place, logits: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, gradient and the upstream gradient."""
    leaf = logits.detach().to(place.device).requires_grad_()
    moved = {name: value.to(place.device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = cross_entropy(leaf, target.to(place.device), **moved, backend=place.backend)
    upstream = torch.randn(loss.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.to(place.device, loss.dtype))
    return loss.detach().cpu(), grad.cpu(), upstream


@fixture_is_stateless
@given(call=calls(extreme=True))
def test_equals_the_reference(place: Place, call: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    logits, target, options = call
    loss, grad, upstream = ours(place, logits, target, options)
    truth = reference.cross_entropy(logits, target, upstream=upstream, **options)
    torch.testing.assert_close(loss, truth.loss, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(grad, truth.grad, rtol=1e-11, atol=1e-12, equal_nan=True)


@fixture_is_stateless
@given(call=calls(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_equals_the_reference_in_less_than_double_precision(place: Place, call: Any, dtype: torch.dtype) -> None:
    logits, target, options = call
    if target.is_floating_point():
        target = target.to(dtype)
    if options["weight"] is not None:
        options = options | {"weight": options["weight"].to(dtype)}
    with torch.no_grad():
        logits = logits.to(dtype)
    loss, grad, upstream = ours(place, logits, target, options)
    truth = reference.cross_entropy(logits, target, upstream=upstream.to(dtype), **options)
    assert loss.dtype is grad.dtype is dtype
    eps = 64 * torch.finfo(torch.float32).eps + (2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    size = max(1.0, truth.loss.nan_to_num().abs().max(), truth.grad.nan_to_num().abs().max())
    torch.testing.assert_close(loss.double(), truth.loss, rtol=eps, atol=eps * size, equal_nan=True)
    torch.testing.assert_close(grad.double(), truth.grad, rtol=eps, atol=eps * size, equal_nan=True)


@fixture_is_stateless
@given(call=calls(), shift=st.floats(-1e3, 1e3))
def test_adding_a_constant_to_a_row_changes_nothing(place: Place, call: Any, shift: float) -> None:
    logits, target, options = call
    state = torch.get_rng_state()
    first = ours(place, logits, target, options)
    torch.set_rng_state(state)
    second = ours(place, logits + shift, target, options)
    torch.testing.assert_close(first[:2], second[:2], rtol=1e-9, atol=1e-9, equal_nan=True)


@fixture_is_stateless
@given(call=calls())
def test_gradient_rows_sum_to_zero(place: Place, call: Any) -> None:
    logits, target, options = call
    _, grad, _ = ours(place, logits, target, options)
    sums = grad.nan_to_num().sum(min(logits.ndim - 1, 1))
    torch.testing.assert_close(
        sums, torch.zeros_like(sums), rtol=0, atol=1e-11 * max(1.0, grad.nan_to_num().abs().max())
    )


@fixture_is_stateless
@given(call=calls(), data=st.data())
def test_permuting_classes_permutes_gradients(place: Place, call: Any, data: st.DataObject) -> None:
    logits, target, options = call
    class_dim = min(logits.ndim - 1, 1)
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[class_dim]))))
    state = torch.get_rng_state()
    loss, grad, _ = ours(place, logits, target, options)
    permuted = dict(options, weight=None if options["weight"] is None else options["weight"][order])
    if target.shape == logits.shape:
        moved = target.index_select(class_dim, order)
    else:
        ignore_index = options["ignore_index"]
        inverse = order.argsort()
        moved = torch.where(target == ignore_index, -100, inverse[target.clamp(0, len(order) - 1)])
        permuted["ignore_index"] = -100
    torch.set_rng_state(state)
    permuted_loss, permuted_grad, _ = ours(place, logits.index_select(class_dim, order), moved, permuted)
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-11, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(
        permuted_grad, grad.index_select(class_dim, order), rtol=1e-10, atol=1e-12, equal_nan=True
    )


@fixture_is_stateless
@given(call=calls(), smoothing=st.floats(0, 1))
def test_smoothing_is_affine(place: Place, call: Any, smoothing: float) -> None:
    logits, target, options = call
    none, some, full = (ours(place, logits, target, options | {"label_smoothing": e})[0] for e in (0.0, smoothing, 1.0))
    torch.testing.assert_close(some, (1 - smoothing) * none + smoothing * full, rtol=1e-10, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_rows_change_no_other(place: Place, reduction: str) -> None:
    logits, target = torch.randn(20, 10, dtype=torch.float64), torch.randint(0, 10, (20,))
    live = torch.arange(20) % 3 > 0
    masked = torch.where(live, target, -100)
    options = {"reduction": reduction}
    torch.manual_seed(1)
    loss, grad, _ = ours(place, logits, masked, options)
    torch.manual_seed(1)
    alone, alone_grad, _ = ours(place, logits[live], target[live], options)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad[live], alone_grad)
    assert (grad[~live] == 0).all()
