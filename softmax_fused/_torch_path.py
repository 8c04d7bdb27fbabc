"""The kernels' operations in pure torch: for CPU tensors, and for GPU tensors where Triton is absent.

a = w * ((1 - e) t + keep * e / C),  A = sum(a),  loss = -<a, log p>,  gradient = g * (A * p - a)

The batch goes through in chunks that stay in the cache: the loss needs no logits-sized tensor, the gradient only its
result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused import _check

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from softmax_fused._autograd import Spec

CHUNK = 2**20
"""Elements in a chunk: 4 MiB of float32. They stay in the last-level cache, and chunks are few: each operation on one
is a parallel region, which on a busy machine waits for its turn."""


def chunks(z: Tensor) -> Iterator[slice]:
    """Slice the batch dimension into pieces of about CHUNK elements."""
    step = max(1, CHUNK * z.shape[0] // z.numel())
    return (slice(i, i + step) for i in range(0, z.shape[0], step))


def batched(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Give a single row (C,) and its target a batch dimension."""
    return (logits.unsqueeze(0), target.unsqueeze(0)) if logits.ndim == 1 else (logits, target)


def class_indices(target: Tensor, classes: int, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Return class indices that can be gathered and, where rows are ignored, the mask of those that are not.

    Raises:
        IndexError: For a CPU tensor, if an index that is not ignored lies outside [0, C).
    """
    label = target.long()
    keep = label != spec.ignore_index
    if not label.is_cpu:
        return label.masked_fill(~keep, 0), keep
    every = bool(keep.all())
    label = label if every else label.masked_fill(~keep, 0)
    low, high = (int(bound) for bound in label.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(_check.out_of_range(classes, spec.ignore_index, low if low < 0 else high))
    return label, None if every else keep


def accumulated(weight: Tensor | None, ndim: int, spec: Spec) -> Tensor | None:
    """Return the weights in the accumulation type, shaped to broadcast against (N, C, d1..dk)."""
    return None if weight is None else weight.to(spec.acc).view(-1, *[1] * (ndim - 2))


def probability_share(t: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    """Return a for class probabilities."""
    a = t.to(spec.acc)
    if spec.label_smoothing:
        a = a * (1 - spec.label_smoothing) + spec.label_smoothing / t.shape[1]
    return a if w is None else a * w


def product(a: Tensor, log_p: Tensor) -> Tensor:
    """Return a * log p with 0 * (-inf) = 0; where log p is NaN, so is the result."""
    return (a * log_p).masked_fill_((a == 0) & (log_p == -torch.inf), 0)


def index_losses(z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return every row's loss and its share of the mean's denominator."""
    label, keep = class_indices(target, z.shape[1], spec)
    smoothing = spec.label_smoothing
    losses = z.new_empty(label.shape, dtype=spec.acc)
    weights = torch.ones_like(losses) if w is None else w.flatten()[label]
    for part in chunks(z):
        log_p = torch.log_softmax(z[part], 1, dtype=spec.acc)
        true = log_p.gather(1, label[part].unsqueeze(1)).squeeze(1)
        dot = true if w is None else product(weights[part], true)
        if smoothing:
            spread = log_p.sum(1) if w is None else product(w.expand_as(log_p), log_p).sum(1)
            dot = smoothing / z.shape[1] * spread + (0 if smoothing == 1 else (1 - smoothing) * dot)
        torch.neg(dot, out=losses[part])
    if keep is not None:
        losses.masked_fill_(~keep, 0)
        weights = weights.masked_fill(~keep, 0)
    return losses, weights


def probability_losses(z: Tensor, t: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    """Return every row's loss."""
    losses = z.new_empty((z.shape[0], *z.shape[2:]), dtype=spec.acc)
    for part in chunks(z):
        log_p = torch.log_softmax(z[part], 1, dtype=spec.acc)
        torch.neg(product(probability_share(t[part], w, spec), log_p).sum(1), out=losses[part])
    return losses


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:  # noqa: ARG001
    """Return the shapes of what `loss` saves: the denominator of a mean."""
    return [()] if spec.reduction == "mean" else []


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: the denominator of a mean."""
    z, t = batched(logits, target)
    w = accumulated(weight, z.ndim, spec)
    if spec.indices:
        losses, weights = index_losses(z, t, w, spec)
        denominator = weights.sum()
    else:
        losses = probability_losses(z, t, w, spec)
        denominator = losses.new_tensor(losses.numel())
    if spec.reduction == "none":
        return (losses.squeeze(0) if logits.ndim == 1 else losses).to(spec.dtype), []
    if spec.reduction == "sum":
        return losses.sum().to(spec.dtype), []
    denominator = denominator.masked_fill(denominator == 0, torch.nan)
    return (losses.sum() / denominator).to(spec.dtype), [denominator] if save else []


def gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, saved: Sequence[Tensor], spec: Spec
) -> Tensor:
    """Compute the gradient of the logits from what `loss` saved; `upstream` is a scalar or has the rows' shape."""
    z, t = batched(logits, target)
    w = accumulated(weight, z.ndim, spec)
    grad = torch.empty_like(logits)
    out = grad.unsqueeze(0) if logits.ndim == 1 else grad
    g = upstream.to(spec.acc) / saved[0] if spec.reduction == "mean" else upstream.to(spec.acc)
    g = g.expand((z.shape[0], *z.shape[2:])).unsqueeze(1)
    if spec.indices:
        index_gradient(out, g, z, t, w, spec)
    else:
        for part in chunks(z):
            a = probability_share(t[part], w, spec)
            p = torch.softmax(z[part], 1, dtype=spec.acc)
            out[part] = p.mul_(a.sum(1, keepdim=True)).sub_(a).mul_(g[part])
    return grad


def index_gradient(out: Tensor, g: Tensor, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
    """Fill `out` with the gradient; the true class gets g * (A - a - A * (the others' p)): no digit cancels."""
    label, keep = class_indices(target, z.shape[1], spec)
    label = label.unsqueeze(1)
    off = spec.label_smoothing / z.shape[1]
    true = torch.ones_like(g) if w is None else w.flatten()[label]
    total = true * (1 - spec.label_smoothing) + off * (z.shape[1] if w is None else w.sum())
    rest = total - true * (1 - spec.label_smoothing + off)  # A - a
    for part in chunks(z):
        direct = out.dtype == spec.acc
        p = out[part] if direct else z.new_empty(z[part].shape, dtype=spec.acc)
        torch.softmax(z[part], 1, dtype=spec.acc, out=p)
        p_true = p.gather(1, label[part])
        p.scatter_(1, label[part], 0)
        others = torch.where(p_true > 0.5, p.sum(1, keepdim=True), 1 - p_true)  # exact where 1 - p would cancel
        p.mul_(total[part] * g[part])
        if spec.label_smoothing:
            p.sub_(off * g[part] if w is None else off * g[part] * w)
        p.scatter_(1, label[part], (rest[part] - total[part] * others) * g[part])
        if keep is not None:
            p.masked_fill_(~keep[part].unsqueeze(1), 0)
        if not direct:
            out[part] = p


def differentiable_gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> Tensor:
    """Compute the gradient in operations that autograd follows, for derivatives of higher order."""
    z, t = batched(logits, target)
    w = accumulated(weight, z.ndim, spec)
    p = torch.softmax(z, 1, dtype=spec.acc)
    rows = (z.shape[0], *z.shape[2:])
    keep = None
    if spec.indices:
        label, keep = class_indices(t, z.shape[1], spec)
        one_hot = torch.zeros_like(p).scatter_(1, label.unsqueeze(1), 1)
        a = probability_share(one_hot, w, spec)
        weights = torch.ones(rows, dtype=spec.acc, device=z.device) if w is None else w.flatten()[label]
        denominator = (weights if keep is None else weights.masked_fill(~keep, 0)).sum()
    else:
        a = probability_share(t, w, spec)
        denominator = p.new_tensor(p.numel() // p.shape[1])
    g = upstream.to(spec.acc).expand(rows).unsqueeze(1)
    if spec.reduction == "mean":
        g = g / denominator.masked_fill(denominator == 0, torch.nan)
    grad = g * (a.sum(1, keepdim=True) * p - a)
    if keep is not None:
        grad = grad.masked_fill(~keep.unsqueeze(1), 0)
    return grad.view_as(logits).to(logits.dtype)
