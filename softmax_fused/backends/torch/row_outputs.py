"""Several outputs of each row in torch operations, chunk by chunk, and the gradient of the logits from theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused.backends.torch import chunks as _torch_rows
from softmax_fused.backends.torch.chunks import with_classes
from softmax_fused.backends.torch.cross_entropy import arranged, share_of
from softmax_fused.backends.torch.cross_entropy import differentiable_gradient as gradient_of_loss

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused.functional.rows import RowOutputs, RowSpec, Upstream


def effective(z: Tensor, options: RowSpec) -> tuple[Tensor, Tensor | float]:
    """Return the logits scaled and capped, in the accumulation type, and what the gradient by them is multiplied by."""
    x = z if z.dtype is options.spec.acc else z.to(options.spec.acc)
    if options.scale != 1:
        x = x * options.scale
    if options.softcap is None:
        return x, options.scale
    t = torch.tanh(x / options.softcap)
    return options.softcap * t, options.scale * (1 - t * t)


def finite_log(log_p: Tensor) -> Tensor:
    """Return log p with 0 where p is 0, for a factor beside p: there p log p is 0, and so is its derivative.

    Masking the product instead would be right in value only: autograd multiplies the mask's 0 by -inf, which is NaN.
    """
    return log_p.masked_fill(log_p == -torch.inf, 0)


def entropy_of(log_p: Tensor) -> Tensor:
    """Return -sum p log p, where 0 log 0 = 0."""
    return -(log_p.exp() * finite_log(log_p)).sum(1)


def statistics(x: Tensor, options: RowSpec, log_p: Tensor | None) -> RowOutputs:
    """Return all outputs of (N, C, d1..dk) but the loss, from the effective logits and, where needed, their log p."""
    lse = prediction = entropy = None
    if "prediction" in options.outputs or "logsumexp" in options.outputs:
        prediction = x.argmax(1, keepdim=True)
    if "logsumexp" in options.outputs and log_p is not None and prediction is not None:
        top = x.gather(1, prediction)
        lse = torch.where(top.isinf(), top, top - log_p.gather(1, prediction)).squeeze(1)
    if "entropy" in options.outputs and log_p is not None:
        entropy = entropy_of(log_p)
    return options.select(None, lse, None if prediction is None else prediction.squeeze(1), entropy)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec, save: bool
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for; nothing else is saved."""
    del save
    z, t, _ = arranged(logits, target, None)
    a = share_of(z, t, weight, options.spec)
    out = options.allocate(logits)
    filled = [None if it is None else it.view(z.shape[0], *z.shape[2:]) for it in out]
    for part in _torch_rows.chunks(z, _torch_rows.CHUNK):
        at = with_classes(part)
        x, _ = effective(z[at], options)
        log_p = torch.log_softmax(x, 1) if options.outputs != ("prediction",) else None
        found = statistics(x, options, log_p)
        if out.loss is not None and log_p is not None:
            found = found._replace(loss=a.loss(log_p, at).squeeze(1))
        for whole, piece in zip(filled, found, strict=True):
            if whole is not None:
                whole[part] = piece
    if filled[0] is not None:
        filled[0].copy_(a.live(filled[0]))
    return out, None


def gradient(
    upstream: Upstream, logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor | None, options: RowSpec
) -> Tensor:
    """Compute the gradient of the logits from those of loss, logsumexp and entropy, None where not asked for."""
    del stats
    grad = torch.empty_like(logits)
    z, t, out = arranged(logits, target, grad)
    assert out is not None
    a = share_of(z, t, weight, options.spec)
    rows = (z.shape[0], *z.shape[2:])
    g_loss, g_lse, g_entropy = (None if g is None else g.to(options.spec.acc).reshape(rows) for g in upstream)
    for part in _torch_rows.chunks(z, _torch_rows.CHUNK):
        at = with_classes(part)
        x, slope = effective(z[at], options)
        by_x = by_logits(x, None if g_lse is None else g_lse[part], None if g_entropy is None else g_entropy[part])
        if g_loss is not None:
            by_loss = torch.empty_like(x)
            a.gradient(torch.softmax(x, 1), a.live(g_loss)[part].unsqueeze(1), at, by_loss)
            by_x = by_loss if by_x is None else by_x.add_(by_loss)
        assert by_x is not None
        out[at] = by_x.mul_(slope)
    return grad


def by_logits(x: Tensor, g_lse: Tensor | None, g_entropy: Tensor | None) -> Tensor | None:
    """Return p * (g_lse - g_H * (log p + H)): the gradient by the effective logits, without the loss's."""
    if g_lse is None and g_entropy is None:
        return None
    log_p = torch.log_softmax(x, 1)
    grad = torch.zeros_like(x) if g_lse is None else log_p.exp() * g_lse.unsqueeze(1)
    if g_entropy is None:
        return grad
    entropy = entropy_of(log_p).unsqueeze(1)
    return grad - log_p.exp() * (g_entropy.unsqueeze(1) * (finite_log(log_p) + entropy))


def differentiable_gradient(
    upstream: Upstream, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec
) -> Tensor:
    """Compute the gradient in operations that autograd follows, for derivatives of higher order."""
    x, slope = effective(logits, options)
    z, _, _ = arranged(x, target, None)
    rows = (z.shape[0], *z.shape[2:])
    g_loss, g_lse, g_entropy = (None if g is None else g.to(options.spec.acc) for g in upstream)
    by_x = by_logits(
        z, None if g_lse is None else g_lse.reshape(rows), None if g_entropy is None else g_entropy.reshape(rows)
    )
    grad = torch.zeros_like(x) if by_x is None else by_x.view_as(x)
    if g_loss is not None:
        grad = grad + gradient_of_loss(g_loss, x, target, weight, options.spec)
    return (grad * slope).to(logits.dtype)
