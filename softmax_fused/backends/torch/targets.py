"""What the loss and its gradient need of a target, chunk by chunk: class indices, and class probabilities.

a = w * ((1 - e) t + keep * e / C),  A = sum(a),  gradient = g * (A * p - a)

`at` are the slices of a chunk of (N, C, d1..dk), where C may be 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors as _check

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused.functional.autograd import Spec


def class_indices(target: Tensor, classes: int, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Return class indices that can be gathered and, where rows are ignored, the mask of those that are not.

    Raises:
        IndexError: For a CPU tensor, if an index that is not ignored lies outside [0, C).
    """
    label, keep = target.long(), None
    if not label.is_cpu:
        keep = label != spec.ignore_index
        return label.masked_fill(~keep, 0), keep
    low, high = (int(bound) for bound in label.aminmax())
    if low <= spec.ignore_index <= high:  # else no row is ignored: one pass over the labels
        keep = label != spec.ignore_index
        label = label.masked_fill(~keep, 0)
        low, high = (int(bound) for bound in label.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(_check.out_of_range(classes, spec.ignore_index, low if low < 0 else high))
    return label, keep


def probability_share(t: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    """Return a for class probabilities."""
    a = t.to(spec.acc)
    if spec.label_smoothing:
        a = a * (1 - spec.label_smoothing) + spec.label_smoothing / (spec.classes or t.shape[1])
    return a if w is None else a * w


def product(a: Tensor, log_p: Tensor) -> Tensor:
    """Return a * log p with 0 * (-inf) = 0; where log p is NaN, so is the result."""
    return (a * log_p).masked_fill_((a == 0) & (log_p == -torch.inf), 0)


def without(p: Tensor, label: Tensor) -> Tensor:
    """Return the sums of p without the class `label` of each row, which is lost."""
    return p.scatter_(1, label, p.new_zeros(()).expand_as(label)).sum(1, keepdim=True)


class Indices:
    """a of class indices: everything a row needs of it is a number or two."""

    def __init__(self, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
        label, self.keep = class_indices(target, z.shape[1], spec)
        self.label = label.unsqueeze(1)
        self.w, self.classes, self.smoothing = w, z.shape[1], spec.label_smoothing
        self.off = self.smoothing / self.classes
        self.rows = z.new_ones((), dtype=spec.acc).expand(label.shape)
        if w is not None:
            self.true = w.flatten()[self.label]
            self.total = self.true
            if self.smoothing:  # else an infinite weight would meet 0, and be NaN in rows of other classes too
                self.total = self.true * (1 - self.smoothing) + self.off * w.sum()

    def live(self, rows: Tensor) -> Tensor:
        """Return a number a row, (N, d1..dk), with 0 for ignored rows."""
        return rows if self.keep is None else rows.masked_fill(~self.keep, 0)

    def denominator(self) -> Tensor:
        """Return what a mean divides by."""
        if self.w is None and self.keep is None:
            return self.rows.new_tensor(self.rows.numel())
        return self.live(self.rows if self.w is None else self.true.squeeze(1)).sum()

    def loss(self, log_p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return -<a, log p> of a chunk."""
        true = log_p.gather(1, self.label[at])
        if self.w is not None:
            true = product(self.true[at], true)
        if not self.smoothing:
            return -true
        spread = log_p if self.w is None else product(self.w.expand_as(log_p), log_p)
        return -self.off * spread.sum(1, keepdim=True) - (0 if self.smoothing == 1 else (1 - self.smoothing) * true)

    def true_gradient(self, others: Tensor, scale: Tensor, g: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return the true class's gradient from the others' probability, with `scale` = g * A.

        It is g * (A - a - A * others), in which no digit cancels where the row is confident.
        """
        grad = others * -scale
        if self.w is None and not self.smoothing:
            return grad  # A and a are 1
        share = 1 - self.smoothing + self.off
        a: Tensor | float = share if self.w is None else self.true[at] * share
        grad.add_(((1 if self.w is None else self.total[at]) - a) * g)
        if self.w is None or not self.smoothing:
            return grad
        # Where another class's infinite weight makes A infinite, that is inf - inf, but g * (A * p - a) is infinite.
        return torch.where(scale.isinf(), (1 - others) * scale - a * g, grad)

    def gradient(self, p: Tensor, g: Tensor, at: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with the gradient of a chunk from its softmax; `p` is written over."""
        label = self.label[at]
        scale = g if self.w is None else self.total[at] * g
        true = self.true_gradient(self.others(p, label), scale, g, at)
        result = out if out.dtype == p.dtype else p
        torch.mul(p, scale, out=result)
        if self.smoothing:
            result.sub_(self.off * g if self.w is None else self.off * g * self.w)
        result.scatter_(1, label, true)
        if self.keep is not None:  # g is 0 there, and so is the rest
            bad = true.isnan() & ~self.keep.unsqueeze(1)[at]
            if not bad.is_cpu or bool(bad.any()):
                result.masked_fill_(bad, 0)
        if result is p:
            out.copy_(p)

    def others(self, p: Tensor, label: Tensor) -> Tensor:
        """Return the sum of all p but the true class's; what `p` holds of that one may be lost.

        1 - p is exact up to p = 1/2 and needs no pass over the chunk; beyond, it cancels, and the others are summed. A
        sum everywhere would be three times as far off as torch where classes are few.
        """
        true = p.gather(1, label)
        confident = true > 0.5
        if p.is_cpu:
            rows = confident.flatten().nonzero().squeeze(1)
            if not len(rows):
                return 1 - true
            if p.ndim == 2 and 4 * len(rows) < len(p):
                return (1 - true).index_copy_(0, rows, without(p[rows], label[rows]))
        return torch.where(confident, without(p, label), 1 - true)


class Probabilities:
    """a of class probabilities."""

    def __init__(self, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
        self.t, self.w, self.spec = target, w, spec
        self.rows = z.new_full((), z.numel() // z.shape[1], dtype=spec.acc)

    def live(self, rows: Tensor) -> Tensor:
        """Return a number a row as it is: none is ignored."""
        return rows

    def denominator(self) -> Tensor:
        """Return what a mean divides by."""
        return self.rows

    def share(self, at: tuple[slice, ...]) -> Tensor:
        """Return a of a chunk."""
        return probability_share(self.t[at], self.w, self.spec)

    def loss(self, log_p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return -<a, log p> of a chunk."""
        return -product(self.share(at), log_p).sum(1, keepdim=True)

    def gradient(self, p: Tensor, g: Tensor, at: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with the gradient of a chunk from its softmax; `p` is written over."""
        a = self.share(at)
        out.copy_(p.mul_(a.sum(1, keepdim=True)).sub_(a).mul_(g))
