"""With batch_invariant=True a row's bits are its own: other rows, their number and the row's place do not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from softmax_fused import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    log_prob,
    sparse_target,
)
from softmax_fused._dispatch import SMALL_CPU_NUMEL
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.backends.triton import cross_entropy as triton_cross_entropy
from softmax_fused.backends.triton import row_outputs as triton_row_outputs
from softmax_fused.backends.triton.plan import Launch
from softmax_fused.functional.rows import RowSpec
from tests.cases import assert_right, crossed, make_indices, make_logits, make_probabilities
from tests.conftest import CPU, GPU, GPU_TORCH, INTERPRETER, Place, on_gpu, resolve

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = INTEGERS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def with_gradient(logits: Tensor, upstream: Tensor, call: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """Return what a call computes, and the gradient by the logits of all that is differentiable, row by row."""
    leaf = logits.detach().requires_grad_()
    found = call(leaf)
    total = [each for each in found if each.requires_grad]
    (grad,) = torch.autograd.grad(total, leaf, [upstream.to(each.dtype) for each in total])
    return [*(each.detach() for each in found), grad]


class Batch:
    """Rows of logits (N, C), with all that belongs to each."""

    def __init__(
        self, place: Place, shape: tuple[int, int], dtype: torch.dtype, target: str, with_ignored: bool = True
    ) -> None:
        device = place.device
        self.backend, self.interpreted = place.backend, place == INTERPRETER
        self.logits = make_logits(shape, dtype, device).detach()
        self.logits[::3] *= 4  # confident rows
        self.soft = target == "probabilities"
        self.target = make_probabilities(shape, dtype, device) if self.soft else make_indices(shape, device)
        if not self.soft:
            self.target[::3] = self.logits[::3].argmax(1)
            if with_ignored:
                self.target[5::7] = -100
        self.options: dict[str, Any] = {"batch_invariant": True, "backend": self.backend}
        if target == "weights and smoothing":
            self.options |= {"weight": torch.rand(shape[1], dtype=torch.float64).to(device, dtype)}
        if target != "indices":
            self.options |= {"label_smoothing": 0.1}
        self.upstream = (0.5 + torch.rand(shape[0], dtype=torch.float64)).to(device, dtype)

    def compute(
        self, logits: Tensor, rows: slice | int, view: Callable[[Tensor], Tensor] = lambda x: x
    ) -> list[Tensor]:
        """Return losses, outputs and gradients of these rows, whose logits lie as given.

        `view` gives what belongs to the rows the form that the logits have.
        """
        target, upstream = view(self.target[rows]), self.upstream[rows]
        upstream = upstream.reshape(logits.shape[:1] + logits.shape[2:]) if logits.ndim > 1 else upstream
        options, found = self.options, []

        def loss(z: Tensor, **others: Any) -> tuple[Tensor, ...]:
            return (cross_entropy(z, target, reduction="none", **options, **others),)

        def rows_of(z: Tensor) -> tuple[Tensor, ...]:
            names = ["loss", "logsumexp", "prediction", "entropy"] + ([] if self.soft else ["log_prob", "rank"])
            out = cross_entropy_rows(z, target, outputs=names, softcap=20.0, **options)
            return tuple(each for each in out if each is not None)

        found += with_gradient(logits, upstream, loss)
        found += with_gradient(logits, upstream, rows_of)
        leaf = logits.detach().requires_grad_()
        for grad_in_forward in (True,) if self.interpreted else (False, True):
            total = cross_entropy(leaf, target, reduction="sum", grad_in_forward=grad_in_forward, **options)
            found += torch.autograd.grad(total, leaf, torch.full_like(total, 0.3))
        return found


def as_rows(found: list[Tensor], classes: int) -> list[Tensor]:
    """Return outputs (N, d) as (N * d,) and gradients (N, C, d) as (N * d, C)."""
    return [
        it.movedim(1, -1).reshape(-1, classes) if it.ndim > 2 or it.shape == (it.shape[0], classes) else it.reshape(-1)
        for it in found
    ]


def assert_same(found: list[Tensor], expected: list[Tensor], rows: slice, what: object) -> None:
    for number, (one, whole) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one, whole[rows]), (what, number)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch computes with."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(
    params=[
        pytest.param(CPU, id="cpu"),
        pytest.param(INTERPRETER, id="interpreter", marks=pytest.mark.slow),  # a second or two each
        *on_gpu(("gpu", GPU), ("gpu-torch", GPU_TORCH)),
    ]
)
def everywhere(request: pytest.FixtureRequest) -> Place:
    """Every device and backend; the interpreter's turn is a slow test."""
    return resolve(request)


TARGETS = ["indices", "weights and smoothing", "probabilities"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@crossed(classes=[3, 20, 700, 1001], dtype=DTYPES, target=TARGETS)
def test_number_of_rows_and_place_in_the_batch(place: Place, classes: int, dtype: torch.dtype, target: str) -> None:
    short, interpreted = classes <= 100, place == INTERPRETER  # which takes a while for each program
    number = (40 if interpreted else 600) if short else (3 if interpreted else 60)
    batch = Batch(place, (number, classes), dtype, target)
    whole = batch.compute(batch.logits, slice(None))
    for count in (1, 16) if short and interpreted else (1, 2) if interpreted else (1, 2, 7, 16, 33, number // 2):
        for start in (number - count,) if interpreted else (1, number - count):
            rows = slice(start, start + count)
            assert_same(batch.compute(batch.logits[rows], rows), whole, rows, rows)


@crossed(classes=[3, 301], dtype=[torch.float32, torch.bfloat16], target=TARGETS)
def test_layouts(everywhere: Place, classes: int, dtype: torch.dtype, target: str) -> None:
    batch = Batch(everywhere, (3, classes), dtype, target)
    whole = batch.compute(batch.logits, slice(None))
    wide = torch.zeros(3, 2 * classes // 16 * 16 + 16, dtype=dtype, device=everywhere.device)
    odd = torch.zeros(3, classes + 3, dtype=dtype, device=everywhere.device)
    places = ((wide, 1), (odd, 2)) if everywhere == INTERPRETER else ((wide, 0), (wide, 1), (odd, 2))
    for memory, first in places:  # rows that begin at multiples of 16 bytes, and others
        logits = memory[:, first : first + classes].copy_(batch.logits)
        assert_same(batch.compute(logits, slice(None)), whole, slice(None), (memory.shape, first))
    images = batch.compute(batch.logits.unsqueeze(2), slice(None), lambda t: t.unsqueeze(t.ndim))
    assert_same(as_rows(images, classes), whole, slice(None), "images of one pixel")


@crossed(classes=[3, 19], dtype=DTYPES, target=TARGETS)
def test_classes_that_lie_apart(everywhere: Place, classes: int, dtype: torch.dtype, target: str) -> None:
    batch = Batch(everywhere, (120, classes), dtype, target)
    found = None
    for images, pixels in ((2, 60), (9, 1), (1, 49), (3, 16)):
        rows = slice(images * pixels)
        memory = torch.zeros(images, classes, pixels + 1, dtype=dtype, device=everywhere.device)
        logits = memory[..., :pixels]  # classes are apart also where there is one pixel
        logits.copy_(batch.logits[rows].view(images, pixels, classes).movedim(2, 1))

        def view(it: Tensor, images: int = images, pixels: int = pixels) -> Tensor:
            it = it.view(images, pixels, *it.shape[1:])
            return it.movedim(2, 1) if it.ndim > 2 else it

        one = as_rows(batch.compute(logits, rows, view), classes)
        found = found or one
        assert_same(one, found, rows, (images, pixels))
    transposed = batch.logits[:33].t().contiguous().t()
    assert_same(batch.compute(transposed, slice(33)), found or [], slice(33), "transposed")


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_without_a_batch(place: Place, target: str) -> None:
    batch = Batch(place, (3, 1001), torch.float32, target)
    whole = batch.compute(batch.logits, slice(None))
    for row in (0, 2):
        one = [it.unsqueeze(0) for it in batch.compute(batch.logits[row], row)]
        assert_same(one, whole, slice(row, row + 1), row)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("classes", [10, 1000, 40_000])
def test_torch_operations_on_several_threads(threads: int, target: str, classes: int) -> None:
    number = {10: 600, 1000: 60, 40_000: 9}[classes]
    batch = Batch(CPU, (number, classes), torch.float32, target)
    batch.options["backend"] = "auto"
    whole = batch.compute(batch.logits, slice(None))
    for count in (1, 2, 3, number // 2):
        for start in (0, number - count):
            rows = slice(start, start + count)
            assert_same(batch.compute(batch.logits[rows], rows), whole, rows, (threads, rows))


def test_small_batches_on_the_cpu_are_no_operator_of_torch() -> None:
    classes = 4096
    logits, target = torch.randn(SMALL_CPU_NUMEL // classes + 1, classes), torch.zeros(1, dtype=torch.long)
    every = target.expand(len(logits))
    for options in ({}, {"weight": torch.rand(classes)}, {"dtype": torch.float64}):
        large = cross_entropy(logits, every, reduction="none", batch_invariant=True, **options)
        by_chunks = cross_entropy(
            logits[:1], target, reduction="none", backend="torch", batch_invariant=True, **options
        )
        small = cross_entropy(logits[:1], target, reduction="none", batch_invariant=True, **options)
        assert same_bits(small, by_chunks)
        assert same_bits(small, large[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (6, 10), (2, 5, 3), (2, 301), (2, 700)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "grad_in_forward": True}], ids=str)
def test_right(place: Place, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    logits = make_logits(shape, dtype, place.device)
    for target in (make_indices(shape, place.device), make_probabilities(shape, dtype, place.device)):
        assert_right(place, logits, target, reduction="none", batch_invariant=True, **options)
        assert_right(place, logits, target, batch_invariant=True, **options)


def test_infinite_logits(place: Place) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0], [-torch.inf] * 3, [torch.inf, 0.0, 1.0]], device=place.device)
    target = torch.tensor([1, 0, 1], device=place.device)
    options: dict[str, Any] = {"reduction": "none", "backend": place.backend}
    loss = cross_entropy(logits, target, batch_invariant=True, **options)
    torch.testing.assert_close(loss, cross_entropy(logits, target, **options), equal_nan=True)


@pytest.mark.parametrize("classes", [7, 1001])
def test_log_prob_of_several_classes(place: Place, classes: int) -> None:
    batch = Batch(place, (9, classes), torch.float32, "indices", with_ignored=False)
    chosen = torch.stack([(batch.target * k + k) % classes for k in range(1, 10)], 1)
    upstream = torch.rand(9, 9).to(place.device)

    def call(logits: Tensor, rows: slice | int) -> list[Tensor]:
        found = log_prob(logits, chosen[rows], backend=place.backend, batch_invariant=True)
        return [found.detach(), *torch.autograd.grad(found, logits, upstream[rows])]

    logits = batch.logits.requires_grad_()
    whole = call(logits, slice(None))
    for rows in (slice(3, 5), slice(8, 9)):
        assert_same(call(batch.logits.detach()[rows].requires_grad_(), rows), whole, rows, rows)
    one = call(batch.logits.detach()[4].requires_grad_(), 4)
    assert_same([it.unsqueeze(0) for it in one], whole, slice(4, 5), "without a batch")


# The linear layer, whose products with the identity are exact


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_chunks_of_a_linear_layer(place: Place, softcap: float | None) -> None:
    classes = 150
    batch = Batch(place, (4, classes), torch.float32, "indices", with_ignored=False)
    identity = torch.eye(classes, device=place.device)
    options: dict[str, Any] = {"backend": place.backend, "batch_invariant": True, "softcap": softcap}

    def call(rows: slice, chunk: int | None) -> list[Tensor]:
        x, target = batch.logits[rows].clone().requires_grad_(), batch.target[rows]
        losses = linear_cross_entropy(x, identity, target, reduction="none", chunk_rows=chunk, **options)
        total = linear_cross_entropy(x, identity, target, reduction="sum", chunk_rows=chunk, **options)
        out = linear_cross_entropy_rows(x, identity, target, outputs=("loss", "entropy"), chunk_rows=chunk, **options)
        grads = [
            *torch.autograd.grad(losses, x, batch.upstream[rows]),
            *torch.autograd.grad(total, x),
            *torch.autograd.grad([out.loss, out.entropy], x, [batch.upstream[rows]] * 2),
        ]
        return [losses.detach(), out.loss.detach(), out.entropy.detach(), *grads]

    whole = call(slice(None), None)
    assert_same(call(slice(1, 4), 2), whole, slice(1, 4), "two chunks")
    if softcap is None and place not in (CPU, GPU_TORCH):
        z, t = batch.logits, batch.target
        alone = cross_entropy(z, t, reduction="none", backend=place.backend, batch_invariant=True)
        assert same_bits(alone, whole[0])


# What is decided


def plans_of(rows: int, classes: int, dtype: torch.dtype, stride: int) -> list[Launch]:
    """Return the launches of a loss, its gradient, both at once, and outputs of rows and their gradient."""
    shape, strides = (rows, classes), (stride, 1)
    logits, target = torch.empty(1, dtype=dtype).expand(shape), torch.empty(1, dtype=torch.int64).expand(rows)
    spec = make_spec(logits, target, "none", -100, 0.1, dtype, batch_invariant=True)
    options = RowSpec(spec, 1.0, None, ("loss", "entropy"))
    device = torch.device("cpu")
    where = (dtype, shape, strides, (1,))
    upstream = ((1,), None, (1,), None)
    return [
        triton_cross_entropy.plan_loss(spec, True, False, *where, None, False, device).launch,
        triton_cross_entropy.plan_loss(spec, True, True, *where, None, False, device).launch,
        triton_cross_entropy.plan_gradient(spec, False, *where, None, (1,), device).launch,
        triton_row_outputs.plan_rows(options, *where, None, device).launch,
        triton_row_outputs.plan_rows_gradient(options, *where, None, upstream, None, device).launch,
    ]


def decided(launch: Launch) -> tuple[Any, ...]:
    """Return what of a launch decides the order of a row's arithmetic.

    Of a tile of several rows the number of lanes does not: a lane has a row, and each of its sums goes by halves.
    """
    layout, *_, whole, block, lanes, vector = launch.arguments
    threads = (lanes, launch.warps) if vector else None
    return layout.parts, layout.invariant, whole, block, vector, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 10, 100, 1000, 1001, 50_257])
def test_launches_do_not_depend_on_the_number_of_rows(classes: int, dtype: torch.dtype) -> None:
    vector = 16 // dtype.itemsize
    for stride in (classes, classes + 1, classes // 16 * 16 + 16):
        first = [decided(launch) for launch in plans_of(1, classes, dtype, stride)]
        assert {parts for parts, *_ in first} == {1}
        for rows in (2, 3, 16, 17, 256, 257, 600, 60_000):
            launches = plans_of(rows, classes, dtype, stride)
            assert [decided(launch) for launch in launches] == first
            unaligned = classes > 128 and stride % vector != 0
            assert all((launch.arguments[0].unaligned is not None) == unaligned for launch in launches)


def test_a_decision_is_not_kept_for_calls_without_the_option(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    operations = f"softmax_fused.backends.{place.backend}.cross_entropy.loss"
    module = __import__(operations.rsplit(".", 1)[0], fromlist=["loss"])
    real = module.loss
    monkeypatch.setattr(module, "loss", lambda *a, **k: (seen.append(a[3].batch_invariant), real(*a, **k))[1])
    logits, target = torch.randn(4, 12, device=place.device), torch.zeros(4, dtype=torch.long, device=place.device)
    for batch_invariant in (False, True, False):
        cross_entropy(logits, target, backend=place.backend, batch_invariant=batch_invariant)
    assert seen == [False, True, False]


# Modules and torch.compile


def test_modules(place: Place) -> None:
    batch = Batch(place, (9, 1001), torch.float32, "indices")
    criterion = CrossEntropyLoss(reduction="none", backend=place.backend, batch_invariant=True)
    assert "batch_invariant=True" in repr(criterion)
    assert "batch_invariant" not in repr(CrossEntropyLoss())
    whole = criterion(batch.logits, batch.target)
    expected = cross_entropy(batch.logits, batch.target, reduction="none", **batch.options)
    assert same_bits(whole, expected)
    assert same_bits(criterion(batch.logits[4:5], batch.target[4:5]), whole[4:5])
    layer = LinearCrossEntropyLoss(8, 5, backend=place.backend, batch_invariant=True, device=place.device)
    assert layer(torch.randn(3, 8, device=place.device), torch.zeros(3, dtype=torch.long, device=place.device)) > 0


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear layer"])
def test_a_graph_has_our_operator(linear: bool) -> None:
    logits, target = torch.randn(6, 300, requires_grad=True), torch.randint(300, (6,))
    identity, graphs = torch.eye(300), []

    def call(z: Tensor, t: Tensor) -> Tensor:
        if linear:
            return linear_cross_entropy(z, identity, t, reduction="none", batch_invariant=True)
        return cross_entropy(z, t, reduction="none", batch_invariant=True)

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(module.graph))
        return module.forward

    compiled = torch.compile(call, backend=keep, fullgraph=True)
    loss, expected = compiled(logits, target), call(logits, target)
    assert len(graphs) == 1
    assert "softmax_fused" in graphs[0]
    assert same_bits(loss, expected)
    upstream = torch.rand(6)
    (grad,), (expected_grad,) = (torch.autograd.grad(it, logits, upstream) for it in (loss, expected))
    assert same_bits(grad, expected_grad)


def test_sparse_targets(place: Place) -> None:
    logits = make_logits((12, 300), torch.float32, place.device).detach()
    upstream = torch.rand(12, device=place.device)
    classes, p = torch.randint(300, (12, 7), device=place.device), torch.rand(12, 7, device=place.device)

    def compute(rows: slice) -> list[Tensor]:
        target = sparse_target(classes[rows], p[rows])
        options: dict[str, Any] = {"label_smoothing": 0.1, "backend": place.backend}

        def call(z: Tensor) -> tuple[Tensor, ...]:
            loss = cross_entropy(z, target, reduction="none", batch_invariant=True, **options)
            found = cross_entropy_rows(z, target, outputs=("loss", "entropy"), batch_invariant=True, **options)
            return loss, found.loss, found.entropy

        return with_gradient(logits[rows], upstream[rows], call)

    every = compute(slice(None))
    for rows in (slice(0, 1), slice(3, 5), slice(5, 12)):
        assert all(same_bits(few, all_[rows]) for few, all_ in zip(compute(rows), every, strict=True))
