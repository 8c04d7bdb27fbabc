"""What ranks run to test the loss of DTensors: against float64, torch's loss_parallel and a model on one device."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from softmax_fused import CrossEntropyLoss, cross_entropy
from tests import reference
from tests.ranks import assert_close, assert_same_everywhere, problem


def dtensors(rank: int, world: int) -> None:
    """Logits divided by class, by row, both or not at all, against the whole loss."""
    meshes = [init_device_mesh("cpu", (world,), mesh_dim_names=("ranks",))]
    layouts: list[tuple[int, tuple[Any, ...]]] = [(0, (Shard(1),)), (0, (Shard(0),)), (0, (Replicate(),))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes")))
        layouts += [(1, it) for it in ((Shard(0), Shard(1)), (Shard(1), Shard(0)), (Replicate(), Shard(1)))]
    cases = itertools.product(layouts, ("mean", "sum", "none"), (False, True), (False, True))
    for number, ((mesh, placements), reduction, soft, weighted) in enumerate(cases):
        shape = ((7, 5), (6, 9, 3))[number % 2]
        options = {"reduction": reduction, "label_smoothing": 0.1 * weighted}
        whole = problem(shape, torch.float64, soft, weighted, number)
        try:
            assert_dtensor(meshes[mesh], placements, *whole, **options)
        except AssertionError as error:
            raise AssertionError(f"{shape} {placements} soft={soft} weighted={weighted} {options}") from error


def assert_dtensor(
    mesh: Any, placements: tuple[Any, ...], logits: Tensor, target: Tensor, weight: Tensor | None, **options: Any
) -> None:
    z = distribute_tensor(logits, mesh, placements).requires_grad_()
    t = distribute_tensor(target, mesh, placements if target.ndim == z.ndim else [Replicate()] * mesh.ndim)
    loss = cross_entropy(z, t, weight, **options)
    upstream = torch.randn(loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(1))
    truth = reference.cross_entropy(logits, target, weight, upstream=upstream, **options)
    rows = [Shard(0) if it == Shard(0) and options["reduction"] == "none" else Replicate() for it in placements]
    assert tuple(loss.placements) == tuple(rows)
    assert_close(loss.full_tensor(), truth.loss, logits.dtype)
    assert_same_everywhere(loss.full_tensor(), dist.get_world_size())
    (loss * distribute_tensor(upstream, mesh, [Replicate()] * mesh.ndim)).sum().backward()
    assert tuple(z.grad.placements) == placements, z.grad.placements
    assert_close(z.grad.full_tensor(), truth.grad, logits.dtype)


def loss_parallel_agrees(rank: int, world: int) -> None:
    """What torch's own vocabulary-parallel loss supports, in float32."""
    mesh = init_device_mesh("cpu", (world,))
    for number, reduction in enumerate(("mean", "sum", "none")):
        logits, target, weight = problem((6, 11), torch.float32, False, number > 0, number)
        if weight is not None:
            target = target.clamp(min=0)  # loss_parallel's backward gathers a weight at ignore_index
        ours, theirs = (distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_() for _ in range(2))
        loss = cross_entropy(ours, target, weight, reduction=reduction)
        loss.sum().backward()
        with loss_parallel():
            expected = torch.nn.functional.cross_entropy(theirs, target, weight, reduction=reduction)
            expected.sum().backward()
        assert loss.placements == expected.placements
        torch.testing.assert_close(loss.to_local(), expected.to_local())
        torch.testing.assert_close(ours.grad.to_local(), theirs.grad.to_local())


def parallel_plan(rank: int, world: int) -> None:
    """A model whose head a plan divides by class, and the loss as a module: the weights' gradients are the whole's."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)).double()
    alone = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world,))
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"2": head})
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 10, (12,))
    criterion = CrossEntropyLoss(label_smoothing=0.1)
    loss, expected = criterion(model(x), y), torch.nn.CrossEntropyLoss(label_smoothing=0.1)(alone(x), y)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    torch.testing.assert_close(model[0].weight.grad, alone[0].weight.grad)
    torch.testing.assert_close(model[2].weight.grad.full_tensor(), alone[2].weight.grad)


def dtensors_left_to_torch(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    logits, target, _ = problem((6, 8), torch.float64, False, False, 0)
    partial = DTensor.from_local(logits / world, mesh, [Partial()], run_check=False)
    t = distribute_tensor(target, mesh, [Replicate()])
    torch.testing.assert_close(cross_entropy(partial, t).full_tensor(), reference.cross_entropy(logits, target).loss)
    with pytest.raises(ValueError, match="target must be a DTensor"):
        cross_entropy(distribute_tensor(logits, mesh, [Shard(0)]), target)
    torn = DTensor.from_local(logits[:, :1], mesh, [Shard(1)], run_check=False, shape=logits.shape, stride=(8, 1))
    with pytest.raises(RuntimeError, match="as Shard divides them"):
        cross_entropy(torn, t)


def wrong_labels_on_one_rank(rank: int, world: int) -> None:
    """The labels that a rank holds are out of range: every rank raises, and the mesh is of use afterwards."""
    mesh = init_device_mesh("cpu", (world,))
    logits = distribute_tensor(torch.randn(3 * world, 5), mesh, [Shard(0)])
    for label in (5, -1):
        wrong = torch.zeros(3 * world, dtype=torch.long)
        wrong[0], wrong[-1] = -100, label  # the last rank's
        target = distribute_tensor(wrong, mesh, [Shard(0)])
        for reduction in ("mean", "sum"):
            with pytest.raises(IndexError, match=f"class indices from 0 to 4 or ignore_index .-100.; got {label}"):
                cross_entropy(logits, target, reduction=reduction)
    fine = distribute_tensor(torch.full((3 * world,), -100), mesh, [Shard(0)])
    assert cross_entropy(logits, fine, reduction="sum").full_tensor() == 0


ALL = (wrong_labels_on_one_rank, dtensors, loss_parallel_agrees, parallel_plan, dtensors_left_to_torch)
