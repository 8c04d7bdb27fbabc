"""A linear layer and its loss in one: every argument against float64, and every way to differentiate."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import linear_cross_entropy
from softmax_fused.functional import chunked_linear, linear
from tests import reference
from tests.cases import ULPS, crossed, make_indices, make_probabilities
from tests.conftest import CPU, HAS_GPU, Place

KINDS = ["indices", "ignored", "weights", "smoothing", "weights and smoothing", "probabilities", "all of them"]


def make_layer(
    rows: tuple[int, ...], sizes: tuple[int, ...], features: int, dtype: torch.dtype, place: Place
) -> list[Tensor]:
    """Input, weight and bias, leaves that require grad."""
    shapes = ((*rows, features), (*sizes, features), sizes)
    return [torch.randn(shape, dtype=torch.float64).to(place.device, dtype).requires_grad_() for shape in shapes]


def make_targets(kind: str, shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> tuple[Tensor, dict]:
    """Target and options of one kind, for logits of a shape."""
    options: dict[str, object] = {}
    target = make_indices(shape, place.device)
    if kind == "ignored":
        target.view(-1)[1::3] = 4
        options["ignore_index"] = 4
    if kind in ("probabilities", "all of them"):
        target = make_probabilities(shape, dtype, place.device)
    if "weights" in kind or kind == "all of them":
        options["weight"] = torch.rand(shape[min(len(shape) - 1, 1)], device=place.device).to(dtype) + 0.5
    if "smoothing" in kind or kind == "all of them":
        options["label_smoothing"] = 0.1
    return target, options


def changed(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """The logits scaled and capped, by the formula."""
    logits = logits if logit_scale == 1 else logit_scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def at_once(
    tensors: Sequence[Tensor], target: Tensor, logit_scale: float = 1.0, softcap: float | None = None, **options: object
) -> Tensor:
    """Torch's loss of torch's layer."""
    x, w, b = tensors
    logits = F.linear(x, w.flatten(0, -2), b.flatten()).view(*x.shape[:-1], *w.shape[:-1])
    logits = changed(logits, logit_scale, softcap)
    return F.cross_entropy(logits, target, **options)


def in_float64(
    tensors: Sequence[Tensor],
    target: Tensor,
    upstream: Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: object,
) -> list[Tensor]:
    """Loss and gradients of input, weight and bias, written from the maths."""
    x, w, b = (tensor.detach().double() for tensor in tensors)
    rows, classes = x.view(-1, x.shape[-1]), w.flatten(0, -2)
    logits = (rows @ classes.T + b.flatten()).view(*x.shape[:-1], *w.shape[:-1])
    effective = changed(logits, logit_scale, softcap)
    truth = reference.cross_entropy(effective, target, upstream=upstream.double(), **options)
    slope = logit_scale * (1 if softcap is None else 1 - (effective / softcap).square())
    g = (truth.grad * slope).reshape(len(rows), len(classes))
    return [truth.loss, (g @ classes).view(x.shape), (g.T @ rows).view(w.shape), g.sum(0).view(b.shape)]


def assert_right(place: Place, tensors: list[Tensor], target: Tensor, rows: int | None, **options: object) -> None:
    """No further from float64 than 1.5 times what torch is, or than rounding of a result allows; inputs unchanged."""
    inputs = [*tensors, target]
    before = [(tensor.detach().clone(), tensor._version) for tensor in inputs]
    x, w, b = tensors
    loss = linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=rows, backend=place.backend, **options)
    upstream = torch.randn(loss.shape, device=loss.device, dtype=torch.float64).to(loss.dtype)
    ours = [loss, *torch.autograd.grad(loss, tensors, upstream)]
    theirs = at_once(tensors, target, **options)
    theirs = [theirs, *torch.autograd.grad(theirs, tensors, upstream)]
    truth = in_float64(tensors, target, upstream, **options)
    eps = ULPS[x.dtype] * torch.finfo(x.dtype).eps
    for mine, torchs, right in zip(ours, theirs, truth, strict=True):
        assert (mine.shape, mine.dtype) == (torchs.shape, torchs.dtype)
        allowed = max(1.5 * (torchs.double() - right).abs().max().item(), eps * max(1e-3, right.abs().max().item()))
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=allowed)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value), "an input was written to"
        assert tensor._version == version


@crossed(kind=KINDS, rows=[1, 3, 100, None], reduction=["mean", "sum", "none"])
def test_every_argument(place: Place, kind: str, rows: int | None, reduction: str) -> None:
    tensors = make_layer((7,), (11,), 5, torch.float32, place)
    target, options = make_targets(kind, (7, 11), torch.float32, place)
    assert_right(place, tensors, target, rows, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [11, 1500])
def test_every_dtype_and_long_rows(place: Place, classes: int, dtype: torch.dtype, reduction: str) -> None:
    tensors = make_layer((7,), (classes,), 5, dtype, place)
    for kind in ("ignored", "all of them"):
        target, options = make_targets(kind, (7, classes), dtype, place)
        assert_right(place, tensors, target, 3, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["ignored", "all of them"])
@pytest.mark.parametrize(("rows", "sizes"), [((5,), (6, 2, 3)), ((), (6,)), ((1,), (6,)), ((5,), (1,))], ids=str)
def test_every_shape(place: Place, rows: tuple[int, ...], sizes: tuple[int, ...], kind: str, reduction: str) -> None:
    tensors = make_layer(rows, sizes, 4, torch.float32, place)
    target, options = make_targets(kind, (*rows, *sizes), torch.float32, place)
    if kind == "ignored" and sizes[0] == 1:
        target[target == 4] = -100
        options = {}
    assert_right(place, tensors, target, 2, reduction=reduction, **options)


@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.5, None), (-1.5, 3.0), (1, 2)])
@crossed(
    kind=KINDS,
    reduction=["mean", "sum", "none"],
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    sizes=[(11,), (6, 2), (1500,)],
)
def test_scaled_and_capped(
    place: Place, kind: str, reduction: str, dtype: torch.dtype, sizes: tuple[int, ...], logit_scale: float,
    softcap: float | None,
) -> None:  # fmt: skip
    tensors = make_layer((7,), sizes, 5, dtype, place)
    target, options = make_targets(kind, (7, *sizes), dtype, place)
    assert_right(place, tensors, target, 3, reduction=reduction, logit_scale=logit_scale, softcap=softcap, **options)


def test_scaled_and_capped_at_once() -> None:
    tensors = make_layer((7,), (11,), 5, torch.float32, CPU)
    target = make_indices((7, 11), "cpu")
    assert_right(CPU, tensors, target, None, logit_scale=2.0, softcap=3.0)
    x, w, b = tensors
    options = {"linear_bias": b, "logit_scale": 2.0, "softcap": 3.0, "backend": "torch"}
    torch.testing.assert_close(
        linear_cross_entropy(x, w, target, **options),
        linear_cross_entropy(x, w, target, **options, chunk_rows=2),
    )


def test_strided_tensors(place: Place) -> None:
    x, w, b = make_layer((7,), (11,), 5, torch.float32, place)
    strided = [torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in (x, w.T, b)]
    target = torch.stack([make_indices((7, 11), place.device)] * 2, -1)[..., 0]
    assert_right(place, [strided[0], strided[1].T, strided[2]], target, 3)


Products = dict[str, list[int]]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    """The rows of each matrix product: for logits, and for the gradients of input and weight."""
    seen: Products = {"logits": [], "input": [], "weight": []}
    which = {"project": ("logits", 0), "multiply_gradient": ("input", 0), "add_product": ("weight", 1)}

    def counted(function: Callable[..., object], name: str, operand: int) -> Callable[..., object]:
        return lambda *args: (seen[name].append(len(args[operand])), function(*args))[1]

    for function, (name, operand) in which.items():
        monkeypatch.setattr(chunked_linear, function, counted(getattr(chunked_linear, function), name, operand))
    return seen


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", range(8), ids="{:03b}".format)
def test_every_subset_of_gradients(place: Place, wanted: int, reduction: str, products: Products) -> None:
    tensors = make_layer((7,), (11,), 5, torch.float32, place)
    target = make_indices((7, 11), place.device)
    loss = at_once(tensors, target, reduction=reduction)
    upstream = torch.randn_like(loss)
    expected = torch.autograd.grad(loss, tensors, upstream)
    needs = [bool(wanted & bit) for bit in (4, 2, 1)]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    x, w, b = tensors
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_rows=3, backend=place.backend)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward(upstream)
    for tensor, need, right in zip(tensors, needs, expected, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, right)
    assert products["logits"] == [3, 3, 1] * (2 if reduction == "none" and any(needs) else 1)
    assert products["input"] == [3, 3, 1] * needs[0]
    assert products["weight"] == [3, 3, 1] * needs[1]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [(6,), (6, 2)], ids=str)
def test_ignored_rows_are_not_multiplied(
    place: Place, sizes: tuple[int, ...], reduction: str, products: Products
) -> None:
    tensors = make_layer((10,), sizes, 4, torch.float32, place)
    target = make_indices((10, *sizes), place.device)
    target[1::2] = target[6] = -100
    if len(sizes) > 1:
        target[0, 0] = -100  # the row's other position has a class
    for options in ({}, {"label_smoothing": 0.1, "weight": torch.rand(6, device=place.device)}):
        for seen in products.values():
            seen.clear()
        assert_right(place, tensors, target, 3, reduction=reduction, **options)
        chunks = [2, 2] if place.device == "cpu" else [3, 3, 3, 1]
        assert products["input"] == products["weight"] == chunks
        assert products["logits"] == chunks * (2 if reduction == "none" else 1)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_rows_have_loss_and_gradient_zero(place: Place, reduction: str) -> None:
    x, w, b = make_layer((6,), (5,), 4, torch.float32, place)
    target = make_indices((6, 5), place.device).index_fill_(0, torch.tensor([0, 3], device=place.device), 4)
    loss = linear_cross_entropy(
        x, w, target, linear_bias=b, reduction=reduction, ignore_index=4, chunk_rows=2, backend=place.backend
    )
    ignored = target == 4
    if reduction == "none":
        assert loss[ignored].eq(0).all()
        assert loss[~ignored].gt(0).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad[ignored].eq(0).all()
    assert grad[~ignored].ne(0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_features_of_ignored_rows_reach_no_gradient_on_the_cpu(reduction: str) -> None:
    x, w, b = tensors = make_layer((6,), (5,), 4, torch.float32, CPU)
    target = make_indices((6, 5), "cpu").index_fill_(0, torch.tensor([1, 4]), -100)
    with torch.no_grad():
        x[target == -100] = torch.nan
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_rows=4)
    kept = target != -100
    expected = F.cross_entropy(F.linear(x[kept], w, b), target[kept], reduction="sum")
    expected = expected / kept.sum() if reduction == "mean" else expected
    torch.testing.assert_close(loss.sum(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(it.sum(), tensors) for it in (loss, expected)))


def test_bytes_as_classes_are_not_taken_for_the_ignored_index(place: Place) -> None:
    """In eight bits 156 and -100 are equal."""
    x, w, _ = make_layer((3,), (200,), 4, torch.float32, place)
    target = torch.tensor([156, 3, 199], device=place.device)
    for reduction in ("mean", "none"):
        found = linear_cross_entropy(x, w, target.byte(), reduction=reduction, chunk_rows=2, backend=place.backend)
        torch.testing.assert_close(found, F.cross_entropy(F.linear(x, w), target, reduction=reduction))


def test_without_bias_and_without_gradient(place: Place) -> None:
    x, w, b = make_layer((7,), (11,), 5, torch.float32, place)
    target = make_indices((7, 11), place.device)
    expected = at_once((x, w, torch.zeros_like(b)), target)
    loss = linear_cross_entropy(x, w, target, chunk_rows=3, backend=place.backend)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, target, chunk_rows=3, backend=place.backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_are_all_ignored(place: Place, reduction: str, smoothing: float) -> None:
    tensors = make_layer((7,), (11,), 5, torch.float32, place)
    target = torch.full((7,), -100, device=place.device)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    x, w, b = tensors
    loss = linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=3, backend=place.backend, **options)
    torch.testing.assert_close(loss, at_once(tensors, target, **options), equal_nan=True)
    for grad in torch.autograd.grad(loss, tensors, torch.ones_like(loss)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_class_weights_that_are_all_zero(place: Place) -> None:
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, place)
    loss = linear_cross_entropy(
        x, w, make_indices((7, 11), place.device), weight=torch.zeros(11, device=place.device), chunk_rows=3,
        backend=place.backend,
    )  # fmt: skip
    assert loss.isnan()
    assert torch.autograd.grad(loss, w)[0].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch(place: Place, reduction: str) -> None:
    tensors = make_layer((0,), (11,), 5, torch.float32, place)
    target = make_indices((0, 11), place.device)
    x, w, b = tensors
    loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_rows=3, backend=place.backend)
    torch.testing.assert_close(loss, at_once(tensors, target, reduction=reduction), equal_nan=True)
    assert torch.autograd.grad(loss.sum(), w)[0].count_nonzero() == 0


def test_only_a_chunk_of_logits_exists(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    project = chunked_linear.project
    monkeypatch.setattr(chunked_linear, "project", lambda *args: (seen.append(args[-1]), project(*args))[1])
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, place)
    target = make_indices((7, 11), place.device)
    for rows, chunks in ((1, [1] * 7), (3, [3, 3, 1]), (4, [4, 3]), (5, [4, 3]), (100, [7])):
        seen.clear()
        linear_cross_entropy(x, w, target, chunk_rows=rows, backend=place.backend).backward()
        assert [len(logits) for logits in seen] == chunks
        assert len({logits.data_ptr() for logits in seen}) == 1, "one buffer serves all chunks"


def test_chunks_are_as_large_as_what_exists_anyway() -> None:
    assert chunked_linear.default_rows(8192, 1024, 50257) == 1024  # the weight
    assert chunked_linear.default_rows(65536, 1024, 32000) == 2097  # the input
    assert chunked_linear.default_rows(8192, 16, 50257) == chunked_linear.SMALLEST_CHUNK // 50257
    assert chunked_linear.default_rows(1, 1, 2**25) == 1


def test_few_logits_on_the_cpu_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = make_layer((7,), (11,), 5, torch.float32, CPU)
    target = make_indices((7, 11), "cpu")
    monkeypatch.setattr(linear, "chunked", None)
    loss = linear_cross_entropy(x, w, target, linear_bias=b)
    assert torch.equal(loss, at_once((x, w, b), target))
    with pytest.raises(TypeError):
        linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=7)


def test_sixteen_bit_weights_sum_their_gradient_in_float32(place: Place) -> None:
    tensors = make_layer((256,), (11,), 5, torch.bfloat16, place)
    target = make_indices((256, 11), place.device)
    truth = in_float64(tensors, target, torch.ones(()))[2]

    def error(rows: int) -> float:
        x, w, b = tensors
        loss = linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=rows, backend=place.backend)
        return (torch.autograd.grad(loss, w)[0].double() - truth).abs().max().item()

    assert error(2) <= 1.01 * error(256)
    assert error(3) <= 1.01 * error(256)


def test_products_of_sixteen_bits_are_summed_in_float32(place: Place) -> None:
    g, x = torch.ones(2, 3, device=place.device).bfloat16(), torch.ones(2, 4, device=place.device).bfloat16()
    total = torch.full((3, 4), 4096.0, device=place.device)  # whose neighbour in bfloat16 is 4112
    for _ in range(3):
        chunked_linear.add_product(total, g, x)
    assert torch.equal(total, torch.full_like(total, 4102))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(place: Place, autocast: torch.dtype, parameters: torch.dtype) -> None:
    x, w, b = tensors = make_layer((33,), (1500,), 8, parameters, place)
    target, weight = make_indices((33, 1500), place.device), torch.rand(1500, device=place.device)
    target[::4] = -100
    with torch.autocast(place.device, dtype=autocast):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, chunk_rows=10, backend=place.backend)
        expected = at_once(tensors, target, weight=weight)
    assert loss.dtype is expected.dtype is torch.float32
    rounded = [tensor.detach().to(autocast) for tensor in tensors]
    truth = in_float64(rounded, target, torch.ones(()), weight=weight)
    ours = [loss, *torch.autograd.grad(loss, tensors)]
    theirs = [expected, *torch.autograd.grad(expected, tensors)]
    for mine, torchs, right in zip(ours, theirs, truth, strict=True):
        assert mine.dtype is torchs.dtype
        allowed = max(1.5 * (torchs.double() - right).abs().max().item(), 1e-6 * right.abs().max().item())
        assert (mine.double() - right).abs().max().item() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_host_synchronisation(reduction: str) -> None:
    x, w, b = tensors = make_layer((600,), (1500,), 64, torch.bfloat16, Place("cuda", "triton"))
    target, options = make_targets("weights and smoothing", (600, 1500), torch.bfloat16, Place("cuda", "triton"))

    def step() -> None:
        loss = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_rows=200, **options)
        torch.autograd.grad(loss, tensors, torch.ones_like(loss))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
