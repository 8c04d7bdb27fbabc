"""The kinds of target: what each is to callers and kernels, and its arithmetic in torch operations.

a = w * ((1 - e) t + valid * e / C),  A = sum(a),  gradient = g * (A * p - a)

`at` are the slices of a chunk of (N, C, d1..dk), where C may be 1. "Smoothed target" is a without what belongs to a
row's label, and is all of it where there are no labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors
from softmax_fused._spec import FLOATS, Spec, TargetKind, class_dim, row_shape
from softmax_fused.backends.torch.chunks import sum_classes

if TYPE_CHECKING:
    from torch import Tensor


class Target(TargetKind):
    """The target of a batch (N, C, d1..dk)."""

    valid: Tensor | None
    """Which rows are not ignored, (N, d1..dk); None where all are valid."""

    def __init__(self, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
        raise NotImplementedError

    @staticmethod
    def supports(input: Tensor, target: Tensor, ignore_index: int) -> bool:
        """Whether the fused path covers such a tensor for logits `input`; True only for what torch accepts too."""
        raise NotImplementedError

    @staticmethod
    def rows_used(target: Tensor, ignore_index: int) -> Tensor | None:  # noqa: ARG004 - a default
        """Return which rows are not ignored; None where no row can be."""
        return None

    @staticmethod
    def smoothed_target(t: Tensor, z: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
        """Return the smoothed target of a chunk z of a slice of the classes, of its shape."""
        raise NotImplementedError

    @staticmethod
    def mean_over(
        target: Tensor, weight: Tensor | None, ignore_index: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return what a mean over rows of `shape` divides by, and whether there is a row."""
        raise NotImplementedError

    def zero_ignored(self, rows: Tensor) -> Tensor:
        """Return a number a row, (N, d1..dk), with 0 for ignored rows."""
        return rows if self.valid is None else rows.masked_fill(~self.valid, 0)

    def denominator(self) -> Tensor:
        """Return what a mean divides by."""
        raise NotImplementedError

    def loss(self, log_p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return -<a, log p> of a chunk."""
        raise NotImplementedError

    def at_label(self, values: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return a chunk's values of the labels."""
        raise NotImplementedError

    def log_prob(self, log_p_label: Tensor, p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return log p of the labels of a chunk, exact where p is near 1; `p` is written over."""
        raise NotImplementedError

    def rank(self, y: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return how many of a chunk's logits y are larger than the label's."""
        raise NotImplementedError

    def gradient(self, p: Tensor, g: Tensor, at: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with the gradient of a chunk from its softmax; `p` is written over."""
        raise NotImplementedError

    def weighted(self, p: Tensor) -> Tensor:
        """Return all of a, of the shape of the whole batch's softmax, in operations that autograd follows."""
        raise NotImplementedError


def class_indices(target: Tensor, classes: int, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Return class indices that can be gathered and, where rows are ignored, the mask of those that are not.

    Raises:
        IndexError: For a CPU tensor, if an index that is not ignored lies outside [0, C).
    """
    label, valid = target.long(), None
    if not label.is_cpu:
        valid = label != spec.ignore_index
        return label.masked_fill(~valid, 0), valid
    low, high = (int(bound) for bound in label.aminmax())
    if low <= spec.ignore_index <= high:  # else no row is ignored: one pass over the labels
        valid = label != spec.ignore_index
        label = label.masked_fill(~valid, 0)
        low, high = (int(bound) for bound in label.aminmax())
    if low < 0 or high >= classes:
        raise _errors.out_of_range(classes, spec.ignore_index, low if low < 0 else high)
    return label, valid


def product(a: Tensor, log_p: Tensor) -> Tensor:
    """Return a * log p with 0 * (-inf) = 0; where log p is NaN, so is the result."""
    return (a * log_p).masked_fill_((a == 0) & (log_p == -torch.inf), 0)


def sum_excluding(p: Tensor, label: Tensor, spec: Spec) -> Tensor:
    """Return the sums of p without the class `label` of each row; what `p` holds of that class is lost."""
    return sum_classes(p.scatter_(1, label, p.new_zeros(()).expand_as(label)), spec)


class ClassIndices(Target):
    """A class a row: everything a row needs of a is a number or two."""

    reader, slice_reader = "indices", "slice indices"
    has_labels, dense, unit_sum, weighted_mean = True, False, True, True

    def __init__(self, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
        label, self.valid = class_indices(target, z.shape[1], spec)
        self.label = label.unsqueeze(1)
        self.w, self.smoothing, self.spec = w, spec.label_smoothing, spec
        self.confidence = 1 - self.smoothing
        self.smoothing_per_class = self.smoothing / z.shape[1]
        self.ones = z.new_ones((), dtype=spec.acc).expand(label.shape)
        if w is not None:
            self.label_weight = w.flatten()[self.label]
            self.target_sum = self.label_weight
            if self.smoothing:  # else an infinite weight would meet 0, and be NaN in rows of other classes too
                self.target_sum = self.label_weight * self.confidence + self.smoothing_per_class * w.sum()

    @staticmethod
    def supports(input: Tensor, target: Tensor, ignore_index: int) -> bool:
        """Whether they are integers of a type that torch takes, one a row."""
        right_type = target.dtype is torch.int64 or (target.dtype is torch.uint8 and input.ndim <= 2)
        rows = row_shape(input.shape)
        return right_type and target.shape == rows and -(2**63) <= ignore_index < 2**63

    @staticmethod
    def rows_used(target: Tensor, ignore_index: int) -> Tensor:
        """Return which class indices are not the ignored one."""
        return target.long() != ignore_index  # in uint8, 156 and -100 are equal

    @staticmethod
    def smoothed_target(t: Tensor, z: Tensor, w: Tensor | None, spec: Spec) -> Tensor:  # noqa: ARG004
        """Return w * e / C."""
        smoothing_per_class = spec.label_smoothing / spec.classes
        return (z.new_full((), smoothing_per_class) if w is None else smoothing_per_class * w).expand_as(z)

    @staticmethod
    def mean_over(
        target: Tensor, weight: Tensor | None, ignore_index: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the number of rows that are not ignored, or the weights of their classes."""
        del shape
        valid = ClassIndices.rows_used(target, ignore_index)
        if weight is None:
            return valid.sum().to(dtype), valid.any()
        label = target.long().clamp(0, len(weight) - 1)  # others are ignored, or have made their losses NaN
        return weight.to(dtype)[label].masked_fill(~valid, 0).sum(), valid.any()

    def denominator(self) -> Tensor:
        """Return what a mean divides by."""
        if self.w is None and self.valid is None:
            return self.ones.new_tensor(self.ones.numel())
        return self.zero_ignored(self.ones if self.w is None else self.label_weight.squeeze(1)).sum()

    def loss(self, log_p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return -<a, log p> of a chunk."""
        log_p_label = self.at_label(log_p, at)
        if self.w is not None:
            log_p_label = product(self.label_weight[at], log_p_label)
        if not self.smoothing:
            return -log_p_label
        all_classes = log_p if self.w is None else product(self.w.expand_as(log_p), log_p)
        of_label = 0 if self.smoothing == 1 else self.confidence * log_p_label
        return -self.smoothing_per_class * sum_classes(all_classes, self.spec) - of_label

    def at_label(self, values: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return a chunk's values of the labels."""
        return values.gather(1, self.label[at])

    def log_prob(self, log_p_label: Tensor, p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return log p of the labels of a chunk, exact where p is near 1; `p` is written over."""
        complement = self.complement(p, self.label[at])
        return torch.where(complement < 0.5, torch.log1p(-complement), log_p_label)

    def rank(self, y: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return how many of a chunk's logits y are larger than the label's; NaN is larger than any number.

        Counted in float32, as far as it is exact: on a CPU that takes half the time of integers.
        """
        others = y <= self.at_label(y, at)
        counts = torch.float32 if y.shape[1] < 2**24 else torch.float64
        return y.shape[1] - others.sum(1, keepdim=True, dtype=counts).long()

    def label_gradient(self, complement: Tensor, scale: Tensor, g: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return the gradient at the label from the other classes' probability, with `scale` = g * A.

        It is g * (A - a - A * complement), in which no digit cancels where the row is confident.
        """
        grad = complement * -scale
        if self.w is None and not self.smoothing:
            return grad  # A and a are 1
        unweighted = self.confidence + self.smoothing_per_class
        a: Tensor | float = unweighted if self.w is None else self.label_weight[at] * unweighted
        grad.add_(((1 if self.w is None else self.target_sum[at]) - a) * g)
        if self.w is None or not self.smoothing:
            return grad
        # Where another class's infinite weight makes A infinite, that is inf - inf, but g * (A * p - a) is infinite.
        return torch.where(scale.isinf(), (1 - complement) * scale - a * g, grad)

    def gradient(self, p: Tensor, g: Tensor, at: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with the gradient of a chunk from its softmax; `p` is written over."""
        label = self.label[at]
        scale = g if self.w is None else self.target_sum[at] * g
        label_gradient = self.label_gradient(self.complement(p, label), scale, g, at)
        result = out if out.dtype == p.dtype else p
        torch.mul(p, scale, out=result)
        if self.smoothing:
            g_per_class = self.smoothing_per_class * g
            result.sub_(g_per_class if self.w is None else g_per_class * self.w)
        result.scatter_(1, label, label_gradient)
        if self.valid is not None:  # g is 0 in ignored rows, and so is the gradient, unless 0 met a NaN
            bad = label_gradient.isnan() & ~self.valid.unsqueeze(1)[at]
            if not bad.is_cpu or bool(bad.any()):
                result.masked_fill_(bad, 0)
        if result is p:
            out.copy_(p)

    def complement(self, p: Tensor, label: Tensor) -> Tensor:
        """Return the sum of all p but the label's; what `p` holds of that one may be lost.

        1 - p is exact up to p = 1/2 and needs no pass over the chunk; beyond, it cancels, and the others are summed. A
        sum everywhere would be three times as far off as torch where classes are few.
        """
        p_label = p.gather(1, label)
        confident = p_label > 0.5
        if p.is_cpu:
            rows = confident.flatten().nonzero().squeeze(1)
            if not len(rows):
                return 1 - p_label
            if p.ndim == 2 and 4 * len(rows) < len(p):
                return (1 - p_label).index_copy_(0, rows, sum_excluding(p[rows], label[rows], self.spec))
        return torch.where(confident, sum_excluding(p, label, self.spec), 1 - p_label)

    def weighted(self, p: Tensor) -> Tensor:
        """Return all of a; an infinite weight counts in rows of its own class alone."""
        label_weight = self.ones.unsqueeze(1) if self.w is None else self.label_weight
        a = torch.zeros_like(p).scatter_(1, self.label, label_weight * self.confidence)
        if not self.smoothing:
            return a
        return a + (self.smoothing_per_class if self.w is None else self.smoothing_per_class * self.w)


class ClassProbabilities(Target):
    """A probability of each class a row."""

    reader = slice_reader = "probabilities"
    has_labels, dense, unit_sum, weighted_mean = False, True, False, False
    valid = None

    def __init__(self, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
        self.t, self.w, self.spec = target, w, spec
        self.rows = z.new_full((), z.numel() // z.shape[1], dtype=spec.acc)

    @staticmethod
    def supports(input: Tensor, target: Tensor, ignore_index: int) -> bool:
        """Whether they have the logits' shape, need no gradient, and no class is to be ignored."""
        right_type = target.dtype in FLOATS and target.shape == input.shape
        return right_type and ignore_index < 0 and not target.requires_grad

    @staticmethod
    def smoothed_target(t: Tensor, z: Tensor, w: Tensor | None, spec: Spec) -> Tensor:  # noqa: ARG004
        """Return w * ((1 - e) t + e / C)."""
        a = t.to(spec.acc)
        if spec.label_smoothing:
            a = a * (1 - spec.label_smoothing) + spec.label_smoothing / (spec.classes or t.shape[1])
        return a if w is None else a * w

    @staticmethod
    def mean_over(
        target: Tensor, weight: Tensor | None, ignore_index: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the number of rows."""
        del weight, ignore_index
        rows = target.new_ones(shape, dtype=torch.bool)
        return rows.sum().to(dtype), rows.any()

    def denominator(self) -> Tensor:
        """Return what a mean divides by."""
        return self.rows

    def loss(self, log_p: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return -<a, log p> of a chunk."""
        return -sum_classes(product(self.smoothed_target(self.t[at], log_p, self.w, self.spec), log_p), self.spec)

    def gradient(self, p: Tensor, g: Tensor, at: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with the gradient of a chunk from its softmax; `p` is written over."""
        a = self.smoothed_target(self.t[at], p, self.w, self.spec)
        out.copy_(p.mul_(sum_classes(a, self.spec)).sub_(a).mul_(g))

    def weighted(self, p: Tensor) -> Tensor:
        """Return all of a."""
        return self.smoothed_target(self.t, p, self.w, self.spec)


def named_classes(classes: Tensor, count: int, ignore_index: int, readable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return class indices that can be gathered, which of them are not ignored, and which of those do not exist.

    Raises:
        IndexError: If there are some that do not exist, and the values are `readable`.
    """
    valid = classes != ignore_index
    wrong = valid & ((classes < 0) | (classes >= count))
    if readable and bool(wrong.any()):
        raise _errors.out_of_range(count, ignore_index, int(classes[wrong][0]))
    return classes.masked_fill(wrong | ~valid, 0), valid, wrong


def shares(t: Tensor, label: Tensor, valid: Tensor, wrong: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return (1 - e) w t of named classes, 0 for ignored ones and NaN for those that do not exist."""
    share = t.to(spec.acc)
    if spec.label_smoothing:
        share = share * (1 - spec.label_smoothing)
    if weight is not None:
        share = share * weight.to(spec.acc)[label]
    return share.masked_fill(~valid, 0).masked_fill(wrong, torch.nan)


class SparseProbabilities(Target):
    """Probabilities of K classes a row, packed as (N, 2, K, d1..dk) in float64: the classes, then the probabilities.

    In float64 the indices are exact, and one tensor goes wherever another kind of target does. `backends.sparse` has
    the loss and its gradient.
    """

    has_labels, dense, unit_sum, weighted_mean, sparse = False, True, False, False, True

    def __init__(self, z: Tensor, target: Tensor, w: Tensor | None, spec: Spec) -> None:
        self.label, self.share, valid = self.entries(target, z.shape[1], None if w is None else w.flatten(), spec, 1)
        self.valid: Tensor = valid.any(1)
        self.w, self.spec = w, spec

    @staticmethod
    def supports(input: Tensor, target: Tensor, ignore_index: int) -> bool:  # noqa: ARG004
        """Return False: what callers pass is no tensor, and is checked where it is packed."""
        return False

    @staticmethod
    def entries(
        target: Tensor, classes: int, weight: Tensor | None, spec: Spec, dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return, (N, K, d1..dk), class indices that can be gathered, (1 - e) w t, and which are not ignored.

        `dim` is that of the classes. On a GPU a class that does not exist has NaN.

        Raises:
            IndexError: For a CPU tensor, if a class that is not ignored does not exist.
        """
        found, t = target.unbind(dim)
        label, valid, wrong = named_classes(found.long(), classes, spec.ignore_index, found.is_cpu)
        return label, shares(t, label, valid, wrong, weight, spec), valid

    @staticmethod
    def rows_used(target: Tensor, ignore_index: int) -> Tensor:
        """Return which rows (N, d1..dk) name a class that is not the ignored one."""
        return (target.select(1, 0) != ignore_index).any(1)

    @staticmethod
    def mean_over(
        target: Tensor, weight: Tensor | None, ignore_index: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the number of rows that are not ignored."""
        del weight, shape
        valid = SparseProbabilities.rows_used(target, ignore_index)
        return valid.sum().to(dtype), valid.any()

    def denominator(self) -> Tensor:
        """Return what a mean divides by."""
        return self.valid.sum().to(self.spec.acc)

    def weighted(self, p: Tensor) -> Tensor:
        """Return all of a."""
        a = torch.zeros_like(p).scatter_add_(1, self.label, self.share)
        if not self.spec.label_smoothing:
            return a
        smoothing_per_class = self.spec.label_smoothing / p.shape[1]
        return a + (smoothing_per_class if self.w is None else smoothing_per_class * self.w)


def kind_of(input: Tensor, target: Tensor) -> type[Target]:
    """Tell the kinds by the number of dimensions: class indices, class probabilities, packed sparse ones."""
    if target.ndim < input.ndim:
        return ClassIndices
    return ClassProbabilities if target.ndim == input.ndim else SparseProbabilities


def make_spec(
    input: Tensor,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Spec:
    """Put together what a call asks for; a negative or NaN smoothing is none, as in torch."""
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    kind, smoothing = kind_of(input, target), max(0.0, label_smoothing)
    return Spec(kind, reduction, ignore_index, smoothing, dtype, acc, batch_invariant=batch_invariant)


def accumulated(weight: Tensor | None, ndim: int, spec: Spec) -> Tensor | None:
    """Return the weights in the accumulation type, shaped to broadcast against (N, C, d1..dk)."""
    return None if weight is None else weight.to(spec.acc).view(-1, *[1] * (ndim - 2))


def make_target(z: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Target:
    """Return the target of a batch (N, C, d1..dk), of the kind that the spec names."""
    return kind(spec)(z, target, accumulated(weight, z.ndim, spec), spec)


def kind(spec: Spec) -> type[Target]:
    """Return the kind of target with its arithmetic."""
    return spec.target  # type: ignore[return-value]  # every kind is a Target


def denominator(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what a mean of the losses of logits (C,) or (N, C, d1..dk) divides by, and whether there is a row."""
    shape = [size for dim, size in enumerate(logits.shape) if dim != class_dim(logits.ndim)]
    return kind_of(logits, target).mean_over(target, weight, ignore_index, tuple(shape), dtype)
