"""Extreme logits: what torch gives, without losing digits, and a bad row touches no other."""

import pytest
import torch
import torch.nn.functional as F

from softmax_fused import cross_entropy
from tests import reference
from tests.cases import assert_right, make_indices, make_logits, make_probabilities
from tests.conftest import INTERPRETER, Place

INF = float("inf")


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda z: z * 1e4, id="times 1e4"),
        pytest.param(lambda z: z + 1e4, id="plus 1e4"),
        pytest.param(lambda z: z - 1e4, id="minus 1e4"),
        pytest.param(lambda z: z * 0 - 200, id="all -200"),
        pytest.param(lambda z: z * 1e-40, id="subnormal"),
        pytest.param(lambda z: z * 0 + torch.finfo(z.dtype).max, id="all max"),
        pytest.param(lambda z: z * 0 + torch.finfo(z.dtype).min, id="all min"),
    ],
)
def test_extreme_logits(place: Place, change: object, smoothing: float, probabilities: bool) -> None:
    with torch.no_grad():
        logits = change(make_logits((9, 70), torch.float32, place.device)).requires_grad_()
    make = make_probabilities((9, 70), torch.float32, place.device)
    target = make if probabilities else make_indices((9, 70), place.device)
    assert_right(place, logits, target, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("value", [-INF, INF, torch.nan])
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_a_bad_row_touches_no_other(place: Place, value: float, probabilities: bool) -> None:
    logits = make_logits((6, 12), torch.float32, place.device)
    make = make_probabilities((6, 12), torch.float32, place.device)
    target = make if probabilities else make_indices((6, 12), place.device)
    with torch.no_grad():
        logits[2] = value
    loss = cross_entropy(logits, target, reduction="none", backend=place.backend)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    others = [0, 1, 3, 4, 5]
    assert loss[2].isnan()
    assert grad[2].isnan().all()
    clean = logits[others].detach().requires_grad_()
    expected = cross_entropy(clean, target[others], reduction="none", backend=place.backend)
    assert torch.equal(loss[others], expected)
    assert torch.equal(grad[others], torch.autograd.grad(expected, clean, torch.ones_like(expected))[0])


@pytest.mark.parametrize("value", [INF, torch.nan])
def test_one_bad_logit_spoils_its_row(place: Place, value: float) -> None:
    logits = make_logits((3, 12), torch.float32, place.device)
    with torch.no_grad():
        logits[1, 5] = value
    loss = cross_entropy(logits, make_indices((3, 12), place.device), reduction="none", backend=place.backend)
    assert loss.isnan().tolist() == [False, True, False]


def test_an_infinite_weight_spoils_the_rows_of_its_class(place: Place) -> None:
    logits = make_logits((6, 12), torch.float32, place.device)
    target, weight = torch.arange(6, device=place.device), torch.ones(12, device=place.device)
    weight[1] = INF
    (grad,) = torch.autograd.grad(cross_entropy(logits, target, weight, backend=place.backend), logits)
    assert grad[1].isnan().all()
    assert grad[[0, 2, 3, 4, 5]].eq(0).all()


def test_minus_infinity_at_the_target(place: Place) -> None:
    logits = torch.tensor([[0.0, -INF, 1.0]], device=place.device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1], device=place.device), backend=place.backend)
    assert loss == INF
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[0.26894143, -1.0, 0.73105857]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes(place: Place, smoothing: float) -> None:
    logits = make_logits((5, 12), torch.float32, place.device)
    target = torch.randint(0, 6, (5,), device=place.device)
    with torch.no_grad():
        logits[:, 6:] = -INF
    loss = cross_entropy(logits, target, label_smoothing=smoothing, backend=place.backend)
    if smoothing:
        assert loss == INF
    else:
        torch.testing.assert_close(loss, F.cross_entropy(logits[:, :6], target))
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    if not smoothing:
        assert (grad[:, 6:] == 0).all()


def test_zero_probability_of_a_masked_class_counts_zero(place: Place) -> None:
    """Torch gives NaN for 0 * (-inf); the limit is 0, and masked vocabularies work with soft targets."""
    logits = make_logits((4, 12), torch.float32, place.device)
    target = make_probabilities((4, 6), torch.float32, place.device)
    target = torch.cat([target, torch.zeros_like(target)], 1)
    with torch.no_grad():
        logits[:, 6:] = -INF
    loss = cross_entropy(logits, target, backend=place.backend)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :6], target[:, :6]))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert F.cross_entropy(logits, target).isnan()


@pytest.mark.parametrize("classes", [12, 300])
def test_zero_weight_of_a_masked_target_class_counts_zero(place: Place, classes: int) -> None:
    logits, weight = make_logits((4, classes), torch.float32, place.device), torch.ones(classes, device=place.device)
    target = torch.tensor([3, 5, 7, 9], device=place.device)
    weight[5] = 0
    with torch.no_grad():
        logits[1, 5] = -INF
    loss = cross_entropy(logits, target, weight, reduction="none", backend=place.backend)
    assert loss[1] == 0
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert (grad[1] == 0).all()
    assert (grad[[0, 2, 3]] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_row_that_begins_with_minus_infinity(place: Place, dtype: torch.dtype) -> None:
    """Whole steps of the running maximum see nothing but -inf."""
    logits = make_logits((2, 45_000), dtype, place.device)
    with torch.no_grad():
        logits[:, :40_000] = -INF
    target = torch.tensor([40_000, 44_999], device=place.device)
    assert_right(place, logits, target, reduction="none")


@pytest.mark.parametrize("rest", [1e-3, 1e-5, 1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("shape", [(3, 10), (2, 9000), (2, 10, 4)], ids=str)
def test_true_class_of_a_confident_row(place: Place, rest: float, shape: tuple[int, ...]) -> None:
    """Its gradient is -(1 - p), here about -rest, right relative to itself; so is the loss."""
    logits = torch.zeros(shape)
    label = torch.full((shape[0], *shape[2:]), 4)
    logits.scatter_(1, label.unsqueeze(1), float(torch.tensor((shape[1] - 1) / rest).log()))
    logits = logits.to(place.device).requires_grad_()
    label = label.to(place.device)
    loss = cross_entropy(logits, label, reduction="none", backend=place.backend)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    truth = reference.cross_entropy(logits, label, reduction="none")
    exact = truth.grad.sum(1) - truth.grad.select(1, 4)  # of the others; theirs sums to that of the true class
    torch.testing.assert_close(grad.select(1, 4).double(), -exact, rtol=1e-5, atol=0)
    if place.backend == "triton":
        torch.testing.assert_close(loss.double(), -torch.log1p(-exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "classes",
    [10, 1000, 50257, *(pytest.param(classes, marks=pytest.mark.slow) for classes in (128256, 150000))],  # more of it
)
def test_error_at_most_half_as_much_again_as_torch(
    place: Place, classes: int, dtype: torch.dtype, smoothing: float
) -> None:
    if dtype is torch.bfloat16 and place == INTERPRETER:
        pytest.skip("Triton's interpreter cuts off where a GPU rounds to bfloat16")
    rows = {10: 64, 1000: 16}.get(classes, 4)
    logits, target = make_logits((rows, classes), dtype, place.device), make_indices((rows, classes), place.device)
    upstream = torch.randn(rows, device=place.device).to(dtype)
    truth = reference.cross_entropy(logits, target, None, -100, "none", smoothing, upstream)

    def errors(loss: torch.Tensor) -> tuple[float, float]:
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        return (loss.double() - truth.loss).abs().max().item(), (grad.double() - truth.grad).abs().max().item()

    ours = errors(cross_entropy(logits, target, reduction="none", label_smoothing=smoothing, backend=place.backend))
    torchs = errors(F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing))
    last_place = torch.finfo(torch.float32).eps
    assert ours[0] <= 1.5 * torchs[0] + last_place * truth.loss.abs().max().item()
    assert ours[1] <= 1.5 * torchs[1] + last_place * truth.grad.abs().max().item()


SHAPES = {"short": (6, 10), "classes apart": (3, 10, 2), "long": (3, 300), "in parts": (2, 1100)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
@pytest.mark.parametrize(
    ("probabilities", "smoothing"),
    [(False, 0.0), (False, 0.1), (True, 0.1)],
    ids=["indices", "smoothed indices", "probabilities"],
)
def test_infinite_class_weight(place: Place, shape: tuple[int, ...], probabilities: bool, smoothing: float) -> None:
    """As torch: the loss infinite, the gradient NaN in its class, and NaN where torch has NaN only."""
    z = make_logits(shape, torch.float32, "cpu").detach()
    z[0, 1] = 9  # the maximum, hence z - m = 0
    target = make_probabilities(shape, torch.float32, "cpu") if probabilities else make_indices(shape, "cpu") % 9 + 1
    if not probabilities:
        target[0], target[1] = 1, 2
    weight = torch.rand(shape[1]) + 0.5
    weight[1] = INF
    for reduction in ("none", "sum", "mean") if shape == SHAPES["short"] else ("none", "mean"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        expected_logits, logits = (z.to(device).requires_grad_() for device in ("cpu", place.device))
        expected = F.cross_entropy(expected_logits, target, weight, **options)
        here = target.to(place.device), weight.to(place.device)
        loss = cross_entropy(logits, *here, backend=place.backend, **options)
        upstream = torch.rand(expected.shape) + 0.5
        (expected_grad,) = torch.autograd.grad(expected, expected_logits, upstream)
        (grad,) = torch.autograd.grad(loss, logits, upstream.to(place.device))
        for got, torchs in ((loss.detach().cpu(), expected.detach()), (grad.cpu(), expected_grad)):
            known = ~torchs.isnan()
            torch.testing.assert_close(got[known], torchs[known])
        assert reduction == "mean" or expected.isinf().any()


def test_infinite_weight_of_a_class_in_a_confident_row(place: Place) -> None:
    """The logarithm of the sum is 0 in rounded numbers, the loss of an unlikely class is not."""
    logits = torch.tensor([[0.0, 200.0, 0.0]], device=place.device)
    weight = torch.tensor([1.0, 1.0, INF], device=place.device)
    label = torch.tensor([1], device=place.device)
    assert F.cross_entropy(logits, label, weight, reduction="sum", label_smoothing=0.1) == INF
    options = {"reduction": "sum", "label_smoothing": 0.1, "backend": place.backend}
    assert cross_entropy(logits, label, weight, **options) == INF
    logits[0, 0] = torch.nan
    assert cross_entropy(logits, label, weight, **options).isnan()


@shapes
def test_float64_probabilities_of_bfloat16_logits(kernels: Place, shape: tuple[int, ...]) -> None:
    logits = make_logits(shape, torch.bfloat16, kernels.device)
    target = make_probabilities(shape, torch.float64, kernels.device)
    assert_right(kernels, logits, target, reduction="none")
    assert_right(kernels, logits, target, grad_in_forward=True)


def test_mean_over_a_million_rows(place: Place) -> None:
    rows = 100_000 if place == INTERPRETER else 1_000_000  # minutes, there
    logits = make_logits((rows, 2), torch.float32, place.device)
    target = make_indices((rows, 2), place.device)
    loss = cross_entropy(logits, target, backend=place.backend).double()
    torch.testing.assert_close(loss, reference.cross_entropy(logits, target).loss, rtol=3e-7, atol=0)


def test_an_index_out_of_range_makes_its_row_nan(kernels: Place) -> None:
    logits = make_logits((5, 10), torch.float32, kernels.device)
    for wrong in (10, -1, 2**40, -(2**40)):
        target = torch.tensor([1, 2, wrong, 4, -100], device=kernels.device)
        loss = cross_entropy(logits, target, reduction="none", backend="triton")
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert loss.isnan().tolist() == [False, False, True, False, False]
        assert grad.isnan().all(1).tolist() == [False, False, True, False, False]
        mean = cross_entropy(logits, target, backend="triton")
        assert mean.isnan()
        assert torch.autograd.grad(mean, logits)[0].isnan().any(1).tolist() == [False, False, True, False, False]
