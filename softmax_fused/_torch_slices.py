"""Statistics and gradient of a slice of the classes in pure torch, chunk by chunk.

a = w * ((1 - e) t + keep * e / C),  gradient = g * (A * exp(z - m - log s) - a), with C of all slices together
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused._torch_path import accumulated, arranged
from softmax_fused._torch_rows import Workspace, with_classes
from softmax_fused._torch_targets import probability_share, product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._autograd import Spec

ELSEWHERE, IGNORED, UNKNOWN = -1, -2, -3
"""Labels of rows whose true class is not in the slice; kernels/rows.py has the same."""


def put(p: Tensor, label: Tensor, value: Tensor) -> None:
    """Write a number a row at the true class, where the slice has it."""
    index = label.clamp(min=0)
    p.scatter_(1, index, torch.where(label >= 0, value, p.gather(1, index)))


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return m, s and, where a is more than the true class's, its sum and <a, z - m>, of each row of the slice.

    The true class is left out of s and a. m is finite where all logits are -inf: there s is 0.
    """
    z, t, _ = arranged(logits.detach(), target, None)
    off = spec.label_smoothing / spec.classes
    out = z.new_zeros((4 if off or not spec.indices else 2, z.shape[0], *z.shape[2:]), dtype=spec.acc)
    out[0].fill_(torch.finfo(spec.acc).min)
    if z.numel():
        w = accumulated(weight, z.ndim, spec)
        workspace = Workspace(z, None, spec.acc)
        for part in workspace.parts:
            at = with_classes(part)
            m = z[at].amax(1, keepdim=True).to(spec.acc).clamp_(min=torch.finfo(spec.acc).min)
            shifted = torch.sub(z[at], m, out=workspace.chunk(z[at], at))
            if len(out) == 4:
                a = probability_share(t[at], w, spec) if not spec.indices else spread(shifted, w, off)
                out[2][part] = a.sum(1)
                out[3][part] = product(a, shifted).sum(1)
            p = shifted.exp_()
            if spec.indices:
                put(p, t[part].unsqueeze(1), p.new_zeros(()))
            out[0][part], out[1][part] = m.squeeze(1), p.sum(1)
    return out.view(len(out), *((logits.shape[0], *logits.shape[2:]) if logits.ndim > 1 else ()))


def spread(z: Tensor, w: Tensor | None, off: float) -> Tensor:
    """Return w * e / C, of the shape of `z`."""
    return (z.new_full((), off) if w is None else off * w).expand_as(z)


def gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
) -> None:
    """Fill `grad` with the gradient of the slice, from the row statistics (m, log s[, A]) and a mean's denominator."""
    z, t, out = arranged(logits, target, grad)
    assert out is not None
    shape = (z.shape[0], *z.shape[2:])
    m, log_s, *total = (it.reshape(shape).unsqueeze(1) for it in saved[0].unbind(-1))
    g = upstream.to(spec.acc)
    g = g / saved[1] if spec.reduction == "mean" else g
    g = g.reshape(shape).unsqueeze(1) if spec.reduction == "none" else g.expand(shape).unsqueeze(1)
    w = accumulated(weight, z.ndim, spec)
    workspace = Workspace(z, out, spec.acc)
    for part in workspace.parts:
        at = with_classes(part)
        log_p = torch.sub(z[at], m[at], out=workspace.chunk(z[at], at)).sub_(log_s[at])
        if spec.indices:
            label = t[part].unsqueeze(1)
            by_index(log_p, g[at], label, w, total[0][at] if total else None, spec)
        else:
            log_p.exp_().mul_(total[0][at]).sub_(probability_share(t[at], w, spec)).mul_(g[at])
        if log_p.data_ptr() != out[at].data_ptr():
            out[at] = log_p


def by_index(log_p: Tensor, g: Tensor, label: Tensor, w: Tensor | None, total: Tensor | None, spec: Spec) -> None:
    """Turn log p into the gradient; the true class's is g * (A * (p - 1) + A - a), with p - 1 = expm1(log p)."""
    off = spec.label_smoothing / spec.classes
    index = label.clamp(min=0)
    a_true: float | Tensor = 1 - spec.label_smoothing + off
    if w is not None:
        a_true = a_true * w.flatten()[index]
    rest = 1 - a_true if total is None else total - a_true
    A = torch.where(label == UNKNOWN, torch.nan, log_p.new_ones(())) if total is None else total  # noqa: N806
    true = g * (A * log_p.gather(1, index).expm1() + rest)
    log_p.exp_().mul_(A * g)
    if off:
        log_p.sub_(g * off if w is None else g * off * w)
    put(log_p, label, true)
    ignored = label == IGNORED
    if not ignored.is_cpu or bool(ignored.any()):
        log_p.masked_fill_(ignored, 0)
