"""Statistics, loss and gradient of a slice of the classes in pure torch, what is as large as the logits by chunks.

a = w * ((1 - e) t + valid * e / C),  gradient = g * (A * exp(z - m - log s) - a), with C of all slices together
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors
from softmax_fused._spec import class_dim, row_shape
from softmax_fused.backends.torch.chunks import Workspace, with_classes
from softmax_fused.backends.torch.cross_entropy import canonicalize
from softmax_fused.backends.torch.targets import accumulated, kind, product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Spec

ELSEWHERE, IGNORED, UNKNOWN = -1, -2, -3
"""Labels of rows whose class is not in the slice: another slice has it, it is ignored, or there is no such class."""


def prepare(logits: Tensor, target: Tensor, spec: Spec) -> Tensor:
    """Return class probabilities as they are, class indices relative to the slice or one of the three names above.

    Raises:
        IndexError: For a CPU tensor, if there is no such class.
    """
    if not spec.target.has_labels:
        return target
    label = target.long()
    local = label - spec.first
    known = (label >= 0) & (label < spec.classes)
    in_slice = known & (local >= 0) & (local < logits.shape[class_dim(logits.ndim)])
    found = torch.where(in_slice, local, torch.where(known, ELSEWHERE, UNKNOWN))
    found.masked_fill_(label == spec.ignore_index, IGNORED)
    if label.is_cpu:
        wrong = label[found == UNKNOWN]
        if wrong.numel():
            raise _errors.out_of_range(spec.classes, spec.ignore_index, int(wrong[0]))
    return found


def put(p: Tensor, label: Tensor, value: Tensor) -> None:
    """Write a number a row at its label, where the slice has it."""
    index = label.clamp(min=0)
    p.scatter_(1, index, torch.where(label >= 0, value, p.gather(1, index)))


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return (m, s) or, with a dense target, (m, s, its sum, <a, z - m>) of each row of the slice.

    The labels' classes are left out of s and a. m is finite where all logits are -inf: there s is 0.
    """
    z, t, _ = canonicalize(logits.detach(), target, None)
    out = z.new_zeros((4 if spec.has_dense_target else 2, *row_shape(z.shape)), dtype=spec.acc)
    out[0].fill_(torch.finfo(spec.acc).min)
    if z.numel():
        w = accumulated(weight, z.ndim, spec)
        workspace = Workspace(z, None, spec.acc)
        for part in workspace.parts:
            at = with_classes(part)
            m = z[at].amax(1, keepdim=True).to(spec.acc).clamp_(min=torch.finfo(spec.acc).min)
            shifted = torch.sub(z[at], m, out=workspace.chunk(z[at], at))
            if spec.has_dense_target:
                a = kind(spec).smoothed_target(t[part if spec.target.has_labels else at], shifted, w, spec)
                out[2][part] = a.sum(1)
                out[3][part] = product(a, shifted).masked_fill_(shifted == 0, 0).sum(1)  # also for infinite weights
            p = shifted.exp_()
            if spec.target.has_labels:
                put(p, t[part].unsqueeze(1), p.new_zeros(()))
            out[0][part], out[1][part] = m.squeeze(1), p.sum(1)
    return out.view(len(out), -1) if out.numel() else out.new_empty(len(out), 0)


def terms(parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return what is summed over ranks, from the slice's statistics and the m of all slices.

    s and, with a dense target, its sum and <a, z - m>, by that m; with labels z - m and, with weights, w of the label's
    class, 0 where another rank holds it.
    """
    local_m, s, *dense = parts
    delta = local_m - m
    found = [s * delta.exp()]
    if dense:
        target_sum, dot = dense
        found += [target_sum, dot + torch.where((target_sum == 0) | (delta == 0), 0, target_sum * delta)]
    if spec.target.has_labels:
        found += label_terms(logits.detach(), target, weight, m, spec)
    return torch.stack(found)


def label_terms(logits: Tensor, label: Tensor, weight: Tensor | None, m: Tensor, spec: Spec) -> list[Tensor]:
    """Return z - m and, with weights, w of each row's label; 0 where another rank holds it."""
    dim = class_dim(logits.ndim)
    if not logits.shape[dim]:
        return [torch.zeros_like(m)] * (1 if weight is None else 2)
    index = label.clamp(min=0)
    z = logits.gather(dim, index.unsqueeze(dim)).flatten().to(spec.acc)
    found = [z - m] if weight is None else [z - m, weight.to(spec.acc)[index.flatten()]]
    return [torch.where(label.flatten() >= 0, term, 0) for term in found]


def finalize(
    sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `gradient` needs, from the sums over ranks."""
    s, *rest = sums
    target_sum, dot = (
        (rest.pop(0), rest.pop(0)) if spec.has_dense_target else (torch.zeros_like(s), torch.zeros_like(s))
    )
    if spec.target.has_labels:
        target_logit = rest.pop(0)
        label_weight = rest.pop(0) if rest else torch.ones_like(s)
        log_s, target_sum, loss, mean_weight = finalize_rows(
            s, target_sum, dot, target_logit, label_weight, target.flatten(), spec
        )
    else:
        log_s, mean_weight = s.log(), torch.ones_like(s)
        loss = target_sum * log_s - dot
    stats = torch.stack([m, log_s, target_sum] if spec.saves_target_sum(weight) else [m, log_s], -1)
    if spec.reduction == "none":
        return loss.to(spec.dtype).view(row_shape(logits.shape)), [stats]
    total = loss.sum(dtype=torch.float64)
    if spec.reduction == "sum":
        return total.to(spec.dtype), [stats]
    denominator = mean_weight.sum(dtype=torch.float64)
    denominator = denominator.masked_fill(denominator == 0, torch.nan)
    return (total / denominator).to(spec.dtype), [stats, denominator.to(spec.acc).view(1)]


def finalize_rows(
    s: Tensor, target_sum: Tensor, dot: Tensor, target_logit: Tensor, label_weight: Tensor, label: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the label's class to the others: log s, A, loss and part of a mean's denominator of each row.

    Ignored rows have no loss, rows without a class the loss NaN.
    """
    e_label = target_logit.exp()
    log_s = torch.where(e_label == 1, s.log1p(), (s + e_label).log())
    a_label = (1 - spec.label_smoothing) * label_weight
    ignored, unknown = label == IGNORED, label == UNKNOWN
    # a_label * log_s and a_label * target_logit apart would be inf - inf where the weight is infinite
    loss = target_sum * log_s - dot + torch.where(a_label == 0, 0, a_label * (log_s - target_logit))
    loss = loss.masked_fill_(unknown, torch.nan).masked_fill_(ignored, 0)
    target_sum = (target_sum + a_label).masked_fill_(unknown, torch.nan).masked_fill_(ignored, 0)
    return log_s, target_sum, loss, label_weight.masked_fill(ignored | unknown, 0)


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
    z, t, out = canonicalize(logits, target, grad)
    assert out is not None
    shape = row_shape(z.shape)
    m, log_s, *target_sum = (it.reshape(shape).unsqueeze(1) for it in saved[0].unbind(-1))
    g = upstream.to(spec.acc)
    g = g / saved[1] if spec.reduction == "mean" else g
    g = g.reshape(shape).unsqueeze(1) if spec.reduction == "none" else g.expand(shape).unsqueeze(1)
    w = accumulated(weight, z.ndim, spec)
    workspace = Workspace(z, out, spec.acc)
    for part in workspace.parts:
        at = with_classes(part)
        log_p = torch.sub(z[at], m[at], out=workspace.chunk(z[at], at)).sub_(log_s[at])
        if spec.target.has_labels:
            label = t[part].unsqueeze(1)
            by_label(log_p, g[at], label, w, target_sum[0][at] if target_sum else None, spec)
        else:
            a = kind(spec).smoothed_target(t[at], log_p, w, spec)
            log_p.exp_().mul_(target_sum[0][at]).sub_(a).mul_(g[at])
        if log_p.data_ptr() != out[at].data_ptr():
            out[at] = log_p


def by_label(log_p: Tensor, g: Tensor, label: Tensor, w: Tensor | None, total: Tensor | None, spec: Spec) -> None:
    """Turn log p into the gradient; the label's is g * (A * (p - 1) + A - a), with p - 1 = expm1(log p)."""
    smoothing_per_class = spec.label_smoothing / spec.classes
    index = label.clamp(min=0)
    a_label: float | Tensor = 1 - spec.label_smoothing + smoothing_per_class
    if w is not None:
        a_label = a_label * w.flatten()[index]
    complement = 1 - a_label if total is None else total - a_label
    target_sum = torch.where(label == UNKNOWN, torch.nan, log_p.new_ones(())) if total is None else total
    log_p_label = log_p.gather(1, index)
    label_gradient = g * (target_sum * log_p_label.expm1() + complement)
    if total is not None and smoothing_per_class:
        # another class's infinite weight makes A infinite, and A * (p - 1) + A - a NaN
        label_gradient = torch.where(total.isinf(), g * (total * log_p_label.exp() - a_label), label_gradient)
    log_p.exp_().mul_(target_sum * g)
    if smoothing_per_class:
        log_p.sub_(g * smoothing_per_class if w is None else g * smoothing_per_class * w)
    put(log_p, label, label_gradient)
    ignored = label == IGNORED
    if not ignored.is_cpu or bool(ignored.any()):
        log_p.masked_fill_(ignored, 0)
