"""The pure-torch operations: both in one sweep, results in the caller's memory, chunks along every dimension."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import cross_entropy
from softmax_fused._spec import Spec
from softmax_fused.backends.torch import chunks
from softmax_fused.backends.torch import cross_entropy as torch_loss
from softmax_fused.backends.torch.targets import make_spec
from tests import reference
from tests.cases import ULPS, make_indices, make_logits, make_probabilities

SHAPES = [(10,), (33, 10), (33, 70), (3, 17, 50), (2, 6, 8, 9)]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, probabilities: bool, reduction: str
) -> tuple[Tensor, Tensor, Spec]:
    logits = make_logits(shape, dtype, "cpu").detach()
    target = make_probabilities(shape, dtype, "cpu") if probabilities else make_indices(shape, "cpu")
    return logits, target, make_spec(logits, target, reduction, -100, 0.1, dtype)


def assert_near(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    eps = ULPS[dtype] * torch.finfo(dtype).eps
    size = truth.abs().max().item()
    torch.testing.assert_close(got.double(), truth, rtol=eps, atol=eps * size + 1e-7 * (eps > 1e-4))


@pytest.fixture(params=[2**22, 64], ids=["one chunk", "many chunks"], autouse=True)
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", request.param)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operation(shape: tuple[int, ...], dtype: torch.dtype, reduction: str, probabilities: bool) -> None:
    logits, target, spec = make(shape, dtype, probabilities, reduction)
    weight = torch.rand(shape[min(len(shape) - 1, 1)], dtype=torch.float64).to(dtype)
    loss, saved, grad = torch_loss.loss_and_gradient(logits, target, weight, spec)
    assert [tuple(s.shape) for s in saved] == torch_loss.saved_shapes(logits, weight, spec)
    one = reference.cross_entropy(logits, target, weight, -100, reduction, 0.1)
    assert_near(loss, one.loss, dtype)
    assert_near(grad, one.grad, dtype)
    ones = torch.ones_like(loss)
    assert torch_loss.rescale_gradient(ones, logits, target, weight, saved, spec, grad) is grad
    upstream = torch.randn(loss.shape).to(dtype)
    truth = reference.cross_entropy(logits, target, weight, -100, reduction, 0.1, upstream).grad
    same = torch_loss.rescale_gradient(upstream, logits, target, weight, saved, spec, grad)
    assert same is grad
    assert_near(grad, truth, dtype)
    separate, kept = torch_loss.loss(logits, target, weight, spec, save=True)
    assert_near(separate, one.loss, dtype)
    assert_near(torch_loss.gradient(upstream, logits, target, weight, kept, spec), truth, dtype)
    assert torch_loss.gradient(upstream, logits, target, weight, kept, spec, logits) is logits
    assert_near(logits, truth, dtype)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["contiguous", "classes first", "gaps"],
)
@pytest.mark.parametrize("shape", [(33, 10), (33, 70), (1, 19, 12, 40), (1, 5, 40, 12), (2, 3, 2, 300)], ids=str)
def test_written_over_the_logits(shape: tuple[int, ...], layout: object) -> None:
    logits, target, spec = make(shape, torch.float32, False, "mean")
    truth = reference.cross_entropy(logits, target, label_smoothing=0.1).grad
    logits = layout(logits)
    _, saved = torch_loss.loss(logits, target, None, spec, save=True)
    torch_loss.gradient(torch.ones(()), logits, target, None, saved, spec, logits)
    assert_near(logits, truth, torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("classes", [slice(None), 0, 1], ids=["every class", "first class", "second class"])
@pytest.mark.parametrize("shape", [(33, 10), (33, 70), (1, 5, 40, 12)], ids=str)
def test_ignored_rows_that_hold_anything(shape: tuple[int, ...], classes: object, value: float) -> None:
    logits, target, spec = make(shape, torch.float32, False, "mean")
    target.view(-1)[::3] = -100
    truth = reference.cross_entropy(logits, target, label_smoothing=0.1)
    logits[:, classes].masked_fill_((target == -100).unsqueeze(1) if classes == slice(None) else target == -100, value)
    loss, _, grad = torch_loss.loss_and_gradient(logits, target, None, spec)
    assert_near(loss, truth.loss, torch.float32)
    assert_near(grad, truth.grad, torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(33, 1), (33, 10), (33, 70), (2, 1, 9), (2, 5, 9)], ids=str)
def test_bad_rows_have_a_bad_gradient(shape: tuple[int, ...], value: float) -> None:
    logits, target, spec = make(shape, torch.float32, False, "none")
    logits[1] = value
    _, saved, grad = torch_loss.loss_and_gradient(logits, target, None, spec)
    ones = torch.ones_like(target, dtype=torch.float32)
    again = torch_loss.gradient(ones, logits, target, None, saved, spec)
    for result in (grad, again):
        assert result[1].isnan().all()
        assert result[0].isfinite().all()
        assert result[2:].isfinite().all()


@pytest.mark.parametrize("create_graph", [False, True], ids=["", "create_graph"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_infinite_weights_do_what_they_do_in_torch(reduction: str, create_graph: bool) -> None:
    """Infinite, NaN and finite in the same places, and the same values where they are finite."""
    logits = torch.randn(6, 7, dtype=torch.float64)
    logits[1] = torch.arange(7).flip(0)  # the class with the infinite weight is neither the first nor the last
    logits[4, 1] = 9  # and here the most probable
    logits.requires_grad_()
    weight = torch.tensor([1, torch.inf, 1, 0.5, 1, 1, 0], dtype=torch.float64)
    indices = torch.tensor([0, 1, 2, 0, 1, 6])
    for target in (indices, F.one_hot(indices, 7).double(), make_probabilities((6, 7), torch.float64, "cpu")):
        for smoothing in (0.0, 0.1):
            found = []
            for function, backend in ((cross_entropy, {"backend": "torch"}), (F.cross_entropy, {})):
                loss = function(logits, target, weight, reduction=reduction, label_smoothing=smoothing, **backend)
                upstream = torch.full_like(loss, 1.5)
                (grad,) = torch.autograd.grad(loss, logits, upstream, create_graph=create_graph)
                found.append((loss.detach(), grad.detach()))
            torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 19, 12, 40), (7, 3, 5), (1, 2, 1, 999), (5, 100_000), (3, 2, 65, 1)], ids=str)
def test_chunks_are_small_and_cover_every_row_once(shape: tuple[int, ...]) -> None:
    seen = torch.zeros(shape[:1] + shape[2:])
    for part in chunks.row_chunks(torch.empty(shape), 4000):
        seen[part] += 1
        piece = torch.empty(shape)[chunks.with_classes(part)]
        assert piece.numel() <= max(4000, shape[1] * seen.numel() // max(seen.shape))
    assert (seen == 1).all()


def test_one_large_image_needs_scratch_of_a_chunk() -> None:
    z = torch.empty(1, 19, 64, 64)
    workspace = chunks.Workspace(z, None, torch.float32)
    assert workspace.scratch is not None
    assert workspace.scratch.numel() <= max(chunks.CHUNK, 19 * 64)


def test_confident_rows_among_others() -> None:
    """The true class's gradient is -(1 - p), right relative to itself."""
    logits = torch.randn(40, 10)
    target = make_indices((40, 10), "cpu")
    target[target == -100] = 0
    confident = {3: 1e-3, 17: 1e-7, 38: 1e-20}
    for row, rest in confident.items():
        logits[row] = 0
        logits[row, target[row]] = torch.tensor(9 / rest).log()
    spec = make_spec(logits, target, "sum", -100, 0.0, torch.float32)
    grad = torch_loss.gradient(torch.ones(()), logits, target, None, [], spec).double()
    truth = reference.cross_entropy(logits, target, reduction="sum").grad
    assert_near(grad, truth, torch.float32)
    for row in confident:
        others = truth[row].sum() - truth[row, target[row]]
        torch.testing.assert_close(grad[row, target[row]], -others, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(60_000, 10), (4, 19, 64, 64)], ids=str)
def test_few_classes_lose_nothing_against_torch(shape: tuple[int, ...]) -> None:
    """The true class's gradient as a sum of the others, in every row, would be three times as far off."""
    logits, target, spec = make(shape, torch.float32, False, "none")
    spec = spec._replace(label_smoothing=0.0)
    leaf = (logits / 3).requires_grad_()
    upstream = torch.randn(target.shape)
    truth = reference.cross_entropy(leaf, target, reduction="none", upstream=upstream).grad
    ours = torch_loss.gradient(upstream, leaf.detach(), target, None, [], spec)
    (torchs,) = torch.autograd.grad(F.cross_entropy(leaf, target, reduction="none"), leaf, upstream)
    last_place = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 1.5 * (torchs - truth).abs().max() + last_place / 4
