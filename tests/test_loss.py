"""Loss and gradient against float64, for every kind of target, argument, shape and dtype."""

import pytest
import torch

from softmax_fused import cross_entropy
from tests.cases import assert_right, crossed, make_indices, make_logits, make_probabilities
from tests.conftest import Place

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# No power of two; one row; one class; classes and rows around a tile; one and several inner dimensions; a long row in
# several steps with a tail; more rows than one program takes.
SHAPES = [(10,), (1, 1), (7, 10), (257, 10), (3, 17, 5), (2, 6, 3, 5), (2, 3, 2, 2, 3), (3, 9000)]


REDUCTIONS = ["mean", "sum", "none"]
KINDS = ["indices", "probabilities"]


def make_target(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return make_probabilities(shape, dtype, device) if kind == "probabilities" else make_indices(shape, device)


@crossed(shape=SHAPES, dtype=DTYPES, reduction=REDUCTIONS, kind=KINDS)
def test_every_shape_and_dtype(
    place: Place, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, kind: str
) -> None:
    logits = make_logits(shape, dtype, place.device)
    assert_right(place, logits, make_target(kind, shape, dtype, place.device), reduction=reduction)


# These four decide the formula together, in each of the kernels' ways through memory: all combinations.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(70, 10), (2, 6, 3, 5), (3, 1500)], ids=str)
def test_weight_and_smoothing(
    place: Place, shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float, kind: str
) -> None:
    weight = torch.rand(shape[1], device=place.device) if weighted else None
    logits, target = (
        make_logits(shape, torch.float32, place.device),
        make_target(kind, shape, torch.float32, place.device),
    )
    assert_right(place, logits, target, weight, reduction=reduction, label_smoothing=smoothing)


@crossed(shape=[(10,), (70, 10), (3, 5000)], reduction=REDUCTIONS, kind=KINDS, weighted=[False, True])
def test_smoothing_alone(place: Place, shape: tuple[int, ...], reduction: str, kind: str, weighted: bool) -> None:
    """With smoothing 1 the target counts no more, but for its row's share of a mean."""
    weight = torch.rand(shape[-1], device=place.device) if weighted else None
    logits, target = (
        make_logits(shape, torch.float32, place.device),
        make_target(kind, shape, torch.float32, place.device),
    )
    assert_right(place, logits, target, weight, reduction=reduction, label_smoothing=1.0)


@crossed(ignore_index=[-100, 0, 3, 9, -1, 10, 2**40, -(2**63)], reduction=REDUCTIONS, smoothing=[0.0, 0.2])
def test_ignored_rows(place: Place, ignore_index: int, reduction: str, smoothing: float) -> None:
    logits, target = make_logits((40, 10), torch.float32, place.device), make_indices((40, 10), place.device)
    target[::3] = ignore_index
    weight = torch.rand(10, device=place.device)
    assert_right(
        place, logits, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing
    )


def test_ignored_rows_hold_anything(place: Place) -> None:
    logits = make_logits((6, 10), torch.float32, place.device)
    target = make_indices((6, 10), place.device)
    with torch.no_grad():
        logits[1], logits[4, 2] = torch.nan, torch.inf
    target[1] = target[4] = -100
    loss = cross_entropy(logits, target, backend=place.backend)
    (grad,) = torch.autograd.grad(loss, logits)
    rows = [0, 2, 3, 5]
    expected = cross_entropy(logits[rows], target[rows], backend=place.backend)
    assert torch.equal(loss, expected)
    assert torch.equal(grad[[1, 4]], torch.zeros(2, 10, device=place.device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_row_ignored(place: Place, reduction: str, smoothing: float) -> None:
    logits = make_logits((5, 10), torch.float32, place.device)
    target = torch.full((5,), -100, device=place.device)
    assert_right(place, logits, target, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_that_sum_to_zero(place: Place, smoothing: float) -> None:
    logits, target = make_logits((5, 4), torch.float32, place.device), torch.zeros(5, dtype=torch.long)
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0], device=place.device)
    loss = cross_entropy(logits, target.to(place.device), weight, label_smoothing=smoothing, backend=place.backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, logits)[0].isnan().all()


def test_uint8_indices(place: Place) -> None:
    logits, target = make_logits((9, 10), torch.float32, place.device), make_indices((9, 10), place.device)
    assert_right(place, logits, target.to(torch.uint8))


def test_mixed_types_promote(place: Place) -> None:
    logits = make_logits((6, 8), torch.bfloat16, place.device)
    target = make_probabilities((6, 8), torch.float32, place.device)
    loss = cross_entropy(logits, target, backend=place.backend)
    assert loss.dtype is torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype is torch.bfloat16
    assert cross_entropy(logits.float(), target.double(), backend=place.backend).dtype is torch.float64


def test_one_hot_probabilities_equal_indices(place: Place) -> None:
    logits, target = make_logits((50, 10), torch.float64, place.device), make_indices((50, 10), place.device)
    one_hot = torch.nn.functional.one_hot(target, 10).double()
    results = []
    for t in (target, one_hot):
        loss = cross_entropy(logits, t, label_smoothing=0.1, backend=place.backend)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-16)


def test_float16_mean_does_not_overflow(place: Place) -> None:
    logits = torch.zeros(6000, 8, device=place.device, dtype=torch.float16)
    logits[:, 0] = 30
    loss = cross_entropy(logits, torch.ones(6000, dtype=torch.long, device=place.device), backend=place.backend)
    assert loss.item() == 30


def test_autocast_gives_float32(place: Place) -> None:
    logits, target = make_logits((9, 10), torch.bfloat16, place.device), make_indices((9, 10), place.device)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        loss = cross_entropy(logits, target, torch.ones(10, device=place.device), backend=place.backend)
    assert loss.dtype is torch.float32
    assert torch.autograd.grad(loss, logits)[0].dtype is torch.bfloat16
    torch.testing.assert_close(loss, cross_entropy(logits.float(), target, backend=place.backend))


def test_deterministic(place: Place) -> None:
    logits, target = make_logits((2, 7, 40, 9), torch.float32, place.device), make_indices((2, 7, 40, 9), place.device)
    runs = []
    for _ in range(2):
        loss = cross_entropy(logits, target, backend=place.backend)
        runs.append((loss, torch.autograd.grad(loss, logits)[0]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
