"""Outputs of rows whose classes are divided among ranks, and of such linear layers, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softmax_fused import RowOutputs, distributed, linear_cross_entropy_rows
from softmax_fused._row_outputs import DEFAULT, DIFFERENTIABLE, OUTPUTS
from softmax_fused.distributed.merge import KNOWN
from tests import reference, test_row_outputs
from tests.cases import crossed, make_indices, make_probabilities
from tests.conftest import CPU, GPU, GPU_TORCH, INTERPRETER, Place, on_gpu, resolve
from tests.ranks import part_of
from tests.replayed_ranks import Ranks, as_group
from tests.test_linear import changed
from tests.test_row_outputs import assert_near

SHAPES = {(5, 23): [2, 0, 20, 1], (3, 6, 7): [1, 5], (2, 700): [150, 550], (7,): [3, 4], (300, 5): [4, 1], (4, 9): [9]}
SOFT = DIFFERENTIABLE


@pytest.fixture(
    params=[
        pytest.param(CPU, id="cpu"),
        pytest.param(INTERPRETER, id="interpreter", marks=pytest.mark.slow),  # a second each; the first test has a few
        *on_gpu(("gpu", GPU), ("gpu-torch", GPU_TORCH)),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    """Every device and backend."""
    return resolve(request)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """The ranks of a group, one after another."""
    return as_group(monkeypatch)


def bits(outputs: RowOutputs) -> list[Tensor]:
    """The outputs that there are, as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [it.detach().contiguous().view(kinds[it.itemsize]) for it in outputs if it is not None]


def dimension(tensor: Tensor) -> int:
    return min(tensor.ndim - 1, 1)


def local(whole: Tensor | None, sizes: list[int], rank: int, dim: int) -> Tensor | None:
    return None if whole is None else part_of(whole, sizes, rank, dim)


def assert_outputs(got: RowOutputs, truth: RowOutputs, outputs: tuple[str, ...], dtype: torch.dtype) -> None:
    for name in OUTPUTS:
        ours, exact = getattr(got, name), getattr(truth, name)
        if name not in outputs:
            assert ours is None
        elif name in SOFT:
            assert (ours.shape, ours.dtype) == (exact.shape, dtype)
            assert_near(ours.detach(), exact.detach(), dtype)
        else:
            assert torch.equal(ours, exact), name


def upstream_of(rows: RowOutputs, outputs: tuple[str, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(getattr(rows, name).shape, dtype=torch.float64, generator=generator)
        for name in SOFT
        if name in outputs
    ]


def soft_of(rows: RowOutputs, outputs: tuple[str, ...]) -> list[Tensor]:
    return [getattr(rows, name) for name in SOFT if name in outputs]


def reductions(outputs: tuple[str, ...]) -> list[str]:
    return ["MAX", "SUM"] + ["MIN"] * ("prediction" in outputs)


def numbers(weight: Tensor | None, soft: bool, outputs: tuple[str, ...], smoothing: float) -> list[int]:
    """How many numbers a row the all-reduces of forward have, as the documentation says."""
    of_loss = 1 if soft else 2
    if "loss" in outputs:
        weighted = weight is not None
        of_loss = 3 if soft else 2 + weighted + (smoothing > 0) * (1 + weighted)
    prediction = "prediction" in outputs
    return [1 + prediction, of_loss + ("entropy" in outputs)] + [1] * prediction


def assert_right(
    ranks: Ranks, place: Place, z: Tensor, target: Tensor, weight: Tensor | None, sizes: list[int],
    outputs: tuple[str, ...], dtype: torch.dtype | None = None, **options: Any,
) -> None:  # fmt: skip
    """Compare outputs, and the slices' gradients of all of them together, with float64."""
    dim, soft = dimension(z), target.ndim == z.ndim
    truth_leaf = z.detach().double().requires_grad_()
    truth = test_row_outputs.reference(truth_leaf, target, weight, **options)
    upstream = [g.to(z.device) for g in upstream_of(truth, outputs)]

    def work(rank: int) -> tuple[RowOutputs, Tensor | None]:
        own = part_of(z, sizes, rank, dim).detach().requires_grad_()
        rows = distributed.cross_entropy_rows(
            own, local(target, sizes, rank, dim) if soft else target, local(weight, sizes, rank, 0),
            outputs=outputs, dtype=dtype, sizes=sizes, backend=place.backend, **options,
        )  # fmt: skip
        if not upstream:
            return rows, None
        g = [it.to(dtype or z.dtype) for it in upstream]
        return rows, torch.autograd.grad(soft_of(rows, outputs), own, g)[0]

    found = ranks.run(len(sizes), work)
    assert ranks.operations == (reductions(outputs) if len(sizes) > 1 else [])
    if len(sizes) > 1:
        smoothing = options.get("label_smoothing", 0.0)
        row_count = z.numel() // z.shape[dim]
        of_rows = [it.result.numel() / row_count for it in ranks.done]
        assert of_rows == numbers(weight, soft, outputs, smoothing)
    for rows, _ in found:
        assert_outputs(rows, truth, outputs, dtype or z.dtype)
        assert all(map(torch.equal, bits(rows), bits(found[0][0])))
    if upstream:
        g = [it.to(dtype or z.dtype).double() for it in upstream]
        (exact,) = torch.autograd.grad(soft_of(truth, outputs), truth_leaf, g)
        grad = torch.cat([grad for _, grad in found], dim)
        assert grad.dtype == z.dtype
        assert_near(grad, exact, z.dtype)


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, place: Place) -> Tensor:
    return (3 * torch.randn(shape, dtype=torch.float64)).to(place.device, dtype)


def ignoring(target: Tensor, ignore_index: int) -> Tensor:
    if target.ndim:
        target.view(-1)[1::3] = ignore_index
    return target


@pytest.mark.parametrize("kind", ["indices", "probabilities", "layer"])
def test_kernels(ranks: Ranks, kernels: Place, kind: str) -> None:
    sizes, shape = [2, 0, 20, 1], (5, 23)
    weight = torch.rand(23, device=kernels.device) + 0.5
    target = ignoring(make_indices(shape, kernels.device), -100)
    options = {"label_smoothing": 0.1, "softcap": 5.0}
    if kind == "layer":
        tensors = layer(shape, 4, torch.float32, kernels)
        assert_layer(ranks, kernels, tensors, target, weight, sizes, ("loss", "entropy"), chunk_rows=3, **options)
    elif kind == "indices":
        assert_right(
            ranks, kernels, make_logits(shape, torch.float32, kernels), target, weight, sizes, KNOWN, **options
        )
    else:
        target = make_probabilities(shape, torch.float32, kernels.device)
        z = make_logits(shape, torch.float32, kernels)
        assert_right(ranks, kernels, z, target, weight, sizes, DEFAULT, **options)


@crossed(
    shape=list(SHAPES),
    outputs=[*((name,) for name in KNOWN), DEFAULT, KNOWN],
    weighted=[False, True],
    smoothing=[0.0, 0.1, 1.0],
    transform=[{}, {"logit_scale": 0.5}, {"softcap": 4.0}, {"logit_scale": 2.0, "softcap": 5.0}],
    dtype=[torch.float32, torch.float64],
)
def test_class_indices(
    ranks: Ranks, place: Place, shape: tuple[int, ...], outputs: tuple[str, ...], weighted: bool, smoothing: float,
    transform: dict[str, float], dtype: torch.dtype,
) -> None:  # fmt: skip
    z = make_logits(shape, dtype, place)
    ignore_index = -100 if smoothing else 2
    target = ignoring(make_indices(shape, place.device), ignore_index)
    weight = torch.rand(shape[dimension(z)], device=place.device).to(dtype) + 0.5 if weighted else None
    assert_right(
        ranks, place, z, target, weight, SHAPES[shape], outputs,
        label_smoothing=smoothing, ignore_index=ignore_index, **transform,
    )  # fmt: skip


@crossed(
    shape=list(SHAPES),
    outputs=[("loss",), ("prediction",), ("entropy", "logsumexp"), DEFAULT],
    weighted=[False, True],
    smoothing=[0.0, 0.1],
    transform=[{}, {"logit_scale": 2.0, "softcap": 5.0}],
)
def test_class_probabilities(
    ranks: Ranks, place: Place, shape: tuple[int, ...], outputs: tuple[str, ...], weighted: bool, smoothing: float,
    transform: dict[str, float],
) -> None:  # fmt: skip
    z = make_logits(shape, torch.float32, place)
    target = make_probabilities(shape, torch.float32, place.device)
    weight = torch.rand(shape[dimension(z)], device=place.device) + 0.5 if weighted else None
    assert_right(ranks, place, z, target, weight, SHAPES[shape], outputs, label_smoothing=smoothing, **transform)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_bfloat16(ranks: Ranks, place: Place, dtype: torch.dtype | None) -> None:
    z = make_logits((5, 23), torch.bfloat16, place)
    target = ignoring(make_indices((5, 23), place.device), -100)
    weight = torch.rand(23, device=place.device).to(dtype if dtype is torch.float32 else torch.bfloat16)
    assert_right(ranks, place, z, target, weight, [2, 0, 20, 1], KNOWN, dtype, label_smoothing=0.1)


HARD = 14


def hard_problem(dtype: torch.dtype, place: Place, sizes: list[int], soft: bool) -> tuple[Tensor, Tensor]:
    """Logits at which the maximum, the logarithm or a product with 0 goes wrong first."""
    classes, first = sum(sizes), sizes[0]
    z = 3 * torch.randn(HARD, classes, dtype=torch.float64)
    target = torch.randint(first, classes, (HARD,))
    z[0, :first] = -torch.inf  # a slice wholly -inf
    z[1, first:] = -torch.inf  # all but one
    target[1] = 0
    z[2] = -torch.inf
    z[3, classes - 1] = torch.nan
    z[4, first] = torch.inf
    z[5] += 1e4
    z[6] -= 3e4
    z[7, first] = 1e30
    target[7] = first
    z[8, :first] -= 1e4  # a slice whose share underflows
    z[9] = z[9].clamp(max=2)  # ties for the largest
    z[10] = -21.0
    z[10, target[10]] = 0.0  # confident, within its slice
    z[11, :] = 1.0
    z[12, first] = z[12, classes - 1] = torch.inf
    z[13, 0], z[13, classes - 1] = torch.inf, torch.nan
    probabilities = torch.randn(HARD, classes, dtype=torch.float64).softmax(1)
    probabilities[0, :first] = 0
    probabilities[1, first:] = 0
    return z.to(place.device, dtype), (probabilities.to(dtype) if soft else target).to(place.device)


def by_formula(z: Tensor, target: Tensor, smoothing: float, upstream: dict[str, Tensor]) -> tuple[RowOutputs, Tensor]:
    """Outputs and gradient in float64, with 0 log 0 = 0, which automatic differentiation makes NaN."""
    losses = reference.cross_entropy(
        z, target, reduction="none", label_smoothing=smoothing, upstream=upstream.get("loss", 0.0)
    )
    x = z.double()
    log_p = torch.log_softmax(x, 1)
    p = log_p.exp()
    finite = torch.where(p == 0, 0, log_p)
    entropy = -(p * finite).sum(1)
    grad = losses.grad + p * (upstream["logsumexp"] - upstream["entropy"] * (finite.T + entropy)).T
    log_prob = None
    if target.ndim == 1:
        log_prob = log_p.gather(1, target[:, None])[:, 0]
        one_hot = torch.nn.functional.one_hot(target, z.shape[1])
        grad = grad + (one_hot - p) * upstream["log_prob"][:, None]
    return RowOutputs(losses.loss, x.logsumexp(1), x.argmax(1), entropy, log_prob, None), grad  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["indices", "smoothing", "probabilities"])
@pytest.mark.parametrize("sizes", [[5, 15], [5, 0, 7, 8]], ids=str)
def test_hard_rows(ranks: Ranks, place: Place, kind: str, dtype: torch.dtype, sizes: list[int]) -> None:
    soft = kind == "probabilities"
    z, target = hard_problem(dtype, place, sizes, soft)
    outputs = DEFAULT if soft else KNOWN
    names = [name for name in SOFT if name in outputs]
    g = {name: torch.randn(HARD, dtype=torch.float64).to(place.device, dtype) for name in names}
    smoothing = 0.1 * (kind == "smoothing")

    def work(rank: int) -> tuple[RowOutputs, Tensor]:
        own = part_of(z, sizes, rank, 1).detach().requires_grad_()
        rows = distributed.cross_entropy_rows(
            own, part_of(target, sizes, rank, 1) if soft else target, label_smoothing=smoothing, outputs=outputs,
            sizes=sizes, backend=place.backend,
        )  # fmt: skip
        return rows, torch.autograd.grad(soft_of(rows, outputs), own, list(g.values()))[0]

    found = ranks.run(len(sizes), work)
    truth, exact = by_formula(z, target, smoothing, {name: it.double() for name, it in g.items()})
    grad = torch.cat([it for _, it in found], 1)
    for row in range(HARD):  # each by itself: a tolerance is in proportion to the largest number
        ours, formula = (RowOutputs(*(None if it is None else it[row] for it in rows)) for rows in (found[0][0], truth))
        assert_outputs(ours, formula, outputs, dtype)
        assert_near(grad[row], exact[row], dtype)
    assert all(all(map(torch.equal, bits(rows), bits(found[0][0]))) for rows, _ in found)


def test_confident_rows(ranks: Ranks, place: Place) -> None:
    """p = 1 - 1e-9 of the label: loss, log p and their gradients keep their digits in float32."""
    sizes = [4, 0, 4, 4]
    z = torch.full((4, 12), -21.0, device=place.device)
    target = torch.tensor([0, 5, 11, 3], device=place.device)
    z[torch.arange(4), target] = 0.0

    def work(rank: int) -> tuple[RowOutputs, Tensor]:
        own = part_of(z, sizes, rank, 1).detach().requires_grad_()
        rows = distributed.cross_entropy_rows(
            own, target, outputs=("loss", "log_prob"), sizes=sizes, backend=place.backend
        )
        return rows, torch.autograd.grad(rows.loss.sum() - 2 * rows.log_prob.sum(), own)[0]

    found = ranks.run(len(sizes), work)
    truth = reference.cross_entropy(z, target, reduction="none")
    for rows, _ in found:
        torch.testing.assert_close(rows.loss.detach().double(), truth.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(-rows.log_prob.detach().double(), truth.loss, rtol=1e-5, atol=0)
    grad = torch.cat([it for _, it in found], 1)
    torch.testing.assert_close(grad.double(), 3 * truth.grad, rtol=1e-5, atol=0)


def layer(shape: tuple[int, ...], features: int, dtype: torch.dtype, place: Place) -> list[Tensor]:
    """Input, weight and bias of a layer whose logits have a shape."""
    rows, sizes = (shape[:1], shape[1:]) if len(shape) > 1 else ((), shape)
    shapes = ((*rows, features), (*sizes, features), sizes)
    return [torch.randn(it, dtype=torch.float64).to(place.device, dtype) for it in shapes]


def all_logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    bias = None if b is None else b.flatten()
    return torch.nn.functional.linear(x, w.flatten(0, -2), bias).view(*x.shape[:-1], *w.shape[:-1])


def part_of_layer(tensors: list[Tensor], sizes: list[int], rank: int, needs: tuple[bool, ...]) -> list[Tensor]:
    """The input, the same on every rank, and a rank's slices of weight and bias."""
    x, w, b = tensors
    parts = (x, part_of(w, sizes, rank, 0), part_of(b, sizes, rank, 0))
    return [it.detach().clone().requires_grad_(need) for it, need in zip(parts, needs, strict=True)]


def assert_layer(
    ranks: Ranks, place: Place, tensors: list[Tensor], target: Tensor, weight: Tensor | None, sizes: list[int],
    outputs: tuple[str, ...], needs: tuple[bool, ...] = (True, True, True), bias: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Compare outputs and the gradients of input, weight and bias, of all outputs together, with float64."""
    x, w, _ = tensors
    ndim = x.ndim + w.ndim - 2
    dim, soft, dtype = min(ndim - 1, 1), target.ndim == ndim, options.get("dtype") or x.dtype
    maths = {name: value for name, value in options.items() if name not in ("dtype", "chunk_rows")}
    leaves = [it.detach().double().requires_grad_() for it in tensors]
    truth = test_row_outputs.reference(all_logits(*leaves[:2], leaves[2] if bias else None), target, weight, **maths)
    upstream = [g.to(x.device, dtype) for g in upstream_of(truth, outputs)]

    def work(rank: int) -> tuple[RowOutputs, list[Tensor | None]]:
        own = part_of_layer(tensors, sizes, rank, needs)
        rows = distributed.linear_cross_entropy_rows(
            *own[:2], local(target, sizes, rank, dim) if soft else target, local_bias=own[2] if bias else None,
            weight=local(weight, sizes, rank, 0), outputs=outputs, sizes=sizes, backend=place.backend, **options,
        )  # fmt: skip
        if upstream and any(needs):
            torch.autograd.backward(soft_of(rows, outputs), upstream)
        return rows, [it.grad for it in own]

    found = ranks.run(len(sizes), work)
    of_input = ["SUM"] * (needs[0] and bool(upstream))
    assert ranks.operations == (reductions(outputs) + of_input if len(sizes) > 1 else [])
    for rows, _ in found:
        assert_outputs(rows, truth, outputs, dtype)
        assert all(map(torch.equal, bits(rows), bits(found[0][0])))
    if not (upstream and any(needs)):
        return
    torch.autograd.backward(soft_of(truth, outputs), [g.double() for g in upstream])
    for place_of, exact in enumerate(leaves):
        got = [grads[place_of] for _, grads in found]
        if not needs[place_of] or exact.grad is None:
            assert got == [None] * len(sizes)
        elif place_of == 0:
            assert all(torch.equal(it, got[0]) for it in got)
            assert_near(got[0], exact.grad, x.dtype)
        else:
            assert_near(torch.cat(got), exact.grad, x.dtype)


@crossed(
    shape=[(9, 23), (6, 6, 7), (7,), (40, 5)],
    outputs=[("loss",), ("log_prob", "entropy"), ("prediction",), KNOWN],
    weighted=[False, True],
    smoothing=[0.0, 0.1],
    transform=[{}, {"logit_scale": 2.0, "softcap": 5.0}],
    chunk_rows=[None, 2],
    needs=[(True, True, True), (True, False, False), (False, True, True), (False, False, False)],
    bias=[True, False],
)
def test_layer_with_class_indices(
    ranks: Ranks, place: Place, shape: tuple[int, ...], outputs: tuple[str, ...], weighted: bool, smoothing: float,
    transform: dict[str, float], chunk_rows: int | None, needs: tuple[bool, ...], bias: bool,
) -> None:  # fmt: skip
    sizes = {23: [2, 0, 20, 1], 6: [1, 5], 7: [3, 4], 5: [5]}[shape[min(len(shape) - 1, 1)]]
    target = ignoring(make_indices(shape, place.device), -100)
    weight = torch.rand(sum(sizes), dtype=torch.float64, device=place.device) + 0.5 if weighted else None
    assert_layer(
        ranks, place, layer(shape, 4, torch.float64, place), target, weight, sizes, outputs, needs, bias,
        label_smoothing=smoothing, chunk_rows=chunk_rows, **transform,
    )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9, 23), (7,)], ids=str)
def test_layer_with_class_probabilities(ranks: Ranks, place: Place, shape: tuple[int, ...], weighted: bool) -> None:
    sizes = {23: [2, 0, 20, 1], 7: [3, 4]}[shape[-1]]
    target = make_probabilities(shape, torch.float64, place.device)
    weight = torch.rand(shape[-1], dtype=torch.float64, device=place.device) + 0.5 if weighted else None
    tensors = layer(shape, 4, torch.float64, place)
    assert_layer(ranks, place, tensors, target, weight, sizes, DEFAULT, label_smoothing=0.1, chunk_rows=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_of_fewer_bits(ranks: Ranks, place: Place, dtype: torch.dtype) -> None:
    """Integers, of which products and sums are exact, so that the logits are the same in float64."""
    x, w, b = (torch.randint(-2, 3, shape).to(place.device, dtype) for shape in ((9, 4), (23, 4), (23,)))
    target = ignoring(make_indices((9, 23), place.device), -100)
    outputs = tuple(name for name in KNOWN if name != "prediction") if dtype is torch.float32 else ("loss", "entropy")
    assert_layer(ranks, place, [x, w, b], target, None, [2, 0, 20, 1], outputs, dtype=torch.float32, chunk_rows=4)


@crossed(
    kind=["indices", "all ignored", "weights", "smoothing", "probabilities"],
    reduction=["mean", "sum", "none"],
    transform=[{}, {"logit_scale": 0.5, "softcap": 3.0}],
    shape=[(9, 23), (6, 6, 7), (7,)],
)
def test_loss_of_a_layer(
    ranks: Ranks, place: Place, kind: str, reduction: str, transform: dict[str, float], shape: tuple[int, ...]
) -> None:
    dim = min(len(shape) - 1, 1)
    sizes = {23: [2, 0, 20, 1], 6: [1, 5], 7: [3, 4]}[shape[dim]]
    soft, tensors = kind == "probabilities", layer(shape, 4, torch.float64, place)
    target = ignoring(make_indices(shape, place.device), -100)
    if soft:
        target = make_probabilities(shape, torch.float64, place.device)
    if kind == "all ignored":
        target.fill_(-100)
    weight = torch.rand(shape[dim], dtype=torch.float64, device=place.device) if kind == "weights" else None
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1 * (kind == "smoothing")}

    def work(rank: int) -> tuple[Tensor, list[Tensor]]:
        own = part_of_layer(tensors, sizes, rank, (True, True, True))
        loss = distributed.linear_cross_entropy(
            *own[:2], local(target, sizes, rank, dim) if soft else target, local_bias=own[2],
            weight=local(weight, sizes, rank, 0), sizes=sizes, backend=place.backend, **options, **transform,
        )  # fmt: skip
        loss.sum().backward()
        return loss.detach(), [it.grad for it in own]

    found = ranks.run(len(sizes), work)
    assert ranks.operations == ["MAX", "SUM", "SUM"]
    leaves = [it.clone().requires_grad_() for it in tensors]
    logits = changed(all_logits(*leaves), transform.get("logit_scale", 1.0), transform.get("softcap"))
    truth = torch.nn.functional.cross_entropy(logits, target, weight, **options)
    truth.sum().backward()
    for loss, grads in found:
        assert_near(loss, truth.detach(), torch.float64)
        assert torch.equal(loss.nan_to_num(), found[0][0].nan_to_num())
        if kind == "all ignored":
            assert all(it.eq(0).all() or reduction == "mean" for it in grads)
        else:
            assert_near(grads[0], leaves[0].grad, torch.float64)
    if kind != "all ignored":
        for place_of in (1, 2):
            assert_near(torch.cat([grads[place_of] for _, grads in found]), leaves[place_of].grad, torch.float64)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 1, 5]], ids=str)
def test_infinite_weights_do_what_they_do_in_torch(ranks: Ranks, place: Place, soft: bool, sizes: list[int]) -> None:
    z = torch.randn(6, 7, dtype=torch.float64)
    z[:3, 1] = 9  # the class with the infinite weight is the most probable, or not
    target = make_probabilities((6, 7), z.dtype, "cpu") if soft else torch.tensor([0, 1, 2, 0, 1, 6])
    weight = torch.tensor([1, torch.inf, 1, 0.5, 1, 1, 0], dtype=torch.float64)
    z, target, weight = (it.to(place.device) for it in (z, target, weight))
    for smoothing in (0.0, 0.1):

        def work(rank: int, smoothing: float = smoothing) -> tuple[Tensor, Tensor]:
            own = part_of(z, sizes, rank, 1).detach().requires_grad_()
            rows = distributed.cross_entropy_rows(
                own, part_of(target, sizes, rank, 1) if soft else target, part_of(weight, sizes, rank, 0),
                label_smoothing=smoothing, outputs="loss", sizes=sizes, backend=place.backend,
            )  # fmt: skip
            return rows.loss.detach(), torch.autograd.grad(rows.loss.sum(), own)[0]

        leaf = z.clone().requires_grad_()
        truth = torch.nn.functional.cross_entropy(leaf, target, weight, reduction="none", label_smoothing=smoothing)
        (exact,) = torch.autograd.grad(truth.sum(), leaf)
        found = ranks.run(len(sizes), work)
        for loss, _ in found:
            torch.testing.assert_close(loss, truth.detach())
        torch.testing.assert_close(torch.cat([grad for _, grad in found], 1), exact, equal_nan=True)


def test_layer_under_autocast(ranks: Ranks, place: Place) -> None:
    """The products are of autocast's type, the outputs of float32, as those of the whole layer."""
    x, w, b = layer((9, 23), 4, torch.float32, place)
    target = ignoring(make_indices((9, 23), place.device), -100)
    sizes = [2, 0, 20, 1]

    def work(rank: int) -> tuple[RowOutputs, list[Tensor]]:
        own = part_of_layer([x, w, b], sizes, rank, (True, True, True))
        with torch.autocast(place.device, dtype=torch.bfloat16):
            rows = distributed.linear_cross_entropy_rows(
                *own[:2], target, local_bias=own[2], sizes=sizes, backend=place.backend
            )
        return rows, list(torch.autograd.grad(rows.loss.sum(), own))

    found = ranks.run(len(sizes), work)
    leaves = [it.clone().requires_grad_() for it in (x, w, b)]
    with torch.autocast(place.device, dtype=torch.bfloat16):
        whole = linear_cross_entropy_rows(
            *leaves[:2], target, linear_bias=leaves[2], chunk_rows=4, backend=place.backend
        )
    exact = torch.autograd.grad(whole.loss.sum(), leaves)
    assert found[0][0].loss.dtype is torch.float32
    assert_near(found[0][0].loss.detach(), whole.loss.detach().double(), torch.float32)
    assert_near(found[0][1][0], exact[0].double(), torch.bfloat16)
    for place_of in (1, 2):
        assert_near(torch.cat([grads[place_of] for _, grads in found]), exact[place_of].double(), torch.float32)
