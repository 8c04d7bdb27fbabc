"""Rows whose classes are divided among ranks: what each rank gives to the sum over ranks, and the loss from that sum.

m = max over slices,  s = sum of the slices' s * exp(m_slice - m),  A and <a, z - m> likewise,  then as cross_entropy.py

A slice's own m, s, sum a and <a, z - m> come from cross_entropy_statistics or cross_entropy_long_forward. The true
class stays out of s here too, and comes as its z - m from the rank that holds it. Rows are numbered as they lie in
contiguous tensors. TARGET is slice_target; class probabilities are not looked at again.
"""

import triton
import triton.language as tl

from .cross_entropy import join_true, row_loss, store_rows
from .rows import class_weight, exponential, row_offsets, smoothing_terms


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def cross_entropy_terms(
    terms_ptr, parts_ptr, m_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, classes, rows, ignore_index,
    SPREAD: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is summed over ranks, (2 to 5, rows): s[, sum a, <a, z - m>] by the m of all[, the true class's z - m[, w]].

    Bytes: 20 to 32 a row read, 8 to 20 written.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = number < rows
    m = tl.load(m_ptr + number, mask=live, other=0.0)
    delta = tl.load(parts_ptr + number, mask=live, other=0.0) - m
    s = tl.load(parts_ptr + rows + number, mask=live, other=0.0)
    place = terms_ptr + number
    tl.store(place, s * exponential(delta), mask=live)
    if SPREAD:
        total = tl.load(parts_ptr + 2 * rows + number, mask=live, other=0.0)
        dot = tl.load(parts_ptr + 3 * rows + number, mask=live, other=0.0)
        tl.store(place + rows, total, mask=live)
        tl.store(place + 2 * rows, dot + tl.where(total == 0.0, 0.0, total * delta), mask=live)
        place += 2 * rows
    if target_ptr.dtype.element_ty.is_int():
        label = TARGET(target_ptr, number, number, live[None, :], live, classes, ignore_index, 0, ACC)[0]
        here = label >= 0
        inner = sizes[len(sizes) - 1]
        z_rows = logits_ptr + row_offsets(number // inner, number % inner, sizes, logits_strides)
        z = tl.load(z_rows + label.to(tl.int64) * logits_strides[len(sizes)], mask=here, other=0.0).to(ACC)
        tl.store(place + rows, tl.where(here, z - m, 0.0), mask=live)
        if weight_ptr is not None:
            tl.store(place + 2 * rows, class_weight(weight_ptr, label, here, ACC), mask=live)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def cross_entropy_close(
    loss_ptr, stats_ptr, sums_ptr, denominator_ptr, terms_ptr, m_ptr, target_ptr,
    classes, rows, ignore_index, smoothing,
    SPREAD: tl.constexpr, WEIGHTED: tl.constexpr, TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of each row for "none", else their sum or mean, from the sums over ranks; saves (m, log s[, A]) of each row.

    Bytes: 16 to 32 a row read, 8 or 12 written.
    """
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = number < rows
    m = tl.load(m_ptr + number, mask=live, other=0.0)
    place = terms_ptr + number
    s = tl.load(place, mask=live, other=1.0)
    total = tl.zeros((BLOCK,), ACC)
    dot = tl.zeros((BLOCK,), ACC)
    if SPREAD:
        total = tl.load(place + rows, mask=live, other=0.0)
        dot = tl.load(place + 2 * rows, mask=live, other=0.0)
        place += 2 * rows
    if dense:
        log_s = tl.log(s)
        loss = row_loss(log_s, total, dot, WEIGHTED)
        weight = tl.full((BLOCK,), 1.0, ACC)
    else:
        keep = TARGET(target_ptr, number, number, live[None, :], live, classes, ignore_index, 0, ACC)[1]
        z_true = tl.load(place + rows, mask=live, other=0.0)
        w_true = tl.full((BLOCK,), 1.0, ACC)
        if WEIGHTED:
            w_true = tl.load(place + 2 * rows, mask=live, other=0.0)
        a_true = smoothing_terms(smoothing, classes, ACC)[0] * w_true
        log_s, total, loss = join_true(s, total, dot, z_true, a_true, keep, WEIGHTED)
        weight = tl.where(keep == 1.0, w_true, 0.0)
    store_rows(
        loss_ptr, stats_ptr, sums_ptr, None, denominator_ptr, number, live, m, log_s, total, loss, weight,
        3 if dense or WEIGHTED else 2, REDUCTION,
    )  # fmt: skip
