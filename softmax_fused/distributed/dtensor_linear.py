"""A linear layer's loss and outputs of rows where its tensors are DTensors: every rank computes those of local parts.

The mesh may divide the layer's classes along one dimension, on whose ranks the rows are the same, and the rows along
others. It is imported when the first DTensor comes, as distributed/dtensor.py is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from softmax_fused import _errors
from softmax_fused._dispatch import LayerCall, layer_dtype, loss_dtype
from softmax_fused._errors import target_shapes
from softmax_fused._row_outputs import OUTPUTS, RowOutputs
from softmax_fused._spec import RowSpec, class_dim
from softmax_fused.backends.torch import targets
from softmax_fused.distributed.dtensor import Local, check_labels, class_slice, redistribute_local, reduced
from softmax_fused.distributed.exchange import Arguments, layer_fits, validation_error
from softmax_fused.distributed.row_autograd import mean_over, slice_of_layer
from softmax_fused.functional.rows import check_target_class

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class LocalOfLayer(torch.autograd.Function):
    """A weight's or bias's local part, of whose gradient every rank computes what its own rows contribute."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, of_gradient: list[Placement]) -> Tensor:
        """Return this rank's part."""
        ctx.mesh, ctx.placements, ctx.of_gradient = tensor.device_mesh, tensor.placements, of_gradient
        ctx.shape, ctx.stride = tensor.shape, tensor.stride()
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[DTensor, None]:
        """Return the gradient where the tensor lies, summed over the ranks that hold different rows."""
        partial = DTensor.from_local(
            grad, ctx.mesh, ctx.of_gradient, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        return partial.redistribute(ctx.mesh, ctx.placements), None


class Layout(NamedTuple):
    """Where the rows and the classes lie on a mesh."""

    mesh: DeviceMesh
    rows: list[Placement]
    classes: list[Placement]

    def of_logits(self, ndim: int) -> list[Placement]:
        """Return where logits and class probabilities lie, (C,) or (N, C)."""
        pairs = zip(self.rows, self.classes, strict=True)
        return [Shard(class_dim(ndim)) if isinstance(by_class, Shard) else by_row for by_row, by_class in pairs]

    @property
    def of_gradient(self) -> list[Placement]:
        """Return where the gradients of weight and bias lie before they are summed over the ranks of other rows."""
        pairs = zip(self.rows, self.classes, strict=True)
        return [Partial() if isinstance(by_row, Shard) else by_class for by_row, by_class in pairs]


def layout_of(input: Any, linear_weight: Any) -> Layout | None:
    """Return where rows and classes lie; None where the mesh divides them otherwise than is covered.

    Raises:
        RuntimeError: If the weight is divided, and the input is a plain tensor.
    """
    if not isinstance(input, DTensor):
        if any(isinstance(placement, Shard) for placement in linear_weight.placements):
            raise _errors.divided_weight(linear_weight)
        return None
    rows, classes = list(input.placements), list(linear_weight.placements)
    covered = input.device_mesh == linear_weight.device_mesh and linear_weight.ndim == 2
    for placements, allowed in ((rows, input.ndim == 2), (classes, True)):
        for it in placements:
            covered = covered and (type(it) is Replicate or (type(it) is Shard and it.dim == 0 and allowed))
    if not covered or sum(isinstance(it, Shard) for it in classes) > 1:
        return None
    both = any(isinstance(a, Shard) and isinstance(b, Shard) for a, b in zip(rows, classes, strict=True))
    return None if both else Layout(input.device_mesh, rows, classes)


class Found(NamedTuple):
    """The outputs of this rank's rows, of the accumulation type, and what a result of them needs to know."""

    outputs: list[Tensor | None]
    layout: Layout
    dtype: torch.dtype
    denominator: Tensor  # what a mean divides by, of this rank's rows


def local_rows(
    call: LayerCall, logit_scale: float, softcap: float | None, outputs: tuple[str, ...], backend: str
) -> Found | None:
    """Return the outputs of this rank's rows, or None for arguments that torch is to compute or to refuse."""
    layout = layout_of(call.input, call.linear_weight)
    target, weight, ignore_index, reduction, label_smoothing = call.loss
    classes = call.linear_weight.shape[0]
    if layout is None or not isinstance(target, torch.Tensor) or target.shape not in target_shapes(call.shape):
        return None
    if weight is not None and not (isinstance(weight, torch.Tensor) and weight.shape == (classes,)):
        return None
    mesh, has_labels = layout.mesh, target.ndim < len(call.shape)
    check_target_class(outputs, has_labels, target)
    of_target = layout.rows if has_labels else layout.of_logits(len(call.shape))
    target = redistribute_local(target, mesh, of_target, "target")
    weight = None if weight is None else redistribute_local(weight, mesh, layout.classes, "weight")
    x: Tensor = Local.apply(call.input)
    w = local_parameter(call.linear_weight, layout)
    b = None if call.linear_bias is None else local_parameter(call.linear_bias, layout)
    if not layer_fits(x, w, b):
        return None
    logits = x.new_empty(1, dtype=layer_dtype(x)).expand(*x.shape[:-1], len(w))
    arguments = Arguments(logits, target, weight, ignore_index, reduction, label_smoothing, call.dtype)
    if validation_error(arguments):
        return None
    if reduction != "none" and target.is_cpu and has_labels and any(isinstance(it, Shard) for it in layout.rows):
        check_labels(target, classes, ignore_index, mesh, layout.rows)
    dtype = call.dtype or loss_dtype(logits, target)
    first, group = class_slice(mesh, classes, len(w), [isinstance(it, Shard) for it in layout.classes])
    spec = targets.make_spec(logits, target, "none", ignore_index, label_smoothing, dtype)
    spec = spec._replace(classes=classes, first=first, dtype=spec.acc)
    options = RowSpec(spec, float(logit_scale), None if softcap is None else float(softcap), outputs)
    of_loss = (target, weight, ignore_index, "none", label_smoothing)
    part = LayerCall(x, w, b, tuple(logits.shape), call.chunk_rows, of_loss, call.dtype)
    found, label_weight = slice_of_layer(part, options, group, backend)
    return Found(found, layout, dtype, mean_over(arguments, label_weight))


def local_parameter(tensor: Tensor, layout: Layout) -> Tensor:
    """Return the local part of a weight or bias; a plain tensor is taken to be the same on every rank."""
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, layout.mesh, [Replicate()] * layout.mesh.ndim, run_check=False)
    local: Tensor = LocalOfLayer.apply(tensor.redistribute(layout.mesh, layout.classes), layout.of_gradient)
    return local


def placed(values: Tensor, found: Found, call: LayerCall) -> DTensor:
    """Return a number a row as a DTensor that lies as the rows do."""
    shape = torch.Size(call.shape[:-1])
    values = values.view((values.numel(),) if shape else ())
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, found.layout.mesh, found.layout.rows, run_check=False, shape=shape, stride=stride)


def rows(
    call: LayerCall, logit_scale: float, softcap: float | None, outputs: tuple[str, ...], backend: str
) -> RowOutputs | None:
    """Return the outputs of rows as DTensors, or None for arguments that torch is to compute or to refuse."""
    found = local_rows(call, logit_scale, softcap, outputs, backend)
    if found is None:
        return None
    kinds = zip(found.outputs, OUTPUTS.values(), strict=True)
    return RowOutputs(
        *(None if it is None else placed(it.to(kind.dtype or found.dtype), found, call) for it, kind in kinds)  # type: ignore[arg-type]  # None as the caller asked
    )


def loss(call: LayerCall, logit_scale: float, softcap: float | None, backend: str) -> DTensor | None:
    """Return the loss as a DTensor, or None for arguments that torch is to compute or to refuse."""
    found = local_rows(call, logit_scale, softcap, ("loss",), backend)
    if found is None:
        return None
    losses, reduction = found.outputs[0], call.loss[3]
    assert losses is not None
    if reduction == "none":
        return placed(losses.to(found.dtype), found, call)
    total = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        count = reduced(found.denominator, found.layout.mesh, found.layout.rows).to_local()
        total = total / count.masked_fill(count == 0, torch.nan)
    whole: DTensor = reduced(total, found.layout.mesh, found.layout.rows).to(found.dtype)  # type: ignore[assignment]  # stays one
    return whole
