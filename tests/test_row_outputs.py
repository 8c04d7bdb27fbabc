"""Several outputs of each row: values and gradients against float64, each alone and together, in every place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import RowOutputs, cross_entropy_rows
from softmax_fused._dispatch import get_backend
from softmax_fused._row_outputs import DEFAULT, OUTPUTS
from softmax_fused._spec import RowSpec
from softmax_fused.backends.torch import BACKEND as TORCH
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.functional.rows import NAMES
from tests.cases import ULPS, make_indices, make_logits, make_probabilities, row_shape
from tests.conftest import INTERPRETER, Place

INF = float("inf")
SOFT = ("loss", "logsumexp", "entropy", "log_prob")


def reference(
    z: Tensor, target: Tensor, weight: Tensor | None = None, *, logit_scale: Tensor | float = 1.0,
    softcap: float | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
) -> RowOutputs:  # fmt: skip
    """The definitions, in float64."""
    dim = min(z.ndim - 1, 1)
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.double().expand(row_shape(z.shape)).unsqueeze(dim)
    x = z.double() * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    target = target if target.ndim < z.ndim else target.double()
    loss = F.cross_entropy(
        x, target, None if weight is None else weight.double(),
        ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing,
    )  # fmt: skip
    log_p = torch.log_softmax(x, dim)
    entropy = -torch.where(log_p == -INF, 0, log_p.exp() * log_p).sum(dim)
    log_prob = rank = None
    if target.ndim < z.ndim:
        ignored = target == ignore_index
        log_prob = log_p.gather(dim, target.masked_fill(ignored, 0).unsqueeze(dim)).squeeze(dim).masked_fill(ignored, 0)
        y = z.detach().double() * logit_scale
        y_target = y.gather(dim, target.masked_fill(ignored, 0).unsqueeze(dim))
        larger = (y > y_target) | y.isnan() | y_target.isnan()
        rank = larger.sum(dim).masked_fill(ignored, -1)
    return RowOutputs(loss, torch.logsumexp(x, dim), x.argmax(dim), entropy, log_prob, rank)


def assert_near(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    eps = ULPS[dtype] * torch.finfo(dtype).eps
    size = truth.nan_to_num(posinf=0, neginf=0).abs().max().item()
    atol = eps * max(size, 1) + 1e-7 * (eps > 1e-4)
    torch.testing.assert_close(got.double(), truth, rtol=eps, atol=atol, equal_nan=True)


def assert_right(
    place: Place,
    z: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    outputs: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Compare the outputs, and the gradient under random upstream gradients of all of them, with float64."""
    outputs = outputs or (NAMES if target.ndim < z.ndim else DEFAULT)
    before, version = z.detach().clone(), z._version
    rows = cross_entropy_rows(z, target, weight, outputs=outputs, dtype=dtype, backend=place.backend, **options)
    leaf = z.detach().double().requires_grad_()
    truth = reference(leaf, target, weight, **options)
    for name in NAMES:
        got, exact = getattr(rows, name), getattr(truth, name)
        if name not in outputs:
            assert got is None
        elif name not in SOFT:
            assert got.dtype is torch.int64
            assert torch.equal(got, exact)
        else:
            assert (got.shape, got.dtype) == (exact.shape, dtype or z.dtype)
            assert_near(got.detach(), exact.detach(), got.dtype)
    soft = [name for name in SOFT if name in outputs]
    if not soft:
        return
    upstream = [
        torch.randn(getattr(truth, name).shape, dtype=torch.float64).to(z.device, dtype or z.dtype) for name in soft
    ]
    (grad,) = torch.autograd.grad([getattr(rows, name) for name in soft], z, upstream)
    (exact,) = torch.autograd.grad([getattr(truth, name) for name in soft], leaf, [g.double() for g in upstream])
    assert (grad.shape, grad.dtype) == (z.shape, z.dtype)
    assert_near(grad, exact, z.dtype)
    assert torch.equal(z.detach(), before)
    assert z._version == version


SHAPES = [(10,), (7, 10), (5, 1), (3, 100), (2, 129), (3, 1003), (1, 5000), (2, 6, 40), (2, 19, 3, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_right(place, make_logits(shape, dtype, place.device), make_indices(shape, place.device))


@pytest.mark.parametrize(
    "outputs",
    [(name,) for name in NAMES] + [("loss", "prediction"), ("logsumexp", "entropy"), ("log_prob", "entropy")],
    ids=str,
)
@pytest.mark.parametrize("shape", [(7, 10), (2, 300)], ids=str)
def test_any_outputs(place: Place, shape: tuple[int, ...], outputs: tuple[str, ...]) -> None:
    z, target = make_logits(shape, torch.float32, place.device), make_indices(shape, place.device)
    assert_right(place, z, target, outputs=outputs, label_smoothing=0.1)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("shape", [(7, 11), (3, 333), (2, 5, 40)], ids=str)
def test_scaled_and_capped(place: Place, shape: tuple[int, ...], logit_scale: float, softcap: float | None) -> None:
    for dtype in (torch.float32, torch.float64):
        z, target = make_logits(shape, dtype, place.device), make_indices(shape, place.device)
        assert_right(place, z, target, logit_scale=logit_scale, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(11,), (7, 11), (5, 1), (3, 333), (2, 1003), (3, 5, 4, 2)], ids=str)
def test_a_scale_for_each_row(place: Place, shape: tuple[int, ...], softcap: float | None) -> None:
    for dtype in (torch.float32, torch.float64):
        z, target = make_logits(shape, dtype, place.device), make_indices(shape, place.device)
        scale = torch.randn(row_shape(shape), dtype=torch.float64).to(place.device, dtype)
        assert_right(place, z, target, logit_scale=scale, softcap=softcap)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((4, 11, 3), it) for it in ("one", "last dimension", "first dimension", "gaps", "float64", "bfloat16")]
    + [((4, 333, 3), it) for it in ("last dimension", "gaps")],
    ids=str,
)
def test_scales_broadcast_like_the_target(place: Place, shape: tuple[int, ...], kind: str) -> None:
    z, target = make_logits(shape, torch.float32, place.device), make_indices(shape, place.device)
    scale = 0.5 + torch.rand(4, 3)
    scale = {
        "one": torch.tensor(0.7),
        "last dimension": scale[0],
        "first dimension": scale[:, :1],
        "gaps": scale.repeat_interleave(2, 1)[:, ::2],
        "float64": scale.double().t().contiguous().t(),
        "bfloat16": scale.bfloat16(),
    }[kind]
    target[0, 0] = -100
    assert_right(place, z, target, logit_scale=scale.to(place.device))
    assert_right(
        place,
        z.movedim(1, 2).contiguous().movedim(2, 1).detach().requires_grad_(),
        target,
        logit_scale=scale.to(place.device),
    )


def test_scales_of_probabilities_weights_and_16_bit_logits(place: Place) -> None:
    for shape in ((6, 11), (3, 333)):
        scale = (0.5 + torch.rand(shape[0])).to(place.device)
        z = make_logits(shape, torch.float32, place.device)
        weight = torch.rand(shape[1], device=place.device)
        target = make_probabilities(shape, z.dtype, place.device)
        assert_right(place, z, target, weight, logit_scale=scale, label_smoothing=0.1)
        assert_right(place, z, make_indices(shape, place.device), weight, logit_scale=scale, label_smoothing=0.1)
        z = make_logits(shape, torch.float16, place.device)
        assert_right(place, z, make_indices(shape, place.device), dtype=torch.float32, logit_scale=scale, softcap=9.0)


def test_derivatives_and_transforms_with_scales_of_rows(place: Place) -> None:
    z, target = make_logits((3, 5), torch.float64, place.device, 1.0), make_indices((3, 5), place.device)
    scale = torch.tensor([0.5, 1.0, -2.0], dtype=z.dtype, device=place.device)

    def outputs(x: Tensor, scale: Tensor = scale) -> tuple[Tensor, ...]:
        rows = cross_entropy_rows(x, target, outputs=SOFT, logit_scale=scale, softcap=4.0, backend=place.backend)
        return rows.loss, rows.logsumexp, rows.entropy, rows.log_prob

    quick = {"fast_mode": place == INTERPRETER}
    assert torch.autograd.gradcheck(outputs, (z,), **quick)
    assert torch.autograd.gradgradcheck(outputs, (z,), **quick)
    total = lambda x: sum(it.square().sum() for it in outputs(x))  # noqa: E731
    (exact,) = torch.autograd.grad(total(z), z)
    torch.testing.assert_close(torch.func.grad(total)(z.detach()), exact)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], exact)
    batched = torch.func.vmap(outputs, in_dims=(None, 0))(z.detach(), torch.stack((scale, 2 * scale)))
    torch.testing.assert_close([it[1] for it in batched], [it.detach() for it in outputs(z, 2 * scale)])
    with torch.no_grad():
        outputs(z, scale.clone().requires_grad_())


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_capping_loses_no_digits(place: Place, softcap: float) -> None:
    sizes = torch.logspace(-30, 3, 2000, dtype=torch.float64).float() * softcap
    z = torch.cat((-sizes, sizes, torch.tensor([0.0, -torch.inf, torch.inf])))[:, None].to(place.device)
    target = torch.zeros(len(z), dtype=torch.int64, device=place.device)
    rows = cross_entropy_rows(z, target, softcap=softcap, outputs=("logsumexp",), backend=place.backend)
    expected = softcap * torch.tanh(z[:, 0].double() / softcap)  # the logsumexp of a single class
    torch.testing.assert_close(rows.logsumexp.double(), expected, rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("kind", ["weights", "smoothing", "probabilities", "everything"])
@pytest.mark.parametrize("shape", [(7, 11), (3, 333), (2, 5, 40)], ids=str)
def test_every_target(place: Place, shape: tuple[int, ...], kind: str) -> None:
    z = make_logits(shape, torch.float64, place.device)
    soft = kind in ("probabilities", "everything")
    target = make_probabilities(shape, z.dtype, place.device) if soft else make_indices(shape, place.device)
    weight = torch.rand(shape[1], dtype=z.dtype).to(place.device) if kind in ("weights", "everything") else None
    assert_right(place, z, target, weight, label_smoothing=0.2 * (kind in ("smoothing", "everything")), softcap=8.0)


@pytest.mark.parametrize("classes", [11, 333])
def test_ignored_rows_have_no_loss_but_the_rest(place: Place, classes: int) -> None:
    z, target = make_logits((6, classes), torch.float32, place.device), make_indices((6, classes), place.device)
    target[::2] = -100
    assert_right(place, z, target, label_smoothing=0.1)
    assert_right(place, z, target % classes, ignore_index=int(target[1]))
    with torch.no_grad():
        z[2] = float("nan")
    rows = cross_entropy_rows(z, target, outputs=("loss",), backend=place.backend)
    (grad,) = torch.autograd.grad(rows.loss.sum(), z)
    assert rows.loss[::2].eq(0).all()
    assert grad[::2].eq(0).all()


@pytest.mark.parametrize("classes", [10, 300])
def test_predictions_of_ties_infinities_and_nan(place: Place, classes: int) -> None:
    z = make_logits((7, classes), torch.float32, place.device).detach()
    z[0] = 0
    z[1] = -INF
    z[2, 4:7] = 50
    z[3, 8] = INF
    z[4, 9] = float("nan")
    z[5, :-1] = -INF
    target = torch.full((7,), classes - 1, device=place.device)
    rows = cross_entropy_rows(z, target, outputs=NAMES, backend=place.backend)
    truth = reference(z, target)
    expected = z.argmax(1)
    assert rows.prediction.tolist() == expected.tolist()
    assert rows.rank.tolist() == truth.rank.tolist()
    for name in SOFT:
        assert_near(getattr(rows, name), getattr(truth, name), torch.float32)


@pytest.mark.parametrize("size", [1e4, 1e36], ids=str)
@pytest.mark.parametrize("classes", [10, 300])
def test_large_logits(place: Place, classes: int, size: float) -> None:
    z = (make_logits((5, classes), torch.float32, place.device).detach() * size).requires_grad_()
    assert_right(place, z, make_indices((5, classes), place.device))


LAYOUTS = {
    "classes first": lambda z: z.t().contiguous().t(),
    "gaps": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda z: F.pad(z, (1, 2))[..., 1:-2],
    "expanded": lambda z: z[:1].expand(6, -1),
}


@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place: Place, layout: str, classes: int) -> None:
    z = LAYOUTS[layout](make_logits((6, classes), torch.float32, place.device).detach()).requires_grad_()
    assert_right(place, z, make_indices((6, classes), place.device))


def test_float32_outputs_of_16_bit_logits(place: Place) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        if place == INTERPRETER and dtype is torch.bfloat16:
            continue  # it cuts the gradient off where a GPU rounds
        z, target = make_logits((5, 300), dtype, place.device), make_indices((5, 300), place.device)
        assert_right(place, z, target, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(5, 11), (2, 300)], ids=str)
def test_float64_outputs_of_bfloat16_logits(place: Place, shape: tuple[int, ...]) -> None:
    z, target = make_logits(shape, torch.bfloat16, place.device), make_indices(shape, place.device)
    rows = cross_entropy_rows(z, target, outputs=NAMES, dtype=torch.float64, backend=place.backend)
    truth = reference(z, target)
    for name in SOFT:
        assert_near(getattr(rows, name).detach(), getattr(truth, name).detach(), torch.float32)
    leaf = z.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(leaf, target).loss.sum(), leaf)
    assert_near(torch.autograd.grad(rows.loss.sum(), z)[0], exact, torch.bfloat16)


@pytest.mark.parametrize("shape", [(4, 11), (4, 333), (4, 11, 2)], ids=str)
def test_infinite_weights_leave_ignored_rows_alone(place: Place, shape: tuple[int, ...]) -> None:
    """Their log sum exp has a gradient, whatever 0 times the weight is; other rows are as torch's."""
    z, target = make_logits(shape, torch.float32, place.device), make_indices(shape, place.device)
    z.data[3, 2] = z.detach().max() + 1  # the largest, hence x - m = 0
    target[::2], target[1] = -100, 3
    weight = torch.rand(shape[1], device=place.device)
    weight[2] = INF
    rows = cross_entropy_rows(z, target, weight, label_smoothing=0.1, backend=place.backend)
    leaf = z.detach().requires_grad_()
    truth = F.cross_entropy(leaf, target, weight, label_smoothing=0.1, reduction="none")
    assert torch.equal(rows.loss, truth)
    assert truth[1].isinf().all()
    (grad,) = torch.autograd.grad((rows.loss + rows.logsumexp).sum(), z)
    assert_near(grad[::2], z.detach().double().softmax(1)[::2], torch.float32)
    (exact,) = torch.autograd.grad((truth + torch.logsumexp(leaf, 1)).sum(), leaf)
    assert torch.equal(grad[1].isnan(), exact[1].isnan())
    assert grad[1, 3].eq(INF).all()


RANKED = {
    "ties are not larger": ([2.0, 2.0, 1.0, 2.0], 1, 0),
    "the smallest": ([2.0, 3.0, 1.0, 2.0], 2, 3),
    "of infinities": ([INF, -INF, INF, 0.0], 3, 2),
    "infinite": ([INF, -INF, INF, 0.0], 2, 0),
    "masked": ([-INF, -INF, 1.0, 0.0], 1, 2),
    "NaN is larger": ([float("nan"), 1.0, 1.0, 3.0], 3, 1),
    "anything is larger than NaN": ([float("nan"), 1.0, 1.0, 3.0], 0, "all"),
    "ignored": ([2.0, 3.0, 1.0, 2.0], -100, -1),
}


@pytest.mark.parametrize("call", ["outputs", "torch.func"])
@pytest.mark.parametrize("classes", [4, 300])
def test_ranks_of_ties_infinities_and_nan(place: Place, classes: int, call: str) -> None:
    z = torch.tensor([row for row, _, _ in RANKED.values()])
    z = F.pad(z, (0, classes - 4), value=-INF).to(place.device)
    target = torch.tensor([label for _, label, _ in RANKED.values()], device=place.device)
    expected = [classes if rank == "all" else rank for _, _, rank in RANKED.values()]

    def rank(x: Tensor) -> Tensor:
        return cross_entropy_rows(x, target, outputs=("rank",), backend=place.backend).rank

    found = rank(z) if call == "outputs" else torch.func.functionalize(rank)(z)
    assert found.tolist() == expected


def test_the_gradient_overwrites_the_logits_where_rows_have_scales(place: Place) -> None:
    z, target = make_logits((7, 5), torch.float32, place.device).detach(), make_indices((7, 5), place.device)
    scale = torch.linspace(0.5, 2, 7, device=place.device)
    operations = get_backend(place.backend, place.device).row_outputs or TORCH.row_outputs
    options = RowSpec(make_spec(z, target, "none", -100, 0.1, torch.float32), 1.0, None, SOFT)
    out, stats = operations.forward(z, target, None, options, save=True, row_scale=scale)
    upstream = [torch.randn_like(getattr(out, name)) for name in SOFT]
    expected = operations.gradient(upstream, z, target, None, stats, options, scale)
    found = operations.gradient(upstream, z, target, None, stats, options, scale, grad=z)
    assert found is z
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("logit_scale", [0.5, -1.0])
@pytest.mark.parametrize("shape", [(30, 10), (9, 300), (2, 6, 40)], ids=str)
def test_accuracy_from_ranks(place: Place, shape: tuple[int, ...], logit_scale: float, softcap: float | None) -> None:
    """The cap, to which large logits are rounded, leaves their order."""
    z, target = make_logits(shape, torch.float32, place.device, 30.0), make_indices(shape, place.device)
    outputs, options = ("rank", "prediction"), {"logit_scale": logit_scale, "backend": place.backend}
    rows = cross_entropy_rows(z, target, outputs=outputs, softcap=softcap, **options)
    for k in (1, 3, 5):
        top = (z * logit_scale).topk(k, dim=1).indices
        assert torch.equal(rows.rank < k, (top == target.unsqueeze(1)).any(1))
    if softcap is None:
        assert torch.equal(rows.rank == 0, rows.prediction == target)
    assert not rows.rank.requires_grad


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [11, 333])
def test_log_prob_knows_no_weights_and_no_smoothing(place: Place, classes: int, label_smoothing: float) -> None:
    z, target = make_logits((6, classes), torch.float32, place.device), make_indices((6, classes), place.device)
    target[0], target[1] = -100, 2
    weight = torch.rand(classes, device=place.device)
    assert_right(place, z, target, weight, label_smoothing=label_smoothing)
    weight[2] = INF
    rows = cross_entropy_rows(
        z, target, weight, label_smoothing=label_smoothing, outputs=("log_prob", "logsumexp"), backend=place.backend
    )
    assert_near(rows.log_prob.detach(), reference(z.detach(), target).log_prob, torch.float32)
    for name in ("log_prob", "logsumexp"):
        leaf = z.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(getattr(reference(leaf, target), name).sum(), leaf)
        assert_near(torch.autograd.grad(getattr(rows, name).sum(), z, retain_graph=True)[0], exact, torch.float32)


@pytest.mark.parametrize("call", ["outputs", "alone", "with the loss", "torch.func"])
@pytest.mark.parametrize("classes", [10, 300])
def test_log_prob_near_certainty_keeps_its_digits(place: Place, classes: int, call: str) -> None:
    """Of p from 1/2 up to 1 - 1e-20: the error is a few units in the last place of log p, not of p."""
    z = torch.randn(40, classes)
    z[:, 3] = torch.linspace(0, 50, 40) + z.exp().sum(1).log()
    z, target = z.to(place.device).requires_grad_(), torch.full((40,), 3, device=place.device)
    outputs = {"outputs": NAMES, "with the loss": ("loss", "log_prob")}.get(call, ("log_prob",))

    def log_prob(x: Tensor) -> Tensor:
        return cross_entropy_rows(x, target, outputs=outputs, backend=place.backend).log_prob

    leaf = z.detach().double().requires_grad_()
    others = torch.cat((leaf[:, :3], leaf[:, 4:]), 1)
    exact = -torch.log1p((others - leaf[:, 3:4]).exp().sum(1))
    (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
    if call == "torch.func":
        grad, found = torch.func.grad_and_value(lambda x: log_prob(x).sum())(z.detach())
        torch.testing.assert_close(found.double(), exact.sum().detach(), rtol=2e-6, atol=0)
    else:
        found = log_prob(z)
        (grad,) = torch.autograd.grad(found.sum(), z)
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 11), (4, 333)], ids=str)
def test_outputs_of_a_class_that_does_not_exist(kernels: Place, shape: tuple[int, ...]) -> None:
    z, target = make_logits(shape, torch.float32, kernels.device), make_indices(shape, kernels.device)
    target[1], target[2] = shape[1], -1
    rows = cross_entropy_rows(z, target, outputs=NAMES, backend="triton")
    assert rows.rank.ge(0).tolist() == [True, False, False, True]
    assert rows.log_prob.isnan().tolist() == rows.loss.isnan().tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(rows.log_prob.sum(), z)
    assert grad.isnan().all(1).tolist() == [False, True, True, False]
    assert grad.isfinite().all(1).tolist() == [True, False, False, True]


def test_no_gradient_flows_where_none_is_asked_for(place: Place) -> None:
    z, target = make_logits((4, 10), torch.float32, place.device), make_indices((4, 10), place.device)
    rows = cross_entropy_rows(z, target, backend=place.backend)
    assert not rows.prediction.requires_grad
    (grad,) = torch.autograd.grad(rows.logsumexp.sum(), z)
    torch.testing.assert_close(grad, torch.softmax(z.detach(), 1))
    with torch.no_grad():
        assert not cross_entropy_rows(z, target, backend=place.backend).loss.requires_grad


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.7, "label_smoothing": 0.1}], ids=str)
def test_second_derivatives(place: Place, options: dict[str, Any]) -> None:
    z, target = make_logits((3, 5), torch.float64, place.device, 1.0), make_indices((3, 5), place.device)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        rows = cross_entropy_rows(x, target, outputs=SOFT, backend=place.backend, **options)
        return rows.loss, rows.logsumexp, rows.entropy, rows.log_prob

    quick = {"fast_mode": place == INTERPRETER}  # every entry of the Jacobian is a launch: slow there
    assert torch.autograd.gradcheck(function, (z,), **quick)
    assert torch.autograd.gradgradcheck(function, (z,), **quick)


def test_torch_func_and_compile(place: Place) -> None:
    z, target = make_logits((3, 5), torch.float64, place.device).detach(), make_indices((3, 5), place.device)

    def total(x: Tensor) -> Tensor:
        rows = cross_entropy_rows(x, target, softcap=4.0, outputs=SOFT, backend=place.backend)
        return (rows.loss + rows.logsumexp.square() + rows.entropy + rows.log_prob.exp()).sum()

    def exact(x: Tensor) -> Tensor:
        rows = reference(x, target, softcap=4.0)
        return (rows.loss + rows.logsumexp.square() + rows.entropy + rows.log_prob.exp()).sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(total)(z), transform(exact)(z))
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), exact(z))


def test_confidence_penalty_of_a_masked_class(place: Place) -> None:
    z = torch.tensor([[0.0, 0.0, -INF]], device=place.device, requires_grad=True)
    for backend in ("auto", place.backend):
        rows = cross_entropy_rows(
            z, torch.tensor([0], device=place.device), outputs=("loss", "entropy"), backend=backend
        )
        (grad,) = torch.autograd.grad((rows.loss - 0.1 * rows.entropy).mean(), z)
        assert grad.tolist() == [[-0.5, 0.5, 0.0]]


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "backward": lambda f, z: torch.autograd.grad(f(z), z)[0],
    "backward twice": lambda f, z: torch.autograd.functional.vhp(f, z, torch.ones_like(z))[1],
    "torch.func.grad": lambda f, z: torch.func.grad(f)(z.detach()),
    "hessian": lambda f, z: torch.func.hessian(f)(z.detach()),
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(z.detach()),
    "compile": lambda f, z: torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(z), z)[0],
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_masked_classes_change_no_derivative(place: Place, derivative: Callable[..., Tensor]) -> None:
    """A class at -inf has probability 0: the others' derivatives are those without it, and its own are 0."""
    z, target = make_logits((2, 6), torch.float64, place.device, 1.0), torch.tensor([0, 4], device=place.device)
    kept, mask = [0, 1, 4, 5], torch.tensor([0, 0, -INF, -INF, 0, 0], dtype=z.dtype, device=place.device)

    def total(x: Tensor, target: Tensor, outputs: tuple[str, ...], backend: str) -> Tensor:
        rows = cross_entropy_rows(x, target, outputs=outputs, logit_scale=0.7, backend=backend)
        return sum(getattr(rows, name).square().sum() for name in outputs)

    torch.compiler.reset()  # the functions below are compiled for every place, more often than torch's limit
    for outputs in (("entropy",), ("logsumexp",), ("log_prob",), SOFT):
        found = derivative(lambda x: total(x + mask, target, outputs, place.backend), z)  # noqa: B023 - called here
        expected = derivative(lambda x: total(x[:, kept], target.clamp(max=2), outputs, "torch"), z)  # noqa: B023
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"outputs": ("loss", "argmax")},
            ValueError,
            "outputs must name some of loss, logsumexp, prediction, entropy, log_prob, rank; got",
        ),
        ({"outputs": ()}, ValueError, "outputs must name some of"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None; got 0.0"),
        ({"softcap": "30"}, TypeError, "softcap must be a number; got str '30'"),
        ({"logit_scale": INF}, ValueError, "logit_scale must be finite; got inf"),
        ({"logit_scale": "2"}, TypeError, "logit_scale must be a number; got str '2'"),
        (
            {"logit_scale": torch.ones(3)},
            ValueError,
            r"broadcasts to shape \(2,\), one number a row, for logits of shape",
        ),
        ({"logit_scale": torch.ones(2, 1)}, ValueError, r"got a float32 tensor of shape \(2, 1\) on cpu"),
        (
            {"logit_scale": torch.tensor([1, 2])},
            ValueError,
            "logit_scale must be a number, or a floating point tensor on",
        ),
        ({"logit_scale": torch.ones(2, device="meta")}, ValueError, "floating point tensor on cpu that broadcasts"),
        (
            {"logit_scale": torch.ones(2).requires_grad_()},
            RuntimeError,
            "logit_scale must not require a gradient: pass",
        ),
        ({"dtype": torch.int64}, ValueError, "dtype must be a floating point type or None; got torch.int64"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'triton', 'numba' or 'torch'; got 'cuda'"),
        ({"label_smoothing": 2.0}, RuntimeError, "label_smoothing must be a number of at most 1; got 2.0"),
    ],
    ids=str,
)
def test_errors_say_what_was_expected(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cross_entropy_rows(torch.zeros(2, 3), torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("output", [name for name in NAMES if OUTPUTS[name].needs_label])
def test_probabilities_have_no_target_class(place: Place, output: str) -> None:
    z, target = make_logits((4, 11), torch.float32, place.device), torch.ones(4, 11, device=place.device) / 11
    with pytest.raises(ValueError, match=f"'{output}' in outputs needs class indices as the target; got a float32"):
        cross_entropy_rows(z, target, outputs=("loss", output), backend=place.backend)


def test_torchs_errors_for_targets(place: Place) -> None:
    z = torch.zeros(2, 3, device=place.device)
    with pytest.raises(ValueError, match="target must have shape"):
        cross_entropy_rows(z, torch.zeros(3, dtype=torch.long, device=place.device), backend=place.backend)
    if place.backend == "torch" and place.device == "cpu":
        with pytest.raises(IndexError, match="target must hold class indices from 0 to 2"):
            cross_entropy_rows(z, torch.tensor([0, 3]), backend=place.backend)


def test_chunks_of_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from softmax_fused.backends.torch import chunks

    monkeypatch.setattr(chunks, "CHUNK", 64)
    for shape in ((33, 10), (2, 5, 6, 7), (5, 100)):
        z, target = make_logits(shape, torch.float32, "cpu"), make_indices(shape, "cpu")
        assert_right(Place("cpu", "torch"), z, target, softcap=4.0, label_smoothing=0.1)
        assert_right(Place("cpu", "torch"), z, target, logit_scale=0.5 + torch.rand(row_shape(shape)))


def test_arguments_are_checked_without_the_loss_being_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fused path does not cover is computed once, and not before to see whether torch takes it."""
    calls = []
    operator = torch._C._nn.cross_entropy_loss
    monkeypatch.setattr(torch._C._nn, "cross_entropy_loss", lambda *args: (calls.append(args), operator(*args))[1])
    z, target = torch.randn(4, 5), torch.randn(4, 5).softmax(1).requires_grad_()
    rows = cross_entropy_rows(z, target, outputs=("prediction", "entropy"))
    assert (rows.prediction.shape, len(calls)) == ((4,), 0)
    loss = cross_entropy_rows(z, target, backend="torch").loss
    assert len(calls) == 1
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), target)[0], -torch.log_softmax(z, 1))
    with pytest.raises(ValueError, match="target must have shape"):
        cross_entropy_rows(z, target[:3], outputs=("prediction",))
    with pytest.raises(RuntimeError, match="device"):
        cross_entropy_rows(z.to("meta"), target.detach(), outputs=("prediction",))
