"""Kinds of targets, class weights and label smoothing: a = w * ((1 - e) t + valid * e / C) of a row.

KIND says what a target is, and is looked at here alone:
"indices": the class of each row. "slice indices": the same where the logits are a slice of the classes; ignore_index is
then (ignore_index, the slice's first class, the number of all classes). "probabilities": t itself.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import from_parts, rounded_product
from .rows import value_offsets


class Target(NamedTuple):
    """What the logits are compared with, as the host passes it; None where there is none."""

    ptr: Any
    strides: Any  # (outer..., inner, class); None where t lies in memory as the logits do
    weight_ptr: Any  # of the classes
    smoothing: Any  # e in two parts, and the number of all classes where the logits are a slice


@triton.jit
def read_labels(target, outer, row, row_mask, rows, ignore_index, KIND: tl.constexpr, ACC: tl.constexpr):
    """Return each row's target class (-1 where there is none) and whether it is valid: 1, 0 (ignored) or NaN.

    An index outside [0, C) that is not ignored makes a row's loss and gradient NaN; nothing is read there. Rows with
    probabilities are all valid, and have no target class.
    """
    if KIND == "probabilities":
        label = tl.full(row_mask.shape, -1, tl.int32)
        valid = tl.where(row_mask, 1.0, 0.0).to(ACC)
    else:
        offsets = value_offsets(outer, row, rows, target.strides)
        label = tl.load(target.ptr + offsets, mask=row_mask, other=-1).to(tl.int64)
        if KIND == "indices":
            known = (label >= 0) & (label < rows.classes)
            valid = tl.where(label == ignore_index, 0.0, tl.where(known, 1.0, float("nan"))).to(ACC)
            label = tl.where(valid == 1.0, label, -1).to(tl.int32)
        else:
            known = (label >= 0) & (label < ignore_index[2])
            valid = tl.where(label == ignore_index[0], 0.0, tl.where(known, 1.0, float("nan"))).to(ACC)
            label -= ignore_index[1]
            found = (valid == 1.0) & (label >= 0) & (label < rows.classes)
            label = tl.where(found, label, -1).to(tl.int32)
    return label, valid


@triton.jit
def class_weight(target, c, mask, ACC: tl.constexpr):
    """Return w at the classes c, or 1 where there are no weights."""
    w = tl.full(c.shape, 1.0, ACC)
    if target.weight_ptr is not None:
        if len(c.shape) == 3:  # loaded as a vector, as the logits are
            SIZE: tl.constexpr = c.shape[0] * c.shape[1] * c.shape[2]
            w = tl.load(target.weight_ptr + tl.reshape(c, (SIZE,)), mask=tl.reshape(mask, (SIZE,)), other=0.0)
            w = tl.reshape(w, c.shape).to(ACC)
        else:
            w = tl.load(target.weight_ptr + c, mask=mask, other=0.0).to(ACC)
    return w


@triton.jit
def smoothing_terms(target, classes, ACC: tl.constexpr):
    """Return 1 - e, a target's confidence, and e / C, what each class gets."""
    e = tl.full((), 0.0, ACC)
    if target.smoothing is not None:
        e += from_parts(target.smoothing, ACC)
        if len(target.smoothing) == 3:
            classes = target.smoothing[2]
    return 1.0 - e, e / tl.full((), classes, ACC)


@triton.jit
def smoothed_target(
    t, valid, confidence, smoothing_per_class, target, c, mask,
    SUMMED: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the block of a without the target class's share of t; 0 where mask is False.

    SUMMED: the caller adds up a row's a, which may lie across lanes.
    """
    a = rounded_product(valid, smoothing_per_class)
    if target.weight_ptr is None:
        a = tl.where(mask, a, 0.0)
    if KIND == "probabilities":
        a += confidence * t
    if target.weight_ptr is not None:
        w = class_weight(target, c, mask, ACC)  # 0 where mask is False
        a = rounded_product(a, w) if SUMMED else a * w
    return a


@triton.jit
def denominator_share(label, valid, target, ACC: tl.constexpr):
    """Return each row's share of a mean's denominator: the weight of its class, 1 or 0."""
    w = class_weight(target, label, label >= 0, ACC)
    return tl.where(label >= 0, w, tl.where(valid == 1.0, 1.0, 0.0))
