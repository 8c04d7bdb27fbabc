"""Statistics, loss and gradient of a slice of the classes in pure torch, what is as large as the logits by chunks.

a = w * ((1 - e) t + keep * e / C),  gradient = g * (A * exp(z - m - log s) - a), with C of all slices together
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors as _check
from softmax_fused.backends.torch.chunks import Workspace, with_classes
from softmax_fused.backends.torch.cross_entropy import accumulated, arranged
from softmax_fused.backends.torch.targets import probability_share, product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused.functional.autograd import Spec

ELSEWHERE, IGNORED, UNKNOWN = -1, -2, -3
"""Labels of rows whose true class is not in the slice."""


def prepare(logits: Tensor, target: Tensor, spec: Spec) -> Tensor:
    """Return class probabilities as they are, class indices relative to the slice.

    They are ELSEWHERE where another slice has the class, IGNORED, or UNKNOWN where there is no such class.

    Raises:
        IndexError: For a CPU tensor, if there is no such class.
    """
    if not spec.indices:
        return target
    label = target.long()
    here = label - spec.first
    known = (label >= 0) & (label < spec.classes)
    inside = known & (here >= 0) & (here < logits.shape[min(logits.ndim - 1, 1)])
    found = torch.where(inside, here, torch.where(known, ELSEWHERE, UNKNOWN))
    found.masked_fill_(label == spec.ignore_index, IGNORED)
    if label.is_cpu:
        wrong = label[found == UNKNOWN]
        if wrong.numel():
            raise IndexError(_check.out_of_range(spec.classes, spec.ignore_index, int(wrong[0])))
    return found


def spreads(spec: Spec) -> bool:
    """Whether a is more than the true class's."""
    return not spec.indices or spec.label_smoothing > 0


def row_shape(logits: Tensor) -> tuple[int, ...]:
    """Return the logits' shape without the classes."""
    return (logits.shape[0], *logits.shape[2:]) if logits.ndim > 1 else ()


def put(p: Tensor, label: Tensor, value: Tensor) -> None:
    """Write a number a row at the true class, where the slice has it."""
    index = label.clamp(min=0)
    p.scatter_(1, index, torch.where(label >= 0, value, p.gather(1, index)))


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return (m, s) or, where a is more than the true class's, (m, s, its sum, <a, z - m>) of each row of the slice.

    The true class is left out of s and a. m is finite where all logits are -inf: there s is 0.
    """
    z, t, _ = arranged(logits.detach(), target, None)
    off = spec.label_smoothing / spec.classes
    out = z.new_zeros((4 if spreads(spec) else 2, z.shape[0], *z.shape[2:]), dtype=spec.acc)
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
                out[3][part] = product(a, shifted).masked_fill_(shifted == 0, 0).sum(1)  # also for infinite weights
            p = shifted.exp_()
            if spec.indices:
                put(p, t[part].unsqueeze(1), p.new_zeros(()))
            out[0][part], out[1][part] = m.squeeze(1), p.sum(1)
    return out.view(len(out), -1) if out.numel() else out.new_empty(len(out), 0)


def spread(z: Tensor, w: Tensor | None, off: float) -> Tensor:
    """Return w * e / C, of the shape of `z`."""
    return (z.new_full((), off) if w is None else off * w).expand_as(z)


def terms(parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return what is summed over ranks, from the slice's statistics and the m of all slices.

    s, sum of a and <a, z - m> by that m; of class indices z - m and, with weights, w of the true class, 0 where another
    rank holds it.
    """
    local_m, s, *rest = parts
    delta = local_m - m
    found = [s * delta.exp()]
    if rest:
        total, dot = rest
        found += [total, dot + torch.where((total == 0) | (delta == 0), 0, total * delta)]
    if spec.indices:
        found += true_terms(logits.detach(), target, weight, m, spec)
    return torch.stack(found)


def true_terms(logits: Tensor, label: Tensor, weight: Tensor | None, m: Tensor, spec: Spec) -> list[Tensor]:
    """Return z - m and, with weights, w of each row's true class; 0 where another rank holds it."""
    dim = min(logits.ndim - 1, 1)
    if not logits.shape[dim]:
        return [torch.zeros_like(m)] * (1 if weight is None else 2)
    index = label.clamp(min=0)
    z = logits.gather(dim, index.unsqueeze(dim)).flatten().to(spec.acc)
    found = [z - m] if weight is None else [z - m, weight.to(spec.acc)[index.flatten()]]
    return [torch.where(label.flatten() >= 0, term, 0) for term in found]


def close(
    sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `gradient` needs, from the sums over ranks."""
    s, *rest = sums
    total, dot = (rest.pop(0), rest.pop(0)) if spreads(spec) else (torch.zeros_like(s), torch.zeros_like(s))
    if spec.indices:
        z_true = rest.pop(0)
        w_true = rest.pop(0) if rest else torch.ones_like(s)
        log_s, total, loss, w_true = close_rows(s, total, dot, z_true, w_true, target.flatten(), spec)
    else:
        log_s, w_true = s.log(), torch.ones_like(s)
        loss = total * log_s - dot
    stats = torch.stack([m, log_s] if spec.indices and weight is None else [m, log_s, total], -1)
    if spec.reduction == "none":
        return loss.to(spec.dtype).view(row_shape(logits)), [stats]
    whole = loss.sum(dtype=torch.float64)
    if spec.reduction == "sum":
        return whole.to(spec.dtype), [stats]
    denominator = w_true.sum(dtype=torch.float64)
    denominator = denominator.masked_fill(denominator == 0, torch.nan)
    return (whole / denominator).to(spec.dtype), [stats, denominator.to(spec.acc).view(1)]


def close_rows(
    s: Tensor, total: Tensor, dot: Tensor, z_true: Tensor, w_true: Tensor, label: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the true class to the others: log s, A, loss and share of a mean's denominator of each row.

    Ignored rows have no loss, rows without a true class the loss NaN.
    """
    e_true = z_true.exp()
    log_s = torch.where(e_true == 1, s.log1p(), (s + e_true).log())
    a_true = (1 - spec.label_smoothing) * w_true
    ignored, unknown = label == IGNORED, label == UNKNOWN
    # a_true * log_s and a_true * z_true apart would be inf - inf where the weight is infinite
    loss = total * log_s - dot + torch.where(a_true == 0, 0, a_true * (log_s - z_true))
    loss = loss.masked_fill_(unknown, torch.nan).masked_fill_(ignored, 0)
    total = (total + a_true).masked_fill_(unknown, torch.nan).masked_fill_(ignored, 0)
    return log_s, total, loss, w_true.masked_fill(ignored | unknown, 0)


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
    log_p_true = log_p.gather(1, index)
    true = g * (A * log_p_true.expm1() + rest)
    if total is not None and off:  # another class's infinite weight makes A infinite, and A * (p - 1) + A - a NaN
        true = torch.where(total.isinf(), g * (total * log_p_true.exp() - a_true), true)
    log_p.exp_().mul_(A * g)
    if off:
        log_p.sub_(g * off if w is None else g * off * w)
    put(log_p, label, true)
    ignored = label == IGNORED
    if not ignored.is_cpu or bool(ignored.any()):
        log_p.masked_fill_(ignored, 0)
