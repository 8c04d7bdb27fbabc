"""The loss of a DTensor: every rank computes the loss of its local part, and the parts are reduced over the mesh.

It is imported when the first DTensor comes: then torch.distributed.tensor has been imported already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from softmax_fused import _errors
from softmax_fused._dispatch import get_backend, loss_dtype, slice_operations
from softmax_fused._errors import target_shapes
from softmax_fused._spec import class_dim as class_dim_of
from softmax_fused.backends.torch import targets
from softmax_fused.distributed.autograd import slice_cross_entropy
from softmax_fused.distributed.exchange import Arguments, label_range, validation_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class Local(torch.autograd.Function):
    """Like `to_local`, whose backward in torch 2.11 takes uneven shards for even ones and gathers them."""

    @staticmethod
    def forward(ctx: Any, input: DTensor) -> Tensor:
        """Return this rank's part."""
        ctx.mesh, ctx.placements = input.device_mesh, input.placements
        ctx.shape, ctx.stride = input.shape, input.stride()
        local = input.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:
        """Return the gradient where the input lies."""
        return DTensor.from_local(grad, ctx.mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=ctx.stride)


def shard_dim(placement: Placement, ndim: int) -> int | None:
    """Return the tensor dimension that a mesh dimension divides, None where it divides none."""
    return placement.dim % ndim if isinstance(placement, Shard) else None


def is_covered(input: DTensor, target: Any, weight: Any) -> bool:
    """Whether the mesh divides the logits' classes at most once, and target and weight have fitting shapes."""
    if input.ndim == 0 or not isinstance(target, torch.Tensor):
        return False
    class_dim = class_dim_of(input.ndim)
    divided = [shard_dim(placement, input.ndim) for placement in input.placements]
    return (
        all(type(placement) in (Shard, Replicate) for placement in input.placements)
        and divided.count(class_dim) <= 1
        and target.shape in target_shapes(input.shape)
        and (weight is None or (isinstance(weight, torch.Tensor) and weight.shape == (input.shape[class_dim],)))
    )


def row_placements(input: DTensor) -> list[Placement]:
    """Return where the rows lie: as the logits without the class dimension."""
    class_dim = class_dim_of(input.ndim)
    placements: list[Placement] = []
    for placement in input.placements:
        dim = shard_dim(placement, input.ndim)
        divides_rows = dim is not None and dim != class_dim
        placements.append(Shard(dim - (dim > class_dim)) if divides_rows else Replicate())  # type: ignore[operator]
    return placements


def redistribute_local(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], name: str) -> Tensor:
    """Return the local part of a DTensor at `placements`; a plain tensor is taken to be the same on every rank.

    Raises:
        ValueError: If a plain tensor would be divided by rows: it may be whole, or a part already.
    """
    if isinstance(tensor, DTensor):
        return tensor.redistribute(mesh, placements).to_local()
    if any(isinstance(placement, Shard) for placement in placements) and name == "target":
        raise _errors.plain_target(placements)
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements).to_local()


def chunk_sizes(size: int, ranks: int) -> list[int]:
    """Return how Shard divides a dimension."""
    step = -(-size // ranks)
    return [max(0, min(step, size - rank * step)) for rank in range(ranks)]


def class_slice(mesh: DeviceMesh, classes: int, held: int, divides: list[bool]) -> tuple[int, Any]:
    """Return the first of the `held` classes of this rank, and the group that holds all; None if this rank does.

    Raises:
        RuntimeError: If the mesh divides the classes otherwise than Shard does.
    """
    if not any(divides):
        return 0, None
    mesh_dim = divides.index(True)
    sizes, rank = chunk_sizes(classes, mesh.size(mesh_dim)), mesh.get_local_rank(mesh_dim)
    if held != sizes[rank]:
        raise _errors.uneven_shards(sizes, rank, held)
    return sum(sizes[:rank]), mesh.get_group(mesh_dim)


def cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
) -> DTensor | None:
    """Return the loss, or None for arguments that torch's own operator is to compute or to refuse."""
    if not is_covered(input, target, weight):
        return None
    mesh, class_dim = input.device_mesh, class_dim_of(input.ndim)
    rows = row_placements(input)
    divides = [shard_dim(placement, input.ndim) == class_dim for placement in input.placements]
    has_labels = targets.kind_of(input, target).has_labels
    target = redistribute_local(target, mesh, rows if has_labels else input.placements, "target")
    by_class: list[Placement] = [Shard(0) if yes else Replicate() for yes in divides]
    local_weight = None if weight is None else redistribute_local(weight, mesh, by_class, "weight")
    local: Tensor = Local.apply(input)
    if validation_error(Arguments(local, target, local_weight, ignore_index, reduction, label_smoothing)):
        return None
    dtype = loss_dtype(local, target)
    rows_divided = reduction != "none" and any(isinstance(placement, Shard) for placement in rows)
    if rows_divided and local.is_cpu and has_labels:
        check_labels(target, input.shape[class_dim], ignore_index, mesh, rows)
    mean_of_parts = rows_divided and reduction == "mean"
    local_reduction = "sum" if mean_of_parts else reduction
    spec = targets.make_spec(local, target, local_reduction, ignore_index, label_smoothing, dtype)
    first, group = class_slice(mesh, input.shape[class_dim], local.shape[class_dim], divides)
    spec = spec._replace(classes=input.shape[class_dim], first=first, dtype=spec.acc)
    operations = slice_operations(get_backend(backend, local.device.type))
    loss = slice_cross_entropy(local, target, local_weight, spec, group, operations)
    if reduction == "none":
        shape = torch.Size(size for dim, size in enumerate(input.shape) if dim != class_dim)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(loss.to(dtype), mesh, rows, run_check=False, shape=shape, stride=stride)
    if mean_of_parts:
        count = reduced(denominator(input, local, target, weight, ignore_index, spec.acc), mesh, rows).to_local()
        loss = loss / count.masked_fill(count == 0, torch.nan)
    whole: DTensor = reduced(loss, mesh, rows).to(dtype)  # type: ignore[assignment]  # stays one
    return whole


def reduced(values: Tensor, mesh: DeviceMesh, rows: Sequence[Placement], operation: str = "sum") -> DTensor:
    """Return the sum or maximum of values over the ranks that hold different rows, on every rank."""
    parts = [Partial(operation) if isinstance(placement, Shard) else Replicate() for placement in rows]
    whole = [Replicate()] * mesh.ndim
    placed = DTensor.from_local(values, mesh, parts, run_check=False)
    return placed if parts == whole else placed.redistribute(mesh, whole)  # torch 2.7 fails backward with nothing to do


def check_labels(target: Tensor, classes: int, ignore_index: int, mesh: DeviceMesh, rows: Sequence[Placement]) -> None:
    """Refuse class indices out of range on every rank, so that none waits for another that has raised.

    Raises:
        IndexError: On every rank.
    """
    low, high = label_range(target, ignore_index)
    below, above = reduced(torch.stack([-low, high]), mesh, rows, "max").to_local().tolist()
    if below > 0 or above >= classes:
        raise _errors.out_of_range(classes, ignore_index, -below if below > 0 else above)


def denominator(
    input: DTensor, local: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Return this rank's part of what a mean divides by."""
    if weight is not None and targets.kind_of(local, target).weighted_mean:
        replicated = [Replicate()] * input.device_mesh.ndim
        weight = redistribute_local(weight, input.device_mesh, replicated, "weight")
    return targets.denominator(local, target, weight, ignore_index, dtype)[0]
