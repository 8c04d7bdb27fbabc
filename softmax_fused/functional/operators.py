"""The loss as operators that torch.compile takes as they are; eager code never comes here.

`softmax_fused::cross_entropy` returns the loss and a tensor for backward, empty where it needs none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softmax_fused._dispatch import get_backend
from softmax_fused._spec import row_shape
from softmax_fused.backends.torch.targets import make_spec

OPTIONS = (
    "Tensor? weight, str reduction, SymInt ignore_index, float smoothing, ScalarType dtype, bool batch_invariant, "
    "str backend, int layout"
)
LAYOUT = 2
"""Of what is saved. Graphs that torch.compile keeps on disk name it, so that none is used after it has changed."""


def with_saved(loss: Tensor, saved: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss with what is saved, or an empty tensor: an operator always has the same number of outputs."""
    (kept,) = saved or [loss.new_empty(0)]
    return loss, kept


@torch.library.custom_op(
    "softmax_fused::cross_entropy",
    mutates_args=(),
    schema=f"(Tensor input, Tensor target, {OPTIONS}) -> (Tensor, Tensor)",
)
def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss and what its backward needs."""
    *rest, backend, _ = options
    spec = make_spec(logits, target, *rest)
    operations = get_backend(backend, logits.device.type).cross_entropy
    loss, saved = operations.loss(logits, target, weight, spec, save=True)
    shapes = operations.saved_shapes(logits, weight, spec)
    cut = [kept if kept.shape == shape else kept[: shape[0]] for kept, shape in zip(saved, shapes, strict=True)]
    return with_saved(loss, cut)


@cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    *rest, backend, _ = options
    spec = make_spec(logits, target, *rest)
    shapes = get_backend(backend, logits.device.type).cross_entropy.saved_shapes(logits, weight, spec)
    loss = logits.new_empty(row_shape(logits.shape) if spec.reduction == "none" else (), dtype=spec.dtype)
    return with_saved(loss, [logits.new_empty(shape, dtype=spec.acc) for shape in shapes])


@torch.library.custom_op(
    "softmax_fused::cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor input, Tensor target, Tensor[] saved, {OPTIONS}) -> Tensor",
)
def cross_entropy_backward(
    upstream: Tensor, logits: Tensor, target: Tensor, saved: list[Tensor], weight: Tensor | None, *options: Any
) -> Tensor:
    """Compute the gradient of the logits."""
    *rest, backend, _ = options
    spec = make_spec(logits, target, *rest)
    kept = [tensor for tensor in saved if tensor.numel()]
    return get_backend(backend, logits.device.type).cross_entropy.gradient(upstream, logits, target, weight, kept, spec)


@cross_entropy_backward.register_fake
def _(_upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs."""
    logits, target, weight, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, *output[1:])


def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the gradient of the logits, and none for the other arguments."""
    logits, target, weight, *saved = ctx.saved_tensors
    grad = None
    if upstream is not None:
        grad = torch.ops.softmax_fused.cross_entropy_backward(upstream, logits, target, saved, weight, *ctx.options)
    return grad, *[None] * (2 + len(ctx.options))


cross_entropy.register_autograd(backward, setup_context=setup_context)
