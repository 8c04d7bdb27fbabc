"""Outputs of the rows of a linear layer's logits: against float64, in every place, and every way to differentiate."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from softmax_fused import RowOutputs, cross_entropy_rows, linear_cross_entropy, linear_cross_entropy_rows
from softmax_fused._row_outputs import DIFFERENTIABLE, OUTPUTS
from softmax_fused.functional import chunked_linear, linear_rows
from tests import test_row_outputs
from tests.cases import ULPS, crossed, make_indices, make_probabilities
from tests.conftest import CPU, HAS_GPU, INTERPRETER, Place
from tests.test_linear import KINDS, Products, changed, make_layer, make_targets, products  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"  # opcheck's own
)
NAMES = tuple(OUTPUTS)
SOFT = DIFFERENTIABLE


def all_logits(tensors: list[Tensor]) -> Tensor:
    x, w, b = tensors
    return F.linear(x, w.flatten(0, -2), b.flatten()).view(*x.shape[:-1], *w.shape[:-1])


def separately(
    tensors: list[Tensor], target: Tensor, logit_scale: float = 1.0, softcap: float | None = None, **options: Any
) -> SimpleNamespace:
    """Torch's layer, and a pass of torch's for each output."""
    x = changed(all_logits(tensors), logit_scale, softcap)
    dim = min(x.ndim - 1, 1)
    entropy = -(torch.softmax(x, dim) * torch.log_softmax(x, dim)).sum(dim)
    found = SimpleNamespace(logsumexp=torch.logsumexp(x, dim), prediction=x.argmax(dim), entropy=entropy)
    found.loss = F.cross_entropy(x, target, reduction="none", **options)
    if target.ndim < x.ndim:
        ignored = target == options.get("ignore_index", -100)
        label = target.masked_fill(ignored, 0).unsqueeze(dim)
        found.log_prob = torch.log_softmax(x, dim).gather(dim, label).squeeze(dim).masked_fill(ignored, 0)
        found.rank = (x > x.gather(dim, label)).sum(dim).masked_fill(ignored, -1)
    return found


def of(target: Tensor, logits: Tensor | tuple[int, ...]) -> tuple[str, ...]:
    """The outputs that there are: without a class index some are not."""
    ndim = logits.ndim if isinstance(logits, Tensor) else len(logits)
    return tuple(name for name, output in OUTPUTS.items() if target.ndim < ndim or not output.needs_label)


def assert_rank(ours: Tensor, logits: Tensor, target: Tensor, ignore_index: int, eps: float) -> None:
    """As many logits are larger, up to rounding."""
    dim = min(logits.ndim - 1, 1)
    ignored = target == ignore_index
    above = logits - logits.gather(dim, target.masked_fill(ignored, 0).unsqueeze(dim))
    allowed = eps * logits.abs().max()
    assert ((above > allowed).sum(dim).masked_fill(ignored, -1) <= ours).all()
    assert (ours <= (above >= -allowed).sum(dim).sub(1).masked_fill(ignored, -1)).all()


def assert_within(ours: Tensor, torchs: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """No further from float64 than 1.5 times what torch is, or than rounding of a result allows."""
    assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
    eps = ULPS[dtype] * torch.finfo(dtype).eps
    allowed = max(1.5 * (torchs.double() - truth).abs().max().item(), eps * max(1e-3, truth.abs().max().item()))
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=allowed)


def assert_right(
    place: Place, tensors: list[Tensor], target: Tensor, rows: int | None, outputs: tuple[str, ...] = (),
    **options: Any,
) -> None:  # fmt: skip
    """Compare outputs and gradients, under random upstream gradients of all of them, with float64."""
    before = [(tensor.detach().clone(), tensor._version) for tensor in (*tensors, target)]
    x, w, b = tensors
    torchs = separately(tensors, target, **options)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    logits = all_logits(exact)
    outputs = outputs or of(target, logits)
    truth = test_row_outputs.reference(logits, target, **options)
    found = linear_cross_entropy_rows(
        x, w, target, outputs=outputs, linear_bias=b, chunk_rows=rows, backend=place.backend, **options
    )
    for name, ours in found._asdict().items():
        if name not in outputs:
            assert ours is None
        elif name == "rank":
            assert (ours.dtype, ours.shape) == (torch.int64, truth.rank.shape)
            scaled = logits.detach() * options.get("logit_scale", 1.0)
            assert_rank(ours, scaled, target, options.get("ignore_index", -100), 4 * torch.finfo(x.dtype).eps)
        elif name == "prediction":
            assert (ours.dtype, ours.shape) == (torch.int64, truth.prediction.shape)
            dim = min(logits.ndim - 1, 1)
            effective = changed(logits.detach(), options.get("logit_scale", 1.0), options.get("softcap"))
            chosen = effective.gather(dim, ours.unsqueeze(dim)).squeeze(dim)
            assert (effective.amax(dim) - chosen).max() <= 4 * torch.finfo(x.dtype).eps * effective.abs().max()
        else:
            assert_within(ours.detach(), getattr(torchs, name).detach(), getattr(truth, name).detach(), x.dtype)
    soft = [name for name in SOFT if name in outputs]
    if not soft:
        return
    upstream = [torch.randn(getattr(truth, name).shape, dtype=torch.float64) for name in soft]
    upstream = [g.to(x.device, getattr(found, name).dtype) for g, name in zip(upstream, soft, strict=True)]
    ours, theirs = (
        torch.autograd.grad([getattr(rows_, name) for name in soft], tensors, upstream) for rows_ in (found, torchs)
    )
    right = torch.autograd.grad([getattr(truth, name) for name in soft], exact, [g.double() for g in upstream])
    for mine, torchs_, exactly in zip(ours, theirs, right, strict=True):
        assert_within(mine, torchs_, exactly, x.dtype)
    for tensor, (value, version) in zip((*tensors, target), before, strict=True):
        assert torch.equal(tensor, value), "an input was written to"
        assert tensor._version == version


@crossed(
    kind=KINDS,
    rows=[1, 3, 100],
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    transform=[(1.0, None), (0.5, None), (-1.5, 3.0)],
    classes=[11, 300],
)
def test_every_output(
    place: Place, kind: str, rows: int, dtype: torch.dtype, transform: tuple[float, float | None], classes: int
) -> None:
    tensors = make_layer((7,), (classes,), 5, dtype, place)
    target, options = make_targets(kind, (7, classes), dtype, place)
    logit_scale, softcap = transform
    assert_right(place, tensors, target, rows, logit_scale=logit_scale, softcap=softcap, **options)


@pytest.mark.parametrize("kind", ["ignored", "all of them"])
@pytest.mark.parametrize(("rows", "sizes"), [((5,), (6, 2, 3)), ((), (6,)), ((1,), (6,)), ((5,), (1,))], ids=str)
def test_every_shape(place: Place, rows: tuple[int, ...], sizes: tuple[int, ...], kind: str) -> None:
    tensors = make_layer(rows, sizes, 4, torch.float32, place)
    target, options = make_targets(kind, (*rows, *sizes), torch.float32, place)
    if kind == "ignored" and sizes[0] == 1:
        target[target == 4] = -100
        options = {}
    for outputs in ((), ("loss",), ("loss", "rank") if kind == "ignored" else ("entropy",)):
        assert_right(place, tensors, target, 2, outputs, **options)


@pytest.mark.parametrize("outputs", [*((name,) for name in NAMES), ("loss", "prediction"), ("loss", "rank")], ids=str)
def test_any_outputs(place: Place, outputs: tuple[str, ...]) -> None:
    tensors = make_layer((7,), (11,), 5, torch.float32, place)
    target, options = make_targets("ignored", (7, 11), torch.float32, place)
    assert_right(place, tensors, target, 3, outputs, label_smoothing=0.1, **options)


def test_long_rows(place: Place) -> None:
    tensors = make_layer((3,), (5000,), 5, torch.float32, place)
    target, options = make_targets("ignored", (3, 5000), torch.float32, place)
    assert_right(place, tensors, target, 2, softcap=5.0, **options)


def test_few_logits_on_the_cpu_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_layer((7,), (11,), 5, torch.float32, CPU)
    target = make_indices((7, 11), "cpu")
    monkeypatch.setattr(linear_rows, "chunked", None)
    x, w, b = tensors
    found = linear_cross_entropy_rows(x, w, target, outputs=NAMES, linear_bias=b, softcap=2.0)
    expected = separately(tensors, target, softcap=2.0)
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    with pytest.raises(TypeError):
        linear_cross_entropy_rows(x, w, target, linear_bias=b, chunk_rows=7)


@pytest.mark.parametrize("wanted", range(8), ids="{:03b}".format)
def test_every_subset_of_gradients(place: Place, wanted: int, products: Products) -> None:  # noqa: F811
    needs = [bool(wanted & bit) for bit in (4, 2, 1)]
    x, w, b = tensors = make_layer((7,), (11,), 5, torch.float32, place)
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)
    target = make_indices((7, 11), place.device)
    rows = linear_cross_entropy_rows(x, w, target, outputs=NAMES, linear_bias=b, chunk_rows=3, backend=place.backend)
    assert [name for name in NAMES if getattr(rows, name).requires_grad] == (list(SOFT) if any(needs) else [])
    if any(needs):
        asked = [tensor for tensor in tensors if tensor.requires_grad]
        total = sum(getattr(rows, name).sum() for name in SOFT)
        expected = sum(getattr(separately(tensors, target), name).sum() for name in SOFT)
        torch.testing.assert_close(torch.autograd.grad(total, asked), torch.autograd.grad(expected, asked))
    assert products["logits"] == [3, 3, 1] * (1 + any(needs))
    assert products["input"] == [3, 3, 1] * needs[0]
    assert products["weight"] == [3, 3, 1] * needs[1]


def test_rows_that_are_not_multiplied(place: Place, products: Products) -> None:  # noqa: F811
    """Ignored ones, where only their loss is asked for, and in backward all without an upstream gradient."""
    x, w, b = make_layer((10,), (6,), 4, torch.float32, place)
    target = make_indices((10, 6), place.device)
    target[1::2] = target[6] = -100
    kept = target != -100

    def counted(outputs: tuple[str, ...], total: Callable[[Any], Tensor]) -> list[int]:
        for seen in products.values():
            seen.clear()
        rows = linear_cross_entropy_rows(
            x, w, target, outputs=outputs, linear_bias=b, chunk_rows=100, backend=place.backend
        )
        expected = separately([x, w, b], target)
        for name in outputs:
            torch.testing.assert_close(getattr(rows, name), getattr(expected, name))
        ours, theirs = (torch.autograd.grad(total(it), (x, w, b)) for it in (rows, expected))
        torch.testing.assert_close(ours, theirs)
        assert products["input"] == products["weight"] == products["logits"][1:]
        return products["logits"]

    cpu = place.device == "cpu"
    assert counted(("loss",), lambda rows: rows.loss.sum()) == ([4, 4] if cpu else [10, 10])
    known = ("loss", "log_prob", "rank")
    assert counted(known, lambda rows: (rows.loss - 2 * rows.log_prob).sum()) == ([4, 4] if cpu else [10, 10])
    assert counted(("loss", "prediction"), lambda rows: rows.loss.sum()) == ([10, 4] if cpu else [10, 10])
    assert counted(("loss",), lambda rows: rows.loss[:3].sum()) == ([4, 2] if cpu else [10, 10])
    assert counted(("entropy",), lambda rows: (kept * rows.entropy).sum()) == ([10, 4] if cpu else [10, 10])
    assert counted(("loss", "entropy"), lambda rows: rows.entropy.sum() - rows.loss.sum()) == [10, 10]
    some = counted(("loss", "entropy"), lambda rows: rows.loss[:3].sum() + rows.entropy[5])
    assert some == ([10, 3] if cpu else [10, 10])


def test_all_rows_ignored(place: Place) -> None:
    x, w, b = make_layer((4,), (6,), 4, torch.float32, place)
    target = torch.full((4,), -100, device=place.device)
    for outputs in (("loss",), ("loss", "rank"), NAMES):
        rows = linear_cross_entropy_rows(
            x, w, target, outputs=outputs, linear_bias=b, chunk_rows=3, backend=place.backend
        )
        assert rows.loss.eq(0).all()
        assert rows.rank is None or rows.rank.eq(-1).all()
        for grad in torch.autograd.grad(rows.loss.sum(), (x, w, b)):
            assert grad.eq(0).all()


def test_only_a_chunk_of_logits_exists(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    project = chunked_linear.project
    monkeypatch.setattr(chunked_linear, "project", lambda *args: (seen.append(args[-1]), project(*args))[1])
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, place)
    rows = linear_cross_entropy_rows(
        x, w, make_indices((7, 11), place.device), outputs=NAMES, chunk_rows=3, backend=place.backend
    )
    assert [len(logits) for logits in seen] == [3, 3, 1]
    assert len({logits.data_ptr() for logits in seen}) == 1, "one buffer serves all chunks"
    seen.clear()
    (rows.loss + rows.entropy).sum().backward()
    assert [len(logits) for logits in seen] == [3, 3, 1]
    assert len({logits.data_ptr() for logits in seen}) == 1


def test_it_agrees_with_the_loss_and_with_the_rows_of_logits(place: Place) -> None:
    x, w, b = make_layer((7,), (11,), 5, torch.float32, place)
    target, options = make_targets("weights and smoothing", (7, 11), torch.float32, place)
    arguments = {"linear_bias": b, "chunk_rows": 3, "softcap": 2.0, "backend": place.backend, **options}
    rows = linear_cross_entropy_rows(x, w, target, outputs=NAMES, **arguments)
    torch.testing.assert_close(rows.loss, linear_cross_entropy(x, w, target, reduction="none", **arguments))
    logits = F.linear(x, w, b)
    expected = cross_entropy_rows(logits, target, outputs=NAMES, softcap=2.0, backend=place.backend, **options)
    for name in NAMES:
        torch.testing.assert_close(getattr(rows, name), getattr(expected, name))


def test_backward_twice_gives_the_same_gradient_twice(place: Place) -> None:
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, place)
    rows = linear_cross_entropy_rows(
        x, w, make_indices((7, 11), place.device), outputs=SOFT, chunk_rows=3, backend=place.backend
    )
    total = (rows.loss * rows.entropy + rows.logsumexp).sum()
    first, again = (torch.autograd.grad(total, (x, w), retain_graph=True) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_sixteen_bit_weights_sum_their_gradient_in_float32(place: Place) -> None:
    x, w, b = tensors = make_layer((256,), (11,), 5, torch.bfloat16, place)
    target = make_indices((256, 11), place.device)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = test_row_outputs.reference(all_logits(exact), target)
    (right,) = torch.autograd.grad((truth.loss + truth.entropy).sum(), exact[1])

    def error(rows: int) -> float:
        found = linear_cross_entropy_rows(
            x, w, target, outputs=("loss", "entropy"), linear_bias=b, chunk_rows=rows, backend=place.backend
        )
        ones = torch.ones_like(found.loss)
        (grad,) = torch.autograd.grad((found.loss, found.entropy), w, (ones, ones))
        return (grad.double() - right).abs().max().item()

    assert error(2) <= 1.01 * error(256)
    assert error(3) <= 1.01 * error(256)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(place: Place, parameters: torch.dtype) -> None:
    x, w, b = tensors = make_layer((9,), (50,), 8, parameters, place)
    target = make_indices((9, 50), place.device)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        rows = linear_cross_entropy_rows(
            x, w, target, outputs=NAMES, linear_bias=b, chunk_rows=4, backend=place.backend
        )
        expected = cross_entropy_rows(F.linear(x, w, b), target, outputs=NAMES, backend=place.backend)
    assert [getattr(rows, name).dtype for name in NAMES] == [getattr(expected, name).dtype for name in NAMES]
    torch.testing.assert_close(rows.loss, expected.loss, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(*(torch.autograd.grad(it.loss.sum(), tensors) for it in (rows, expected)), strict=True):
        assert ours.dtype is theirs.dtype is parameters
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.5, "label_smoothing": 0.1}], ids=str)
def test_numerical_derivatives(place: Place, options: dict[str, Any]) -> None:
    tensors = make_layer((3,), (4,), 2, torch.float64, place)
    target = torch.tensor([0, -100, 3], device=place.device)

    def outputs(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        rows = linear_cross_entropy_rows(
            x, w, target, outputs=SOFT, linear_bias=b, chunk_rows=2, backend=place.backend, **options
        )
        return rows.loss, rows.logsumexp, rows.entropy, rows.log_prob

    quick = {"fast_mode": place == INTERPRETER}  # every entry of the Jacobian is a launch: slow there
    assert torch.autograd.gradcheck(outputs, tensors, check_batched_grad=True, **quick)
    assert torch.autograd.gradgradcheck(outputs, tensors, **quick)


def test_numerical_derivatives_with_probabilities() -> None:
    tensors = make_layer((3,), (4, 2), 2, torch.float64, CPU)
    target = make_probabilities((3, 4, 2), torch.float64, "cpu")

    def outputs(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        rows = linear_cross_entropy_rows(
            x, w, target, outputs=("loss", "logsumexp", "entropy"), linear_bias=b, chunk_rows=2
        )
        return rows.loss, rows.logsumexp, rows.entropy

    assert torch.autograd.gradcheck(outputs, tensors)
    assert torch.autograd.gradgradcheck(outputs, tensors)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, w: torch.func.grad(f, argnums=(0, 1))(x, w),
    "vmap of grad": lambda f, x, w: torch.func.vmap(torch.func.grad(f), (0, None))(torch.stack([x, -x]), w),
    "jvp": lambda f, x, w: torch.func.jvp(f, (x, w), (x, w)),
    "hessian": lambda f, x, w: torch.func.hessian(f)(x, w),
    "checkpoint": lambda f, x, w: torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(f, x, w, use_reentrant=False), (x, w)
    ),
    "backward of backward": lambda f, x, w: torch.autograd.functional.vhp(f, (x, w), (x, w)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(place: Place, transform: Callable[..., Any]) -> None:
    x, w, b = make_layer((5,), (6,), 3, torch.float64, place)
    target = make_indices((5, 6), place.device)

    def total(rows: Any) -> Tensor:
        return (rows.loss + rows.logsumexp.square() - 0.3 * rows.entropy + rows.log_prob.exp()).sum()

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return total(
            linear_cross_entropy_rows(
                x, w, target, outputs=SOFT, linear_bias=b.detach(), softcap=2.0, chunk_rows=2, backend=place.backend
            )
        )

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return total(separately([x, w, b.detach()], target, softcap=2.0))

    torch.testing.assert_close(transform(ours, x, w), transform(theirs, x, w))


@pytest.mark.parametrize("outputs", [NAMES, ("loss",), ("entropy", "prediction")], ids=str)
def test_compiled_it_is_one_operator_and_goes_in_chunks_too(
    place: Place, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    project = chunked_linear.project
    monkeypatch.setattr(chunked_linear, "project", lambda *args: (seen.append(len(args[0])), project(*args))[1])
    torch.compiler.reset()
    counter, frames = CompileCounterWithBackend("aot_eager"), []

    def call(x: Tensor, w: Tensor, target: Tensor, b: Tensor) -> RowOutputs:
        return linear_cross_entropy_rows(
            x, w, target, outputs=outputs, linear_bias=b, softcap=2.0, chunk_rows=3, backend=place.backend
        )

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    soft = [name for name in SOFT if name in outputs]
    for rows in (7, 5):
        x, w, b = tensors = make_layer((rows,), (11,), 5, torch.float32, place)
        target = make_indices((rows, 11), place.device)
        found, expected = compiled(x, w, target, b), separately(tensors, target, softcap=2.0)
        frames.append(counter.frame_count)
        for name in NAMES:
            ours = getattr(found, name)
            assert (ours is None) == (name not in outputs)
            if ours is not None:
                torch.testing.assert_close(ours, getattr(expected, name))
        upstream = [torch.rand(rows, device=place.device) for _ in soft]
        ours, theirs = (
            torch.autograd.grad([getattr(it, name) for name in soft], tensors, upstream) for it in (found, expected)
        )
        torch.testing.assert_close(ours, theirs)
    assert len(set(frames)) == 1, "the second batch was compiled anew"
    assert seen == [*[3, 3, 1] * 2, *[3, 2] * 2]


@pytest.mark.parametrize("outputs", [",".join(OUTPUTS), "prediction", "loss"])
def test_the_operator_is_what_it_says(place: Place, outputs: str) -> None:
    x, w, _ = make_layer((7,), (11,), 5, torch.float32, place)
    target = make_indices((7, 11), place.device)
    needs = [outputs != "prediction"] * 2 + [False]
    if outputs == "prediction":
        x, w = x.detach(), w.detach()
    options = (outputs, needs, "none", -100, 0.1, 0.5, 2.0, torch.float32, [11], 3, torch.float32, place.backend, True)
    operator = torch.ops.softmax_fused.linear_cross_entropy_rows.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    if outputs == ",".join(OUTPUTS):  # else the empty ones would be differentiated by opcheck
        utils = (*utils, "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (x, w, None, target, None, *options), test_utils=utils)


class Labelled(Tensor):
    """A subclass that keeps its type through every function."""


def test_subclasses_and_modes() -> None:
    x, w, target = torch.randn(8, 4), torch.randn(10, 4), torch.arange(8)
    rows = linear_cross_entropy_rows(x.as_subclass(Labelled), w, target, chunk_rows=3)
    assert type(rows.loss) is Labelled
    torch.testing.assert_close(rows.loss.as_subclass(Tensor), F.cross_entropy(F.linear(x, w), target, reduction="none"))
    of_logits = cross_entropy_rows(F.linear(x, w).as_subclass(Labelled), target, outputs=("loss",))
    assert type(of_logits.loss) is Labelled
    torch.testing.assert_close(of_logits.loss, rows.loss)
    seen: dict[str, Any] = {}

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is linear_cross_entropy_rows:
                seen.update(kwargs or {})
            return func(*args, **(kwargs or {}))

    with Mode():
        linear_cross_entropy_rows(x, w, target, outputs=["entropy"], softcap=2.0, chunk_rows=3)
    assert (seen["outputs"], seen["softcap"], seen["chunk_rows"]) == (["entropy"], 2.0, 3)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"outputs": ("loss", "argmax")}, ValueError, "outputs must name some of loss, .*; got"),
        ({"outputs": ()}, ValueError, "outputs must name some of"),
        (
            {"outputs": ("loss", "rank"), "target": torch.full((8, 10), 0.1)},
            ValueError,
            "'rank' in outputs needs class indices as the target; got",
        ),
        ({"logit_scale": torch.ones(8)}, TypeError, "logit_scale must be a number; got"),
        ({"softcap": -1.0}, ValueError, "softcap must be a positive number or None; got -1.0"),
        ({"logit_scale": "2"}, TypeError, "logit_scale must be a number; got str '2'"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite; got nan"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be a positive integer or None; got 0"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'triton', 'numba' or 'torch'; got 'cuda'"),
        ({"target": torch.arange(9)}, ValueError, r"target must have shape \(8,\) .*\(8, 10\).*got .*\(9,\)"),
        ({"target": torch.full((8,), 10)}, IndexError, "class indices from 0 to 9.*got 10"),
        ({"weight": torch.ones(9)}, RuntimeError, r"weight must be a float32 tensor of shape \(10,\)"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be a number of at most 1; got 1.5"),
        ({"linear_bias": torch.ones(9)}, RuntimeError, r"linear_bias must have shape \(10,\).*got .*\(9,\)"),
        ({"linear_weight": [1.0]}, TypeError, "linear_weight must be a tensor; got list"),
        ({"input": torch.zeros(2, 3, 4)}, RuntimeError, r"input must have shape \(D,\) or \(N, D\)"),
    ],
    ids=str,
)
def test_errors_say_what_was_expected(
    options: dict[str, Any], error: type[Exception], message: str, rows: int | None
) -> None:
    arguments = {"input": torch.randn(8, 4), "linear_weight": torch.randn(10, 4), "target": torch.arange(8)}
    with pytest.raises(error, match=message):
        linear_cross_entropy_rows(**{**arguments, "chunk_rows": rows, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_no_host_synchronisation() -> None:
    x, w, b = tensors = make_layer((600,), (1500,), 64, torch.bfloat16, Place("cuda", "triton"))
    target, options = make_targets("ignored", (600, 1500), torch.bfloat16, Place("cuda", "triton"))

    def step() -> None:
        rows = linear_cross_entropy_rows(
            x, w, target, outputs=NAMES, linear_bias=b, softcap=30.0, chunk_rows=200, **options
        )
        torch.autograd.grad((rows.loss + rows.entropy).sum(), tensors)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
