"""The outputs of each row of a linear layer's logits, and their gradients, with the logits of one chunk at a time.

Forward computes each chunk's outputs. What their gradients will be summed with is not known then, so backward computes
the chunk's logits again, writes the gradient of the logits over them, and multiplies it as chunked_linear.py says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from softmax_fused._row_outputs import DIFFERENTIABLE, OUTPUTS, RowOutputs
from softmax_fused.backends.torch import row_outputs as torch_rows
from softmax_fused.backends.torch.targets import kind
from softmax_fused.functional.autograd import batched
from softmax_fused.functional.chunked_linear import Gradients, Layer, Plan, chunk_logits, numbers_of, valid_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Upstream


def stand_in(layer: Layer, plan: Plan) -> Tensor:
    """Return a tensor of the shape and device of all logits, with one element of memory."""
    return layer.input.new_empty(1, dtype=plan.products).expand(layer.input.shape[0], *plan.sizes)


def allocate_saved(layer: Layer, plan: Plan, save: bool) -> Tensor | None:
    """Return memory for what forward saves of each row."""
    shape = plan.row_operations.saved_shape(stand_in(layer, plan)) if save else None
    return None if shape is None else layer.input.new_empty(shape, dtype=plan.spec.acc)


def by_row(saved: Tensor, layer: Layer) -> Tensor:
    """View what is saved as (numbers, N, d1 * ... * dk), in which rows of the input can be chosen."""
    return saved.view(len(saved), len(layer.input), -1)


def forward(layer: Layer, plan: Plan, save: bool) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for and, with `save`, what `backward` needs.

    Ignored rows are left out where all that is asked of them is known without their logits.
    """
    x, w, b = layer.operands(plan)
    known = all(OUTPUTS[name].if_ignored is not None for name in plan.options.outputs)
    rows = valid_rows(layer, plan) if known else None
    outputs, saved = plan.options.allocate(stand_in(layer, plan)), allocate_saved(layer, plan, save)
    if rows is not None:
        for values, output in zip(outputs, OUTPUTS.values(), strict=True):
            if values is not None and output.if_ignored is not None:
                values.fill_(output.if_ignored)
    for at, _, z in chunk_logits(x, w, b, plan, rows):
        arguments = (z.view(-1, *plan.sizes), layer.target[at], layer.weight)
        of_chunk, saved_of_chunk = plan.row_operations.forward(*arguments, plan.options, save=save)
        for values, some in zip(outputs, of_chunk, strict=True):
            if values is not None:
                values[at] = some
        if saved is not None and saved_of_chunk is not None:
            by_row(saved, layer)[:, at] = saved_of_chunk.view(len(saved), z.shape[0], -1)
    return outputs, saved


def rows_with_gradient(upstream: Upstream, layer: Layer, plan: Plan) -> Tensor | None:
    """Return the numbers of the rows that have a gradient; None for all, as on a GPU, where `valid_rows` says why."""
    if not layer.target.is_cpu:
        return None
    found = torch.zeros((len(layer.input), *plan.sizes[1:]), dtype=torch.bool)
    valid = kind(plan.spec).rows_used(layer.target, plan.spec.ignore_index)
    for name, g in zip(DIFFERENTIABLE, upstream, strict=True):
        if g is not None:
            wanted = g != 0
            if OUTPUTS[name].zero_if_ignored and valid is not None:
                wanted &= valid
            found |= wanted
    return numbers_of(found)


def backward(
    upstream: Upstream, layer: Layer, plan: Plan, saved: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Compute the gradients of x, W and b that `needs` names from those of the differentiable outputs."""
    x, w, b = layer.operands(plan)
    rows = rows_with_gradient(upstream, layer, plan)
    gradients = Gradients(x, w, needs, rows)
    for at, features, z in chunk_logits(x, w, b, plan, rows):
        logits = z.view(-1, *plan.sizes)
        some = [None if g is None else g[at] for g in upstream]
        saved_of_chunk = None if saved is None else by_row(saved, layer)[:, at].flatten(1).contiguous()
        arguments = (logits, layer.target[at], layer.weight, saved_of_chunk)
        plan.row_operations.gradient(some, *arguments, plan.options, grad=logits)
        gradients.add(z, features, at)
    return gradients.found()


def of_differentiable(upstream: Upstream) -> list[Tensor | None]:
    """Choose from the upstream gradients of all outputs those that backends take."""
    return [g for g, output in zip(upstream, OUTPUTS.values(), strict=True) if output.differentiable]


class LinearCrossEntropyRows(torch.autograd.Function):
    """Saves the layer's tensors and what the backend keeps of each row."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        layer = Layer(*tensors)
        out, saved = forward(layer, plan, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        ctx.plan = plan
        kinds = zip(out, OUTPUTS.values(), strict=True)
        ctx.mark_non_differentiable(*(it for it, output in kinds if it is not None and not output.differentiable))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients; where they will be differentiated or are batched, in torch operations."""
        some = of_differentiable(upstream)
        given = [g for g in some if g is not None]
        if not given:
            return None, None, None, None, None, None
        *tensors, saved = ctx.saved_tensors
        layer, needs = Layer(*tensors), ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled() or any(batched(g) for g in given):
            grads = differentiable_gradients(some, layer, ctx.plan)
        else:
            grads = backward(some, layer, ctx.plan, saved, needs)
        results = [
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, layer[:3], strict=True)
        ]
        return None, *results, None, None


def differentiable_gradients(upstream: Upstream, layer: Layer, plan: Plan) -> list[Tensor | None]:
    """Compute the gradients in operations that autograd follows, with all logits at once."""
    with torch.autocast(layer.input.device.type, enabled=False):
        x, w, b = layer.operands(plan)
        logits = F.linear(x, w, b).view(-1, *plan.sizes)
        g = torch_rows.differentiable_gradient(upstream, logits, layer.target, layer.weight, plan.options)
        g = g.reshape(len(x), len(w))
        return [g @ w, g.t() @ x, g.sum(0)]
