"""What ranks run to test outputs of rows and linear layers whose classes are divided, and DTensors of such layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from softmax_fused import RowOutputs, distributed, linear_cross_entropy, linear_cross_entropy_rows
from softmax_fused._row_outputs import DEFAULT
from softmax_fused.distributed.merge import KNOWN
from tests import test_row_outputs
from tests.ranks import assert_close, assert_same_everywhere, part_of, problem, slices

SOFT = ("loss", "logsumexp", "entropy", "log_prob")


def counts(mode: CommDebugMode) -> tuple[int, int, int]:
    """Return how many all-reduces, all-gathers and collectives there were."""
    found = {str(kind): count for kind, count in mode.get_comm_counts().items() if count}
    of = [sum(count for kind, count in found.items() if name in kind) for name in ("allreduce", "allgather")]
    return of[0], of[1], mode.get_total_counts()


def combined(rows: RowOutputs) -> Tensor:
    """A number that depends on every differentiable output, in which every row has its own share."""
    total = torch.zeros((), dtype=torch.float64)
    for factor, name in enumerate(SOFT, 1):
        values = getattr(rows, name)
        if values is not None:
            total = total + (values.double().flatten() * torch.linspace(factor, -1, values.numel())).sum()
    return total


def assert_rows(rows: RowOutputs, truth: RowOutputs, world: int) -> None:
    for name in rows._fields:
        ours, exact = getattr(rows, name), getattr(truth, name)
        if ours is not None and name in SOFT:
            assert_close(ours.detach(), exact.detach(), ours.dtype)
            assert_same_everywhere(ours, world)
        elif ours is not None:
            assert torch.equal(ours, exact), name


def layer_of(x: int, classes: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Return features of seven rows, and the weight and the bias of the whole layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((x, 5), (classes, 5), (classes,))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def rows_of_slices(rank: int, world: int) -> None:
    """What is communicated: two all-reduces, a third with the prediction, none in backward."""
    cases = [
        ((9, 23), torch.float64, False, False, KNOWN, {}),
        ((9, 23), torch.float32, False, True, KNOWN, {"label_smoothing": 0.1, "softcap": 5.0}),
        ((2, 13, 5), torch.float64, False, True, ("loss", "entropy"), {"logit_scale": 0.5}),
        ((9, 23), torch.float64, True, True, DEFAULT, {}),
        ((23,), torch.float64, False, False, ("log_prob",), {}),
    ]
    for seed, (shape, dtype, soft, weighted, outputs, options) in enumerate(cases):
        dim = min(len(shape) - 1, 1)
        sizes = slices(shape[dim], world, ("even", "uneven", "empty")[seed % 3])
        logits, target, weight = problem(shape, dtype, soft, weighted, seed)
        own = part_of(logits, sizes, rank, dim).clone().requires_grad_()
        given = {"sizes": sizes} if seed % 2 else {}
        with CommDebugMode() as forward:
            rows = distributed.cross_entropy_rows(
                own, part_of(target, sizes, rank, dim) if soft else target,
                None if weight is None else part_of(weight, sizes, rank, 0), outputs=outputs, **given, **options,
            )  # fmt: skip
        reduces = 2 + ("prediction" in outputs)
        assert counts(forward) == (reduces, 1 - len(given), reduces + 1 - len(given)), counts(forward)
        with CommDebugMode() as backward:
            combined(rows).backward()
        assert backward.get_total_counts() == 0
        leaf = logits.double().requires_grad_()
        truth = test_row_outputs.reference(leaf, target, weight, **options)
        assert_rows(rows, truth, world)
        combined(RowOutputs(*(it if name in outputs else None for name, it in truth._asdict().items()))).backward()
        assert_close(own.grad, part_of(leaf.grad, sizes, rank, dim), dtype)


def layers(rank: int, world: int) -> None:
    """The same of a linear layer: backward sums the gradient of the input, by one all-reduce."""
    for seed, reduction in enumerate(("mean", "sum", "none", None)):
        sizes = slices(23, world, ("even", "uneven", "empty")[seed % 3])
        x, w, b = layer_of(9, 23, torch.float64, seed)
        _, target, weight = problem((9, 23), torch.float64, False, seed % 2 == 1, seed)
        own = [it.clone().requires_grad_() for it in (x, part_of(w, sizes, rank, 0), part_of(b, sizes, rank, 0))]
        arguments: dict[str, Any] = {"local_bias": own[2], "label_smoothing": 0.1 * (seed % 2), "chunk_rows": 4}
        if weight is not None:
            arguments["weight"] = part_of(weight, sizes, rank, 0)
        with CommDebugMode() as forward:
            if reduction is None:
                rows = distributed.linear_cross_entropy_rows(*own[:2], target, outputs=KNOWN, **arguments)
                loss = combined(rows)
            else:
                loss = distributed.linear_cross_entropy(*own[:2], target, reduction=reduction, **arguments)
        assert counts(forward) == (2 + (reduction is None), 1, 3 + (reduction is None))
        with CommDebugMode() as backward:
            loss.sum().backward()
        assert counts(backward) == (1, 0, 1)
        leaves = [it.clone().requires_grad_() for it in (x, w, b)]
        logits, smoothing = F.linear(*leaves), arguments["label_smoothing"]
        if reduction is None:
            reference = test_row_outputs.reference(logits, target, weight, label_smoothing=smoothing)
            assert_rows(rows, reference, world)
            truth = combined(reference)
        else:
            truth = F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
        assert_close(loss.detach(), truth.detach(), torch.float64)
        assert_same_everywhere(loss, world)
        truth.sum().backward()
        assert_close(own[0].grad, leaves[0].grad, torch.float64)
        assert_same_everywhere(own[0].grad, world)
        for ours, exact in zip(own[1:], leaves[1:], strict=True):
            assert_close(ours.grad, part_of(exact.grad, sizes, rank, 0), torch.float64)


def what_needs_no_gradient(rank: int, world: int) -> None:
    """Frozen features cost no communication; a graph that is not to be differentiated twice says so."""
    x, w = torch.randn(4, 5), torch.randn(3, 5, requires_grad=True)
    target = torch.tensor([0, 1, -100, 4])
    with CommDebugMode() as frozen:
        distributed.linear_cross_entropy(x.fill_(1), w, target, sizes=[3] * world).backward()
    assert counts(frozen) == (2, 0, 2)
    x.requires_grad_()
    for loss in (
        distributed.linear_cross_entropy(x, w, target),
        distributed.cross_entropy_rows(w[:, :4].T, target).entropy.sum(),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
            torch.autograd.grad(loss, w, create_graph=True)
    empty = distributed.linear_cross_entropy(x[:0], w, target[:0])
    assert empty.isnan()
    rows = distributed.linear_cross_entropy_rows(x[:0], w, target[:0], outputs=KNOWN)
    assert rows.prediction.shape == (0,)
    rows.loss.sum().backward()
    assert w.grad.isfinite().all()


def rows_under_compile(rank: int, world: int) -> None:
    """The graph breaks at the function, which is computed as ever."""
    x, w, target = torch.ones(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 5])

    def step(x: Tensor, w: Tensor) -> Tensor:
        rows = distributed.cross_entropy_rows(w * 3, target, outputs=("loss", "entropy"))
        more = distributed.linear_cross_entropy_rows(x, w, target)
        return rows.loss.sum() + 2 * rows.entropy.sum() + distributed.linear_cross_entropy(x, w, target) + more.loss[0]

    compiled = torch.compile(step, backend="eager")
    truth, loss = step(x, w), compiled(x, w)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(it, (x, w)) for it in (loss, truth)))


def wrong_rows_on_one_rank(rank: int, world: int) -> None:
    """Every rank raises, the one at fault the error of the whole function; the group is of use afterwards."""
    logits, target, x, w = torch.randn(4, 3), torch.tensor([0, 2, 1, -100]), torch.ones(4, 2), torch.randn(3, 2)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "outputs must name some of", {"outputs": "perplexity"}),
        (ValueError, "divided among ranks must name some of.*got 'rank'", {"outputs": ("loss", "rank")}),
        (ValueError, "softcap must be a positive number", {"softcap": -1.0}),
        (TypeError, "logit_scale must be a number", {"logit_scale": torch.ones(4)}),
        (ValueError, "dtype must be", {"dtype": torch.int64}),
        (ValueError, "target must have shape", {"target": target[:3]}),
        (ValueError, "backend must be", {"backend": "cuda"}),
        (RuntimeError, "label_smoothing must be", {"label_smoothing": 1.5}),
    ]
    of_layer: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "chunk_rows must be", {"chunk_rows": 0}),
        (TypeError, "linear_weight must be a tensor", {"local_weight": None}),
        (RuntimeError, "linear_weight must have shape", {"local_weight": torch.ones(3, 5)}),
        (RuntimeError, "floating point tensors of one type", {"local_weight": w.double()}),
        (RuntimeError, "linear_bias must have shape", {"local_bias": torch.ones(2)}),
    ]
    calls: list[tuple[Any, dict[str, Any], list[Any]]] = [
        (distributed.cross_entropy_rows, {"local_logits": logits, "target": target}, wrong),
        (
            distributed.linear_cross_entropy_rows,
            {"input": x, "local_weight": w, "target": target},
            [*wrong[:1], *wrong[2:3], *wrong[5:7], *of_layer],
        ),
    ]
    for function, right, cases in calls:
        for kind, message, change in cases:
            expected = (kind, message, change) if rank == 1 else (RuntimeError, "refused on rank 1", {})
            with pytest.raises(expected[0], match=expected[1]):
                function(**(right | expected[2]))
        for name, value in (("softcap", 2.0), ("outputs", ("entropy",)), ("dtype", torch.float64)):
            with pytest.raises(ValueError, match="and the other options must be the same on every rank"):
                function(**(right | ({name: value} if rank else {})))
        with pytest.raises(IndexError, match="class indices"):
            function(**(right | {"target": target + 3 * world}))
        assert function(**right).loss.isfinite().all()
    with pytest.raises(ValueError, match="the other options must be the same"):
        distributed.linear_cross_entropy(x.clone().requires_grad_(rank == 0), w, target)
    with pytest.raises(ValueError, match="the other options must be the same"):
        distributed.linear_cross_entropy(x[:, :1] if rank else x, w[:, :1] if rank else w, target)
    refused = (ValueError, "reduction must be") if rank == 1 else (RuntimeError, "refused on rank 1")
    with pytest.raises(refused[0], match=refused[1]):
        distributed.linear_cross_entropy(x, w, target, reduction="median" if rank == 1 else "mean")


def recipes(rank: int, world: int) -> None:
    """z-loss, weights of tokens and an entropy bonus for a divided vocabulary, with their formulas in plain torch."""
    sizes = slices(23, world, "uneven")
    x, w, _ = layer_of(9, 23, torch.float64, 0)
    _, target, _ = problem((9, 23), torch.float64, False, False, 0)
    kept = target != -100
    token_weight = torch.linspace(0, 2, 9, dtype=torch.float64)
    own = [it.clone().requires_grad_() for it in (x, part_of(w, sizes, rank, 0))]
    leaves = [it.clone().requires_grad_() for it in (x, w)]
    names = ("loss", "logsumexp", "entropy", "log_prob")
    rows = distributed.linear_cross_entropy_rows(*own, target, outputs=names)
    log_p = F.linear(*leaves).log_softmax(1)
    nll = F.nll_loss(log_p, target, reduction="none")
    of_label = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    lse = F.linear(*leaves).logsumexp(1)
    pairs = [
        ((rows.loss + 1e-4 * kept * rows.logsumexp.square()).sum() / kept.sum(),
         (nll + 1e-4 * kept * lse.square()).sum() / kept.sum()),
        ((token_weight * rows.loss).sum() / token_weight.sum(), (token_weight * nll).sum() / token_weight.sum()),
        ((rows.log_prob.detach().exp() * rows.loss).sum() / kept.sum(),
         (of_label.detach().exp() * nll).sum() / kept.sum()),
        ((kept * (rows.loss - 0.01 * rows.entropy)).sum() / kept.sum(),
         (kept * (nll - 0.01 * entropy)).sum() / kept.sum()),
    ]  # fmt: skip
    for ours, truth in pairs:
        torch.testing.assert_close(ours.detach(), truth.detach())
        grads = torch.autograd.grad(ours, own, retain_graph=True)
        exact = torch.autograd.grad(truth, leaves, retain_graph=True)
        torch.testing.assert_close(grads[0], exact[0])
        torch.testing.assert_close(grads[1], part_of(exact[1], sizes, rank, 0))


def dtensor_layers(rank: int, world: int) -> None:
    """A weight divided by class, rows divided or not: the local parts alone, the chunks' logits never as a whole."""
    meshes = [(init_device_mesh("cpu", (world,)), [((Replicate(),), (Shard(0),)), ((Shard(0),), (Replicate(),))])]
    if world == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
        of_two = [
            ((Shard(0), Replicate()), (Replicate(), Shard(0))),
            ((Replicate(), Shard(0)), (Shard(0), Replicate())),
        ]
        meshes.append((two, of_two))
    number = 0
    for mesh, layouts in meshes:
        for placements in layouts:
            for reduction in ("mean", "sum", "none", None):
                number += 1
                assert_dtensor_layer(mesh, *placements, reduction, number)


def assert_dtensor_layer(mesh: Any, by_row: Any, by_class: Any, reduction: str | None, number: int) -> None:
    x, w, b = layer_of(7, 5, torch.float64, number)
    _, target, weight = problem((7, 5), torch.float64, number % 3 == 0, number % 2 == 0, number)
    soft = target.ndim == 2
    leaves = [it.clone().requires_grad_() for it in (x, w, b)]
    placed = [
        distribute_tensor(it, mesh, where).requires_grad_() for it, where in ((x, by_row), (w, by_class), (b, by_class))
    ]
    whole = [Replicate()] * mesh.ndim
    t = distribute_tensor(target, mesh, whole if soft else by_row)
    options: dict[str, Any] = {"label_smoothing": 0.1 * (number % 2), "softcap": 4.0 if number % 2 else None}
    maths = {name: value for name, value in options.items() if value is not None}
    logits = F.linear(*leaves)
    reference = test_row_outputs.reference(logits, target, weight, **maths)
    arguments = {"linear_bias": placed[2], "weight": weight, "chunk_rows": 3, **options}
    if reduction is None:
        outputs = DEFAULT if soft else KNOWN
        rows = linear_cross_entropy_rows(*placed[:2], t, outputs=outputs, **arguments)
        assert tuple(rows.loss.placements) == by_row
        ours = RowOutputs(*(None if it is None else it.full_tensor() for it in rows))
        assert_rows(ours, reference, mesh.size())
        named = {name: it if name in outputs else None for name, it in reference._asdict().items()}
        loss, truth = combined(ours), combined(RowOutputs(**named))
    else:
        found = linear_cross_entropy(*placed[:2], t, reduction=reduction, **arguments)
        assert tuple(found.placements) == (by_row if reduction == "none" else tuple(whole))
        loss = found.full_tensor()
        truth = F.cross_entropy(
            logits if options["softcap"] is None else 4.0 * torch.tanh(logits / 4.0),
            target, weight, reduction=reduction, label_smoothing=options["label_smoothing"],
        )  # fmt: skip
        assert_close(loss.detach(), truth.detach(), torch.float64)
    loss.sum().backward()
    truth.sum().backward()
    for ours, exact, where in zip(placed, leaves, (by_row, by_class, by_class), strict=True):
        assert tuple(ours.grad.placements) == where
        assert_close(ours.grad.full_tensor(), exact.grad, torch.float64)


def other_dtensor_layers(rank: int, world: int) -> None:
    """What torch's operations are left to do, and what they and we refuse; a weight of FSDP2 where it is gathered."""
    mesh = init_device_mesh("cpu", (world,))
    x, w, _ = layer_of(2 * world, 5, torch.float64, 0)
    target = torch.arange(2 * world) % 5
    truth = F.cross_entropy(F.linear(x, w), target)
    rows, classes = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(w, mesh, [Shard(0)])
    t = distribute_tensor(target, mesh, [Replicate()])
    along_one = linear_cross_entropy(rows, classes, t)  # the dimension that divides both: by torch's operations
    torch.testing.assert_close(along_one.full_tensor(), truth)
    with pytest.raises(ValueError, match="target must be a DTensor"):
        linear_cross_entropy(rows, distribute_tensor(w, mesh, [Replicate()]), target)
    with pytest.raises(IndexError, match="class indices from 0 to 4"):
        linear_cross_entropy(distribute_tensor(x, mesh, [Replicate()]), classes, t + 5)
    for call in (linear_cross_entropy, linear_cross_entropy_rows):
        with pytest.raises(RuntimeError, match=r"under fully_shard is where it has not been gathered.*unshard\(\)"):
            call(x, classes, target)
    torch.manual_seed(0)
    head = nn.Linear(5, 8, dtype=torch.float64)
    alone = copy.deepcopy(head)
    fully_shard(head, mesh=mesh)
    with pytest.raises(RuntimeError, match="has not been gathered"):
        linear_cross_entropy(x, head.weight, target, linear_bias=head.bias)
    head.unshard()
    loss = linear_cross_entropy(x, head.weight, target, linear_bias=head.bias)
    torch.testing.assert_close(loss, F.cross_entropy(alone(x), target))
    head.reshard()
    whole = linear_cross_entropy(x, head.weight.full_tensor(), target, linear_bias=head.bias.full_tensor())
    torch.testing.assert_close(whole, loss)
    slices_of = {"local_bias": head.bias.to_local()}
    torch.testing.assert_close(distributed.linear_cross_entropy(x, head.weight.to_local(), target, **slices_of), loss)


ALL = (
    rows_of_slices,
    layers,
    what_needs_no_gradient,
    wrong_rows_on_one_rank,
    recipes,
    dtensor_layers,
    other_dtensor_layers,
)
