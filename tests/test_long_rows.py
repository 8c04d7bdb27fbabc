"""Rows of many classes: blocks, their ends, the labelled class anywhere, rows that begin anywhere, rows in parts."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from softmax_fused import cross_entropy
from softmax_fused.backends.triton import tiles
from tests.cases import assert_right, make_indices, make_logits, make_probabilities
from tests.conftest import Place

EDGE = 128  # float32, one warp: what a masked step takes
CLASSES = [257, EDGE * 3 - 1, EDGE * 3, EDGE * 3 + 1, EDGE * 9 - 1, EDGE * 9, EDGE * 9 + 1, 2055]


@pytest.mark.parametrize("classes", CLASSES)
def test_around_block_ends(kernels: Place, classes: int) -> None:
    logits, target = (
        make_logits((5, classes), torch.float32, kernels.device),
        make_indices((5, classes), kernels.device),
    )
    assert_right(kernels, logits, target, reduction="none")
    assert_right(kernels, logits, target, label_smoothing=0.1)


@pytest.mark.parametrize("classes", [384, 387])
def test_the_labelled_class_anywhere(kernels: Place, classes: int) -> None:
    ends = [i * EDGE + j for i in range(4) for j in (-2, -1, 0, 1, 2)]
    target = torch.tensor([label for label in ends if 0 <= label < classes] + [classes - 1], device=kernels.device)
    logits = make_logits((len(target), classes), torch.float32, kernels.device)
    assert_right(kernels, logits, target, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_rows_that_begin_anywhere(kernels: Place, dtype: torch.dtype, offset: int) -> None:
    base = make_logits((4, 1033), dtype, kernels.device)
    logits = base.detach()[:, offset : offset + 1021].requires_grad_()
    assert_right(kernels, logits, make_indices((4, 1021), kernels.device), reduction="none")


@pytest.mark.parametrize("option", [{}, {"grad_in_forward": True}], ids=str)
@pytest.mark.parametrize(
    "overlapping",
    [
        lambda: torch.randn(320).unfold(0, 300, 1),
        lambda: torch.randn(4, 300, 1).expand(4, 300, 3),
        lambda: torch.randn(1, 300).expand(5, 300),
    ],
    ids=["unfolded", "expanded behind the classes", "expanded rows"],
)
def test_logits_whose_elements_share_memory(kernels: Place, overlapping: Callable[[], Tensor], option: dict) -> None:
    with torch.device(kernels.device):  # a copy to a device would share nothing
        logits = overlapping().requires_grad_()  # their gradient lies otherwise than they
    assert logits.stride(1) == 1
    assert_right(kernels, logits, make_indices(tuple(logits.shape), kernels.device), reduction="sum", **option)


@pytest.fixture
def programs(request: pytest.FixtureRequest, kernels: Place) -> Iterator[None]:
    """Split rows over so many programs in all."""
    with tiles.override(target_programs=request.param):
        yield


@pytest.mark.parametrize("programs", [1, 8, 64], indirect=True)
@pytest.mark.usefixtures("programs")
def test_rows_in_parts(kernels: Place) -> None:
    for classes in (3071, 4096):
        logits = make_logits((3, classes), torch.float32, kernels.device)
        target = make_indices((3, classes), kernels.device)
        weight = torch.rand(classes, device=kernels.device)
        assert_right(kernels, logits, target, reduction="none")
        assert_right(kernels, logits, target, weight, label_smoothing=0.1)
        assert_right(kernels, logits, make_probabilities((3, classes), torch.float32, kernels.device))
        target[1] = -100
        assert_right(kernels, logits, target)


@pytest.mark.parametrize("programs", [1, 8], indirect=True)
@pytest.mark.usefixtures("programs")
def test_confident_rows_keep_their_digits(kernels: Place) -> None:
    for label in (0, 700, 2047):
        logits = torch.zeros(1, 2048, device=kernels.device)
        logits[0, label] = 30.0
        logits.requires_grad_()
        target = torch.tensor([label], device=kernels.device)
        loss = cross_entropy(logits, target, backend="triton")
        (grad,) = torch.autograd.grad(loss, logits)
        others = 2047 * torch.tensor(-30.0, dtype=torch.float64).exp()
        torch.testing.assert_close(loss.double().cpu(), others.log1p(), rtol=1e-5, atol=0)
        torch.testing.assert_close(grad[0, label].double().cpu(), -others / (1 + others), rtol=1e-5, atol=0)


@pytest.mark.parametrize("programs", [1, 8], indirect=True)
@pytest.mark.usefixtures("programs")
def test_minus_infinity_and_the_lowest_numbers(kernels: Place) -> None:
    lowest = torch.finfo(torch.float32).min
    logits = make_logits((7, 1500), torch.float32, kernels.device).detach()
    logits[0, :1400] = -torch.inf  # whole blocks
    logits[1, 100:] = -torch.inf
    logits[2] = lowest  # uniform, as torch has it
    logits[3, ::2] = lowest
    logits[4] = -lowest
    logits[5] = -torch.inf  # NaN
    logits[6, 3] = torch.inf  # NaN
    target = torch.tensor([1450, 50, 7, 1, 9, 3, 3], device=kernels.device)
    assert_right(kernels, logits.requires_grad_(), target, reduction="none")


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": True}], ids=["apart", "together"])
@pytest.mark.parametrize("classes", [10, 1000, 1500])
def test_nan_at_the_target_class_alone(kernels: Place, classes: int, options: dict[str, bool]) -> None:
    logits = make_logits((3, classes), torch.float32, kernels.device).detach()
    target = torch.tensor([classes // 2, classes - 1, 0], device=kernels.device)
    logits[0, classes // 2] = torch.nan
    logits.requires_grad_()
    loss = cross_entropy(logits, target, reduction="sum", backend="triton", **options)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert grad.isnan().all(1).tolist() == [True, False, False]
    assert not grad[1:].isnan().any()


def test_ignored_rows_are_not_read(kernels: Place) -> None:
    logits = make_logits((4, 1501), torch.float32, kernels.device).detach()
    logits[1:3] = torch.nan
    target = torch.tensor([5, -100, -100, 1500], device=kernels.device)
    loss = cross_entropy(logits.requires_grad_(), target, backend="triton")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert (grad[1:3] == 0).all()
    assert (grad[[0, 3]] != 0).all()


def test_nothing_is_written_around_a_row(kernels: Place) -> None:
    base = torch.zeros(3, 1600, device=kernels.device).requires_grad_()
    made = base * 1
    cross_entropy(
        made[:, 37:1538], make_indices((3, 1501), kernels.device), backend="triton", inplace_backward=True
    ).backward()
    assert (made[:, :37] == 0).all()
    assert (made[:, 1538:] == 0).all()
    assert (made[:, 37:1538] != 0).all()
