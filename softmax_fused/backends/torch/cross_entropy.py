"""The kernels' operations in pure torch: for CPU tensors, and for GPU tensors where Triton is absent.

a = w * ((1 - e) t + keep * e / C),  A = sum(a),  loss = A * log s - <a, z - m>,  gradient = g * (A * p - a)

The batch goes through in few large chunks: the loss needs no logits-sized tensor, the gradient only its result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused.backends.torch.chunks import Workspace, log_softmax, with_classes
from softmax_fused.backends.torch.targets import Indices, Probabilities, class_indices, probability_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused.functional.autograd import Spec


def accumulated(weight: Tensor | None, ndim: int, spec: Spec) -> Tensor | None:
    """Return the weights in the accumulation type, shaped to broadcast against (N, C, d1..dk)."""
    return None if weight is None else weight.to(spec.acc).view(-1, *[1] * (ndim - 2))


def arranged(logits: Tensor, target: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give a single row (C,) a batch dimension, and (N, C, d1..dk) one spatial dimension where that copies nothing."""
    if logits.ndim == 1:
        return logits.unsqueeze(0), target.unsqueeze(0), None if grad is None else grad.unsqueeze(0)
    tensors = [logits, target] if grad is None else [logits, target, grad]
    if logits.ndim > 3 and all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.flatten(tensor.ndim - logits.ndim + 2) for tensor in tensors]
    return tensors[0], tensors[1], None if grad is None else tensors[2]


def share_of(z: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Indices | Probabilities:
    """Return a, in the form that suits the target."""
    w = accumulated(weight, z.ndim, spec)
    return Indices(z, target, w, spec) if spec.indices else Probabilities(z, target, w, spec)


def sweep(
    z: Tensor, a: Indices | Probabilities, spec: Spec, losses: Tensor | None, grad: Tensor | None, g: Tensor
) -> None:
    """Fill `losses`, `grad` or both, chunk by chunk; g, a scalar or (N, d1..dk), is what the gradient is scaled by."""
    workspace = Workspace(z, grad, spec.acc)
    g = a.live(g.expand((z.shape[0], *z.shape[2:]))).unsqueeze(1)
    for part in workspace.parts:
        at = with_classes(part)
        work = workspace.chunk(z[at], at)
        log_softmax(z[at], work)
        if losses is not None:
            losses[part] = a.loss(work, at).squeeze(1)
        if grad is not None:
            a.gradient(work.exp_(), g[at], at, grad[at])


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:  # noqa: ARG001
    """Return the shapes of what `loss` and `loss_and_gradient` save: the denominator of a mean."""
    return [()] if spec.reduction == "mean" else []


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss and the denominator of a mean; fill `grad`, where given, for an upstream gradient of 1."""
    z, t, out = arranged(logits, target, grad)
    a = share_of(z, t, weight, spec)
    losses = z.new_empty((z.shape[0], *z.shape[2:]), dtype=spec.acc)
    if spec.reduction == "mean":
        denominator = a.denominator()
        denominator = denominator.masked_fill(denominator == 0, torch.nan)
        sweep(z, a, spec, losses, out, 1 / denominator)
        return (a.live(losses).sum() / denominator).to(spec.dtype), [denominator]
    sweep(z, a, spec, losses, out, losses.new_ones(()))
    losses = a.live(losses)
    if spec.reduction == "sum":
        return losses.sum().to(spec.dtype), []
    return losses.view((*logits.shape[:1], *logits.shape[2:]) if logits.ndim > 1 else ()).to(spec.dtype), []


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: the denominator of a mean."""
    value, saved = forward(logits, target, weight, spec, None)
    return value, saved if save else []


def scales(upstream: Tensor, grad: Tensor, spec: Spec) -> bool:
    """Whether a gradient for an upstream gradient of 1 is scaled to another: on the CPU, at one rounding's cost."""
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

    `upstream` is a scalar or has the rows' shape. `grad`, where given, is filled and returned; it may be `logits`. To
    the bit what `loss_and_gradient` and `unless_one` give.
    """
    grad = torch.empty_like(logits) if grad is None else grad
    later = scales(upstream, grad, spec)
    g = torch.ones_like(upstream, dtype=spec.acc) if later else upstream.to(spec.acc)
    if spec.reduction == "mean":
        g = g / saved[0]
    z, t, out = arranged(logits, target, grad)
    a = share_of(z, t, weight, spec)
    sweep(z, a, spec, None, out, g if g.ndim == 0 else g.reshape((z.shape[0], *z.shape[2:])))
    return unless_one(upstream, logits, target, weight, saved, spec, grad) if later else grad


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute the loss, the denominator of a mean, and the gradient for an upstream gradient of 1.

    `grad`, where given, is filled and returned; it may be `logits`.
    """
    grad = torch.empty_like(logits) if grad is None else grad
    return *forward(logits, target, weight, spec, grad), grad


def unless_one(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
) -> Tensor:
    """Bring `grad`, the gradient for an upstream gradient of 1, to another: scaled, or computed again."""
    if upstream.is_cpu and bool((upstream == 1).all()):
        return grad
    if scales(upstream, grad, spec):
        return grad.mul_(upstream)
    return gradient(upstream, logits, target, weight, saved, spec, grad)


def index_share(p: Tensor, label: Tensor, weights: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    """Return a for class indices, in the shape of `p`; an infinite weight counts in rows of its own class alone."""
    a = torch.zeros_like(p).scatter_(1, label.unsqueeze(1), (weights * (1 - spec.label_smoothing)).unsqueeze(1))
    if not spec.label_smoothing:
        return a
    off = spec.label_smoothing / p.shape[1]
    return a + (off if w is None else off * w)


def differentiable_gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> Tensor:
    """Compute the gradient in operations that autograd follows, for derivatives of higher order."""
    z, t, _ = arranged(logits, target, None)
    w = accumulated(weight, z.ndim, spec)
    p = torch.softmax(z, 1, dtype=spec.acc)
    rows = (z.shape[0], *z.shape[2:])
    keep = None
    if spec.indices:
        label, keep = class_indices(t, z.shape[1], spec)
        weights = torch.ones(rows, dtype=spec.acc, device=z.device) if w is None else w.flatten()[label]
        a = index_share(p, label, weights, w, spec)
        denominator = (weights if keep is None else weights.masked_fill(~keep, 0)).sum()
    else:
        a = probability_share(t, w, spec)
        denominator = p.new_tensor(p.numel() // p.shape[1])
    g = upstream.to(spec.acc)
    g = (g.reshape(rows) if spec.reduction == "none" else g.expand(rows)).unsqueeze(1)
    if spec.reduction == "mean":
        g = g / denominator.masked_fill(denominator == 0, torch.nan)
    grad = g * (a.sum(1, keepdim=True) * p - a)
    if keep is not None:
        grad = grad.masked_fill(~keep.unsqueeze(1), 0)
    return grad.view_as(logits).to(logits.dtype)
