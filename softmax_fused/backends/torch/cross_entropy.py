"""The loss and its gradient in torch operations, chunk by chunk.

a = w * ((1 - e) t + valid * e / C),  A = sum(a),  loss = A * log s - <a, z - m>,  gradient = g * (A * p - a)

The batch goes through in few large chunks: the loss needs no logits-sized tensor, the gradient only its result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused._spec import row_shape
from softmax_fused.backends.torch.chunks import Workspace, log_softmax, with_classes
from softmax_fused.backends.torch.targets import make_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Spec
    from softmax_fused.backends.torch.targets import Target


def canonicalize(logits: Tensor, target: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give a single row (C,) a batch dimension, and (N, C, d1..dk) one spatial dimension where that copies nothing."""
    if logits.ndim == 1:
        return logits.unsqueeze(0), target.unsqueeze(0), None if grad is None else grad.unsqueeze(0)
    tensors = [logits, target] if grad is None else [logits, target, grad]
    if logits.ndim > 3 and all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.flatten(tensor.ndim - logits.ndim + 2) for tensor in tensors]
    return tensors[0], tensors[1], None if grad is None else tensors[2]


def run_chunks(z: Tensor, batch: Target, spec: Spec, losses: Tensor | None, grad: Tensor | None, g: Tensor) -> None:
    """Fill `losses`, `grad` or both, chunk by chunk; g, a scalar or (N, d1..dk), is what the gradient is scaled by."""
    workspace = Workspace(z, grad, spec.acc)
    g = batch.zero_ignored(g.expand(row_shape(z.shape))).unsqueeze(1)
    for part in workspace.parts:
        at = with_classes(part)
        work = workspace.chunk(z[at], at)
        log_softmax(z[at], work, spec)
        if losses is not None:
            losses[part] = batch.loss(work, at).squeeze(1)
        if grad is not None:
            batch.gradient(work.exp_(), g[at], at, grad[at])


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:  # noqa: ARG001
    """Return the shapes of what `loss` and `loss_and_gradient` save: the denominator of a mean."""
    return [()] if spec.reduction == "mean" else []


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss and the denominator of a mean; fill `grad`, where given, for an upstream gradient of 1."""
    z, t, out = canonicalize(logits, target, grad)
    batch = make_target(z, t, weight, spec)
    losses = z.new_empty(row_shape(z.shape), dtype=spec.acc)
    if spec.reduction == "mean":
        denominator = batch.denominator()
        denominator = denominator.masked_fill(denominator == 0, torch.nan)
        run_chunks(z, batch, spec, losses, out, 1 / denominator)
        return (batch.zero_ignored(losses).sum() / denominator).to(spec.dtype), [denominator]
    run_chunks(z, batch, spec, losses, out, losses.new_ones(()))
    losses = batch.zero_ignored(losses)
    if spec.reduction == "sum":
        return losses.sum().to(spec.dtype), []
    return losses.view(row_shape(logits.shape)).to(spec.dtype), []


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: the denominator of a mean."""
    value, saved = forward(logits, target, weight, spec, None)
    return value, saved if save else []


def can_rescale(upstream: Tensor, grad: Tensor, spec: Spec) -> bool:
    """Whether multiplying a gradient for an upstream gradient of 1 gives that for another, up to one rounding.

    The rounding of a single row's loss would not be that of the same row among others.
    """
    if spec.batch_invariant and spec.reduction == "none":
        return False
    return upstream.is_cpu and upstream.ndim == 0 and grad.dtype == spec.acc and bool(upstream.isfinite())


def gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits from what `loss` or `loss_and_gradient` saved.

    `upstream` is a scalar or has the rows' shape. `grad`, where given, is filled and returned; it may be `logits`. The
    result is to the bit what `loss_and_gradient` and `rescale_gradient` give.
    """
    grad = torch.empty_like(logits) if grad is None else grad
    rescale = can_rescale(upstream, grad, spec)
    g = torch.ones_like(upstream, dtype=spec.acc) if rescale else upstream.to(spec.acc)
    if spec.reduction == "mean":
        g = g / saved[0]
    z, t, out = canonicalize(logits, target, grad)
    batch = make_target(z, t, weight, spec)
    run_chunks(z, batch, spec, None, out, g if g.ndim == 0 else g.reshape(row_shape(z.shape)))
    return rescale_gradient(upstream, logits, target, weight, saved, spec, grad) if rescale else grad


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute the loss, the denominator of a mean, and the gradient for an upstream gradient of 1.

    `grad`, where given, is filled and returned; it may be `logits`.
    """
    grad = torch.empty_like(logits) if grad is None else grad
    return *forward(logits, target, weight, spec, grad), grad


def rescale_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
) -> Tensor:
    """Rescale `grad`, computed for an upstream gradient of 1, or compute it again where rounding would show."""
    if upstream.is_cpu and bool((upstream == 1).all()):
        return grad
    if can_rescale(upstream, grad, spec):
        return grad.mul_(upstream)
    return gradient(upstream, logits, target, weight, saved, spec, grad)


def differentiable_gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> Tensor:
    """Compute the gradient in operations that autograd follows, for derivatives of higher order."""
    z, t, _ = canonicalize(logits, target, None)
    rows = row_shape(z.shape)
    p = torch.softmax(z, 1, dtype=spec.acc)
    batch = make_target(z, t, weight, spec)
    a = batch.weighted(p)
    g = upstream.to(spec.acc)
    g = (g.reshape(rows) if spec.reduction == "none" else g.expand(rows)).unsqueeze(1)
    if spec.reduction == "mean":
        denominator = batch.denominator()
        g = g / denominator.masked_fill(denominator == 0, torch.nan)
    grad = g * (a.sum(1, keepdim=True) * p - a)
    if batch.valid is not None:
        grad = grad.masked_fill(~batch.valid.unsqueeze(1), 0)
    return grad.view_as(logits).to(logits.dtype)
