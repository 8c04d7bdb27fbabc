"""The outputs of rows of logits, or of a linear layer's, whose classes are divided among ranks, and their gradients.

Forward merges the statistics of the slices; backward computes the gradient of a rank's slice from those of all slices
together, which were saved. It communicates nothing, but for the gradient of a linear layer's input, which is summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused import _errors
from softmax_fused._dispatch import get_backend, slice_row_operations
from softmax_fused._row_outputs import OUTPUTS
from softmax_fused._spec import RowStatistics, class_dim, row_shape
from softmax_fused.backends.torch.targets import denominator, kind_of
from softmax_fused.distributed.autograd import all_reduce
from softmax_fused.distributed.merge import Merged, merge
from softmax_fused.functional.chunked_linear import Gradients, Layer, Plan, chunk_logits, make_plan, valid_rows
from softmax_fused.functional.chunked_linear_rows import of_differentiable, rows_with_gradient, stand_in
from softmax_fused.functional.linear import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._dispatch import LayerCall
    from softmax_fused._spec import RowSpec, SliceRowsOperations, Upstream
    from softmax_fused.distributed.exchange import Arguments


def keep(ctx: Any, found: Merged, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Save what backward needs, and return what forward does: the outputs, and the weights of the labels' classes."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, found.stats)
    fixed = [it for it, output in zip(found.outputs, OUTPUTS.values(), strict=True) if not output.differentiable]
    ctx.mark_non_differentiable(*(it for it in (*fixed, found.label_weight) if it is not None))
    return *found.outputs, found.label_weight


def given(upstream: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Return the upstream gradients that backends take; None where there are none.

    Raises:
        RuntimeError: If the gradient is to be differentiated.
    """
    if torch.is_grad_enabled():
        raise _errors.no_second_derivative()
    found = of_differentiable(upstream[: len(OUTPUTS)])
    return found if any(g is not None for g in found) else None


class SliceRows(torch.autograd.Function):
    """The outputs of rows of a slice of the logits: saves the logits and five numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowSpec,
        group: Any,
        operations: SliceRowsOperations,
    ) -> tuple[Tensor | None, ...]:
        """Compute the outputs."""
        prepared, held = operations.prepare(logits, target, options.spec), logits.shape[class_dim(logits.ndim)]
        if logits.numel():
            local = operations.statistics(logits.detach(), prepared, weight, options)
        else:
            local = RowStatistics.allocate(logits, options)
        ctx.options, ctx.operations = options, operations
        return keep(ctx, merge(local, target, weight, options, held, group), logits, prepared, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradient of this rank's logits."""
        some = given(upstream)
        if some is None:
            return (None,) * 6
        logits, target, weight, stats = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if grad.numel():
            some = [None if g is None else g.reshape(row_shape(logits.shape)) for g in some]
            ctx.operations.gradient(some, logits, target, weight, stats, ctx.options, grad)
        return grad, None, None, None, None, None


class SliceLinearRows(torch.autograd.Function):
    """The same of a linear layer whose weight is divided: saves the layer's tensors and five numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, group: Any, operations: SliceRowsOperations, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Compute the outputs."""
        layer = Layer(*tensors)
        logits = stand_in(layer, plan)
        prepared = operations.prepare(logits, layer.target, plan.spec)
        local = layer_statistics(layer, prepared, plan, operations)
        ctx.plan, ctx.group, ctx.operations = plan, group, operations
        return keep(
            ctx, merge(local, layer.target, layer.weight, plan.options, plan.sizes[0], group), *tensors, prepared
        )

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients; that of the input is the sum over the ranks."""
        some = given(upstream)
        if some is None:
            return (None,) * 8
        *tensors, prepared, stats = ctx.saved_tensors
        layer = Layer(*tensors)
        grads = layer_gradients(some, layer, prepared, stats, ctx.plan, ctx.operations, ctx.needs_input_grad[3:6])
        if grads[0] is not None:
            all_reduce(grads[0], "SUM", ctx.group)
        results = [
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, layer[:3], strict=True)
        ]
        return None, None, None, *results, None, None


def layer_statistics(layer: Layer, prepared: Tensor, plan: Plan, operations: SliceRowsOperations) -> RowStatistics:
    """Return what the slice knows of each row, from one chunk of logits after another.

    Ignored rows are left out where all that is asked of them is known without their logits.
    """
    found = RowStatistics.allocate(stand_in(layer, plan), plan.options)
    if not plan.sizes[0] or not found.numbers.numel():
        return found
    known = all(OUTPUTS[name].if_ignored is not None for name in plan.options.outputs)
    rows = valid_rows(layer, plan) if known else None
    numbers = found.numbers.view(len(found.numbers), len(layer.input), -1)
    for at, _, z in chunk_logits(*layer.operands(plan), plan, rows):
        local = operations.statistics(z.view(-1, *plan.sizes), prepared[at], layer.weight, plan.options)
        numbers[:, at] = local.numbers.view(len(numbers), len(z), -1)
        if found.prediction is not None and local.prediction is not None:
            found.prediction.view(numbers.shape[1:])[at] = local.prediction.view(len(z), -1)
    return found


def layer_gradients(
    upstream: Upstream,
    layer: Layer,
    prepared: Tensor,
    stats: Tensor,
    plan: Plan,
    operations: SliceRowsOperations,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Compute the slice's part of the input's gradient, and the gradients of its weight and bias."""
    x, w, b = layer.operands(plan)
    shape = (len(layer.input), *plan.sizes[1:])
    of_rows = [None if g is None else g.reshape(shape) for g in upstream]
    rows = rows_with_gradient(of_rows, layer, plan)
    gradients = Gradients(x, w, needs, rows)
    if not plan.sizes[0]:
        if gradients.of_x is not None:
            gradients.of_x.zero_()
        return gradients.found()
    for at, features, z in chunk_logits(x, w, b, plan, rows):
        logits = z.view(-1, *plan.sizes)
        some = [None if g is None else g[at] for g in of_rows]
        of_chunk = stats.view(len(stats), *shape)[:, at].flatten(1).contiguous()
        operations.gradient(some, logits, prepared[at], layer.weight, of_chunk, plan.options, logits)
        gradients.add(z, features, at)
    return gradients.found()


def slice_of_layer(
    call: LayerCall, options: RowSpec, group: Any, backend: str
) -> tuple[list[Tensor | None], Tensor | None]:
    """Return the outputs of a layer's rows from a slice of it, and the weights of the labels' classes; rows are flat.

    Every rank of the group must call it. A lone slice has no group.
    """
    held = call.linear_weight.shape[0]
    call = call._replace(chunk_rows=call.chunk_rows if held else 1, dtype=options.spec.acc)
    layer, of_plan = prepare(call, options.scale, options.softcap, backend)
    plan = make_plan(layer, options.outputs, *of_plan)._replace(options=options)
    operations = slice_row_operations(get_backend(backend, call.input.device.type))
    *found, label_weight = SliceLinearRows.apply(plan, group, operations, *layer)
    return found, label_weight


def mean_over(it: Arguments, label_weight: Tensor | None) -> Tensor:
    """Return what a mean divides by: the weights of the labels' classes, or the number of rows that are not ignored."""
    if label_weight is not None and kind_of(it.logits, it.target).weighted_mean:
        return label_weight.sum(dtype=torch.float64)
    return denominator(it.logits, it.target, None, it.ignore_index, torch.float64)[0]
