"""The linear layer and its loss as operators that torch.compile takes as they are; eager code never comes here.

`softmax_fused::linear_cross_entropy` returns the loss, the factor by which a mean's gradients are multiplied, and the
gradients of x, W and b for the sum of the losses; those that are not needed are empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused.functional.chunked_linear import Layer, Plan, make_plan, reduce, run_chunks, sum_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TENSORS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
OPTIONS = (
    "bool[] needs, str reduction, SymInt ignore_index, float label_smoothing, float logit_scale, float? softcap, "
    "ScalarType dtype, SymInt[] sizes, SymInt rows, ScalarType layer_dtype, str backend, bool batch_invariant"
)
LOSS = ("loss",)
NO_GRADIENTS = (False, False, False)


def filled(layer: Layer, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Replace missing gradients by empty tensors: an operator always has the same number of outputs."""
    return [layer.input.new_empty(0) if grad is None else grad for grad in gradients]


def empty_gradients(layer: Layer, plan: Plan, needs: Sequence[bool]) -> list[Tensor]:
    """Return tensors of the gradients' shapes and types, without values."""
    x, w = layer.input, layer.linear_weight
    products, sums = plan.products, sum_dtype(plan.products)
    made = [
        torch.empty_like(x, dtype=products) if needs[0] else None,
        torch.empty_like(w, dtype=sums) if needs[1] else None,
        w.new_empty(w.shape[0], dtype=sums) if needs[2] else None,
    ]
    return filled(layer, made)


@torch.library.custom_op(
    "softmax_fused::linear_cross_entropy",
    mutates_args=(),
    schema=f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_cross_entropy(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the loss and, for a mean or sum, the gradients that `needs` names."""
    layer, (needs, *options) = Layer(*arguments[:5]), arguments[5:]
    plan = make_plan(layer, LOSS, *options)
    losses, grads = run_chunks(layer, plan, NO_GRADIENTS if plan.spec.reduction == "none" else needs)
    loss, factor = reduce(losses, layer, plan)
    return loss, losses.new_ones(()) if factor is None else factor, *filled(layer, grads)


@linear_cross_entropy.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    layer, (needs, *options) = Layer(*arguments[:5]), arguments[5:]
    plan = make_plan(layer, LOSS, *options)
    each = plan.spec.reduction == "none"
    loss = layer.input.new_empty((layer.input.shape[0], *plan.sizes[1:]) if each else (), dtype=plan.spec.dtype)
    factor = layer.input.new_empty((), dtype=plan.spec.acc)
    return loss, factor, *empty_gradients(layer, plan, NO_GRADIENTS if each else needs)


@torch.library.custom_op(
    "softmax_fused::linear_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def linear_cross_entropy_backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients for the upstream gradient of each row."""
    layer, (needs, *options) = Layer(*arguments[:5]), arguments[5:]
    return tuple(filled(layer, run_chunks(layer, make_plan(layer, LOSS, *options), needs, upstream)[1]))


@linear_cross_entropy_backward.register_fake
def _(_upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    layer, (needs, *options) = Layer(*arguments[:5]), arguments[5:]
    return tuple(empty_gradients(layer, make_plan(layer, LOSS, *options), needs))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs."""
    ctx.set_materialize_grads(False)
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output[1:])


def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W and b, and none for the other arguments."""
    needs, reduction, *_rest = ctx.options
    none = [None] * (2 + len(ctx.options))
    if upstream is None:
        return None, None, None, *none
    *tensors, factor, grad_x, grad_w, grad_b = ctx.saved_tensors
    grads, scale = (grad_x, grad_w, grad_b), None
    if reduction == "none":
        grads = torch.ops.softmax_fused.linear_cross_entropy_backward(upstream, *tensors, *ctx.options)
    else:
        scale = upstream.to(factor.dtype) * factor
    results = [
        (grad if scale is None else grad.to(sum_dtype(grad.dtype)) * scale).to(tensor.dtype) if need else None
        for grad, tensor, need in zip(grads, tensors[:3], needs, strict=True)
    ]
    return *results, *none


linear_cross_entropy.register_autograd(backward, setup_context=setup_context)
