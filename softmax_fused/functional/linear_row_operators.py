"""The outputs of rows of a linear layer's logits as operators that torch.compile takes as they are.

`softmax_fused::linear_cross_entropy_rows` returns all outputs that a row can have, empty where not asked for, and what
its backward needs, empty where that is nothing. `outputs` is the names with commas in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused._row_outputs import OUTPUTS, RowOutputs
from softmax_fused.functional.chunked_linear import Layer, Plan, make_plan
from softmax_fused.functional.chunked_linear_rows import (
    allocate_saved,
    backward,
    forward,
    of_differentiable,
    stand_in,
)
from softmax_fused.functional.linear_operators import OPTIONS, TENSORS, empty_gradients, filled

if TYPE_CHECKING:
    from torch import Tensor

ARGUMENTS = f"{TENSORS}, str outputs, {OPTIONS}"


def parse(arguments: tuple[Any, ...]) -> tuple[Layer, Plan, list[bool]]:
    """Return what an operator's arguments say."""
    outputs, needs, *options = arguments[5:]
    layer = Layer(*arguments[:5])
    return layer, make_plan(layer, tuple(outputs.split(",")), *options), needs


def complete(layer: Layer, outputs: RowOutputs, saved: Tensor | None) -> tuple[Tensor, ...]:
    """Return the outputs and what is saved; an operator always has the same number of outputs, so some are empty."""
    empty = layer.input.new_empty
    kinds = zip(outputs, OUTPUTS.values(), strict=True)
    found = [empty(0, dtype=output.dtype) if it is None else it for it, output in kinds]
    return *found, empty(0) if saved is None else saved


@torch.library.custom_op(
    "softmax_fused::linear_cross_entropy_rows",
    mutates_args=(),
    schema=f"({ARGUMENTS}) -> ({', '.join(['Tensor'] * (len(OUTPUTS) + 1))})",
)
def linear_cross_entropy_rows(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the outputs and, where a tensor needs a gradient, what backward needs."""
    layer, plan, needs = parse(arguments)
    return complete(layer, *forward(layer, plan, save=any(needs)))


@linear_cross_entropy_rows.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    layer, plan, needs = parse(arguments)
    return complete(layer, plan.options.allocate(stand_in(layer, plan)), allocate_saved(layer, plan, any(needs)))


@torch.library.custom_op(
    "softmax_fused::linear_cross_entropy_rows_backward",
    mutates_args=(),
    schema=f"(Tensor?[] upstream, Tensor saved, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def linear_cross_entropy_rows_backward(
    upstream: list[Tensor | None], saved: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Compute the gradients from those of the differentiable outputs."""
    layer, plan, needs = parse(arguments)
    return tuple(filled(layer, backward(upstream, layer, plan, saved if saved.numel() else None, needs)))


@linear_cross_entropy_rows_backward.register_fake
def _(_upstream: list[Tensor | None], _saved: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(*parse(arguments)))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs."""
    ctx.set_materialize_grads(False)
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[-1])


def gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W and b, and none for the other arguments."""
    outputs, needs, *_ = ctx.options
    none = [None] * (2 + len(ctx.options))
    given = zip(OUTPUTS, upstream[:-1], strict=True)
    some = of_differentiable([g if name in outputs.split(",") else None for name, g in given])
    if all(g is None for g in some):
        return None, None, None, *none
    *tensors, saved = ctx.saved_tensors
    found = torch.ops.softmax_fused.linear_cross_entropy_rows_backward(some, saved, *tensors, *ctx.options)
    results = [
        grad.to(tensor.dtype) if need else None for grad, tensor, need in zip(found, tensors[:3], needs, strict=True)
    ]
    return *results, *none


linear_cross_entropy_rows.register_autograd(gradients, setup_context=setup_context)
