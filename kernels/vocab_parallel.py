"""Rows whose classes are divided among ranks: what each rank gives to the sum over ranks, and the loss from that sum.

m = max over slices,  s = sum of the slices' s * exp(m_slice - m),  A and <a, z - m> likewise,  then as cross_entropy.py

A slice's own m, s, target class's logit, sum a and <a, z - m> come from cross_entropy_forward. The target class stays
out of s here too, and comes as its z - m from the rank that holds it. Rows are numbered as they lie in contiguous
tensors, LANES a program. Class probabilities are not looked at again.
"""

import triton
import triton.language as tl

from .cross_entropy import add_target_class, row_loss, store_losses
from .math import exponential
from .online import shift_dot
from .rows import count_rows, program_rows
from .targets import class_weight, read_labels, smoothing_terms


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_terms(
    terms_ptr, partials_ptr, m_ptr, target, rows, ignore_index,
    SMOOTHED: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What is summed over ranks, (1 to 5, rows): s[, sum a, <a, z - m>] by the m of all[, the target's z - m[, w]].

    Bytes: 20 to 32 a row read, 4 to 20 written.
    """
    outer, row, row_mask, row_index = program_rows(rows, tl.program_id(0), LANES, 0)
    count = count_rows(rows)
    partials_ptr += row_index
    m = tl.load(m_ptr + row_index, mask=row_mask, other=0.0)
    delta = tl.load(partials_ptr, mask=row_mask, other=0.0) - m
    s = tl.load(partials_ptr + count, mask=row_mask, other=0.0)
    terms_ptr += row_index
    tl.store(terms_ptr, s * exponential(delta), mask=row_mask)
    if SMOOTHED:
        total = tl.load(partials_ptr + 3 * count, mask=row_mask, other=0.0)
        dot = tl.load(partials_ptr + 4 * count, mask=row_mask, other=0.0)
        tl.store(terms_ptr + count, total, mask=row_mask)
        tl.store(terms_ptr + 2 * count, shift_dot(dot, total, delta), mask=row_mask)
        terms_ptr += 2 * count
    if KIND != "probabilities":
        label, _ = read_labels(target, outer, row, row_mask, rows, ignore_index, KIND, ACC)
        target_logit = tl.load(partials_ptr + 2 * count, mask=row_mask, other=0.0)
        tl.store(terms_ptr + count, tl.where(label >= 0, target_logit - m, 0.0), mask=row_mask)
        if target.weight_ptr is not None:
            tl.store(terms_ptr + 2 * count, class_weight(target, label, label >= 0, ACC), mask=row_mask)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_from_terms(
    out, terms_ptr, m_ptr, target, rows, ignore_index,
    SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, KIND: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Loss of each row for "none", else their sum or mean, from the sums over ranks; statistics of each row.

    Bytes: 16 to 32 a row read, 12 or 16 written.
    """
    outer, row, row_mask, row_index = program_rows(rows, tl.program_id(0), LANES, 0)
    count = count_rows(rows)
    m = tl.load(m_ptr + row_index, mask=row_mask, other=0.0)
    terms_ptr += row_index
    s = tl.load(terms_ptr, mask=row_mask, other=1.0)
    total = tl.zeros((LANES,), ACC)
    dot = tl.zeros((LANES,), ACC)
    if SMOOTHED:
        total = tl.load(terms_ptr + count, mask=row_mask, other=0.0)
        dot = tl.load(terms_ptr + 2 * count, mask=row_mask, other=0.0)
        terms_ptr += 2 * count
    if KIND == "probabilities":
        log_s = tl.log(s)
        loss = row_loss(log_s, total, dot, WEIGHTED)
        weight = tl.full((LANES,), 1.0, ACC)
        log_p = log_s
    else:
        _, valid = read_labels(target, outer, row, row_mask, rows, ignore_index, KIND, ACC)
        z_target = tl.load(terms_ptr + count, mask=row_mask, other=0.0)
        w_target = tl.full((LANES,), 1.0, ACC)
        if WEIGHTED:
            w_target = tl.load(terms_ptr + 2 * count, mask=row_mask, other=0.0)
        a_target = smoothing_terms(target, rows.classes, ACC)[0] * w_target
        log_s, total, loss = add_target_class(s, total, dot, z_target, a_target, valid, WEIGHTED)
        weight = tl.where(valid == 1.0, w_target, 0.0)
        log_p = z_target - log_s
    store_losses(
        out, row_index, row_mask, count, m, log_s, total, log_p, loss, weight,
        KIND == "probabilities" or WEIGHTED, REDUCTION, KIND, out.ticket_ptr is None,
    )  # fmt: skip
