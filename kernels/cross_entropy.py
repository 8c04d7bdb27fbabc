"""Cross-entropy of logits against class indices or class probabilities, with weights and label smoothing.

a = w * ((1 - e) t + valid * e / C),  A = sum(a),  m = max z,  s = sum exp(z - m)
loss = A * log s - <a, z - m>,        d loss / d z = g * (A * softmax(z) - a)

m and log s are kept apart: their sum would lose digits when |z| is large. 0 * (-inf) in <a, z - m> is 0. The target
class stays out of s until the end: where it is the maximum, log s = log1p(the others), and confident rows keep all
their digits. Its logit is taken from the blocks as they pass, and its log p is saved for backward: no element is read
a second time while its gradient may be written over it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import convert, expm1, exponential, log1p, lowest, rounded_product
from .online import (
    broadcast_lanes,
    broadcast_rows,
    fresh_state,
    lane_reduce,
    merge_partials,
    online_softmax_update,
    shift_dot,
)
from .reduce import mean_factor, reduce_losses, scratch_sums, statistics_size, takes_last_ticket
from .rows import count_rows, load_whole, locate_rows, map_rows, program_rows, reduce_rows, value_offsets
from .targets import class_weight, denominator_share, read_labels, smoothed_target, smoothing_terms


class Upstream(NamedTuple):
    """The gradient of the loss, as the host passes it."""

    ptr: Any
    strides: Any
    mean: Any  # 1: it is a mean's, whose denominator follows the statistics that were saved


@triton.jit
def update_loss_state(state, block, context, target, KIND: tl.constexpr, ACC: tl.constexpr):
    """Take a block into m, s, sum a and <a, z - m> of each lane, the target class left out; the last is its logit."""
    m, s, total, dot, target_logit = state
    z, t, c, class_mask = block
    label, valid, confidence, smoothing_per_class, KEEP, INVARIANT = context
    others = z
    if KIND != "probabilities" and (
        len(z.shape) == 2 or z.shape[len(z.shape) - 1] == 1
    ):  # no block of a long row has the target class
        is_target = c == broadcast_rows(label, z)
        others = tl.where(is_target, float("-inf"), z)
        if KEEP:
            target_logit += lane_reduce(tl.where(is_target, z, 0.0), tl.sum)
    m_new, s = online_softmax_update(m, s, z, others, INVARIANT)
    if KIND == "probabilities" or target.smoothing is not None:
        dot = shift_dot(dot, total, m - m_new)
    if KIND == "probabilities" or (target.smoothing is not None and target.weight_ptr is not None):
        a = smoothed_target(
            t, broadcast_rows(valid, z), confidence, smoothing_per_class, target, c, class_mask, True, KIND, ACC
        )  # fmt: skip
        dot += lane_reduce(tl.where(a == 0.0, 0.0, a * (z - broadcast_lanes(m_new, z))), tl.sum, INVARIANT)
        total += lane_reduce(a, tl.sum, INVARIANT)
    elif target.smoothing is not None:  # the same a for all classes
        a = rounded_product(valid, smoothing_per_class)
        shifted = lane_reduce(tl.where(class_mask, z - broadcast_lanes(m_new, z), 0.0), tl.sum, INVARIANT)
        dot += tl.where(a == 0.0, 0.0, rounded_product(a, shifted))
        total += rounded_product(a, lane_reduce(tl.where(class_mask, 1.0, 0.0).to(ACC), tl.sum))
    return m_new, s, total, dot, target_logit


@triton.jit
def merge_lanes(state, label, logits, base, rows, KEPT: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """Return the state of each row from that of the lanes; the target class's logit is -inf where there is none."""
    m, s, total, dot, target_logit = state
    if VECTOR > 0:
        m, s, total, dot = merge_partials(
            m[None, :], s[None, :], total[None, :], dot[None, :], rows.invariant is not None
        )
        target_logit = tl.sum(target_logit, axis=0) + tl.zeros((1,), ACC)
    if KEPT:
        target_logit = tl.where(label >= 0, target_logit, float("-inf"))
    else:
        address = logits.ptr + base + label.to(tl.int64) * logits.strides[len(rows.sizes)]
        target_logit = tl.load(address, mask=label >= 0, other=float("-inf")).to(ACC)
    return m, s, total, dot, target_logit


@triton.jit
def row_loss(log_s, total, dot, WEIGHTED: tl.constexpr):
    """Return A * log s - <a, z - m>; A where a class weight makes it infinite, and the logits are finite.

    Then the difference is NaN where inf * 0 is one of its terms: at the maximum, or with log s rounded to 0.
    """
    loss = total * log_s - dot
    if WEIGHTED:
        infinite = (tl.abs(total) == float("inf")) & (tl.abs(log_s) < float("inf"))
        loss = tl.where(infinite & (loss != loss), total, loss)
    return loss


@triton.jit
def add_target_class(s, total, dot, z_target, a_target, valid, WEIGHTED: tl.constexpr):
    """Add the target class, of logit z_target less m, to the others' s, sum a and <a, z - m>.

    Returns the row's log s, A and loss.
    """
    e_target = exponential(z_target)
    log_s = tl.where(e_target == 1.0, log1p(s), tl.log(s + e_target))
    total = (total + a_target) * valid
    loss = row_loss(log_s, total, dot + tl.where(a_target == 0.0, 0.0, a_target * z_target), WEIGHTED)
    return log_s, total, tl.where(valid != 0.0, loss, 0.0)


@triton.jit
def finalize_rows(state, label, valid, confidence, target, ACC: tl.constexpr):
    """Return the whole row's m, log s, A, loss, and log p of the target class, from the state of the other classes."""
    m, s, total, dot, target_logit = state
    has_label = label >= 0
    a_target = tl.where(has_label, confidence * class_weight(target, label, has_label, ACC), 0.0)
    row_max = tl.maximum(m, target_logit)
    dot = shift_dot(dot, total, m - row_max)
    s = s * exponential(m - row_max)
    z_target = target_logit - row_max
    log_s, total, loss = add_target_class(s, total, dot, z_target, a_target, valid, target.weight_ptr is not None)
    return row_max, log_s, total, loss, z_target - log_s


@triton.jit
def store_losses(
    out, row_index, row_mask, count, row_max, log_s, total, log_p, loss, weight,
    SAVES_TOTAL: tl.constexpr, REDUCTION: tl.constexpr, KIND: tl.constexpr, LONE: tl.constexpr,
):  # fmt: skip
    """Store per-row statistics, and per-row losses or their sum: all of it in a lone program."""
    if out.saves is not None:
        stats_ptr = out.scratch_ptr + row_index
        tl.store(stats_ptr, row_max, mask=row_mask)
        tl.store(stats_ptr + count, log_s, mask=row_mask)
        if KIND != "probabilities":
            tl.store(stats_ptr + 2 * count, log_p, mask=row_mask)
            stats_ptr += count
        if SAVES_TOTAL:
            tl.store(stats_ptr + 2 * count, total, mask=row_mask)
    if REDUCTION == "none":
        tl.store(out.loss_ptr + row_index, convert(loss, out.loss_ptr.dtype.element_ty), mask=row_mask)
    else:
        reduce_losses(out, loss, weight, row_mask, count, SAVES_TOTAL, REDUCTION, KIND, LONE)


@triton.jit
def target_gradient(log_p, total, g, label, confidence, smoothing_per_class, target, ACC: tl.constexpr):
    """Return the target class's g * (A * (p - 1) + A - a), with p - 1 = expm1(log p) for its digits near p = 1.

    Where another class's weight makes A infinite, that is inf - inf, and A * p - a is right.
    """
    a_target = (confidence + smoothing_per_class) * class_weight(target, label, label >= 0, ACC)
    grad = total * expm1(log_p) + (total - a_target)
    if target.weight_ptr is not None:
        grad = tl.where(tl.abs(total) == float("inf"), total * exponential(log_p) - a_target, grad)
    return g * grad


@triton.jit
def gradient_context(
    row_max, log_s, total, log_p, g, label, valid, confidence, smoothing_per_class, target, ACC: tl.constexpr
):  # fmt: skip
    """Return what `loss_gradient` needs of each row; an ignored row's factors are 0, whatever its logits."""
    at_target = target_gradient(log_p, total, g, label, confidence, smoothing_per_class, target, ACC)
    scale = tl.where(valid == 0.0, 0.0, g * total * tl.exp(-log_s))
    g = tl.where(valid == 0.0, 0.0, g)
    return row_max, scale, g, at_target, label, valid, confidence, smoothing_per_class


@triton.jit
def loss_gradient(block, context, target, KIND: tl.constexpr, ACC: tl.constexpr):
    """Return g * (A * exp(z - m - log s) - a) of a block."""
    z, t, c, class_mask = block
    row_max, scale, g, at_target, label, valid, confidence, smoothing_per_class = context
    grad = broadcast_rows(scale, z) * exponential(z - broadcast_rows(row_max, z))
    if KIND == "probabilities" or target.smoothing is not None:
        a = smoothed_target(
            t, broadcast_rows(valid, z), confidence, smoothing_per_class, target, c, class_mask, False, KIND, ACC
        )  # fmt: skip
        grad -= broadcast_rows(g, z) * a
    if KIND != "probabilities" and (len(z.shape) == 2 or z.shape[len(z.shape) - 1] == 1):
        grad = tl.where(c == broadcast_rows(label, z), broadcast_rows(at_target, z), grad)
    if len(z.shape) == 2:
        grad = tl.where(broadcast_rows(valid, z) == 0.0, 0.0, grad)  # a tile's ignored rows have been read
    return grad


@triton.jit
def store_partials(partials_ptr, state, row_index, row_mask, rows, target, KIND: tl.constexpr):
    """Store m, s and the target class's logit[, sum a, <a, z - m>] of a program's rows, or its part of a row."""
    m, s, total, dot, target_logit = state
    step = count_rows(rows) * rows.parts
    partials_ptr += row_index * rows.parts + tl.program_id(0) % rows.parts
    tl.store(partials_ptr, m, mask=row_mask)
    tl.store(partials_ptr + step, s, mask=row_mask)
    tl.store(partials_ptr + 2 * step, target_logit, mask=row_mask)
    if KIND == "probabilities" or target.smoothing is not None:
        tl.store(partials_ptr + 3 * step, total, mask=row_mask)
        tl.store(partials_ptr + 4 * step, dot, mask=row_mask)


@triton.jit
def combine_parts(
    out, partials_ptr, target, rows, ignore_index,
    SAVES_TOTAL: tl.constexpr, KIND: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of all rows, in one program, and reduce the loss."""
    inner = rows.sizes[len(rows.sizes) - 1]
    count = count_rows(rows)
    row_index = tl.arange(0, ROWS).to(tl.int64)
    row_mask = row_index < count
    confidence, _ = smoothing_terms(target, rows.classes, ACC)
    label, valid = read_labels(
        target, row_index // inner, row_index % inner, row_mask, rows, ignore_index, KIND, ACC
    )  # fmt: skip
    mask = row_mask[:, None] & (tl.arange(0, PARTS) < rows.parts)[None, :]
    step = count * rows.parts
    target_logit = tl.load(
        partials_ptr + 2 * step + row_index * rows.parts, mask=row_mask, other=0.0, cache_modifier=".cg"
    )
    partials_ptr += row_index[:, None] * rows.parts + tl.arange(0, PARTS)[None, :]
    m = tl.where(mask, tl.load(partials_ptr, mask=mask, other=0.0, cache_modifier=".cg"), lowest(1, ACC))
    s = tl.load(partials_ptr + step, mask=mask, other=0.0, cache_modifier=".cg")
    total = tl.zeros((ROWS, PARTS), ACC)
    dot = tl.zeros((ROWS, PARTS), ACC)
    if KIND == "probabilities" or target.smoothing is not None:
        total = tl.load(partials_ptr + 3 * step, mask=mask, other=0.0, cache_modifier=".cg")
        dot = tl.load(partials_ptr + 4 * step, mask=mask, other=0.0, cache_modifier=".cg")
    m, s, total, dot = merge_partials(m, s, total, dot)
    state = (m, s, total, dot, target_logit)
    row_max, log_s, total, loss, log_p = finalize_rows(state, label, valid, confidence, target, ACC)
    store_losses(
        out, row_index, row_mask, count, row_max, log_s, total, log_p, loss,
        denominator_share(label, valid, target, ACC), SAVES_TOTAL, REDUCTION, KIND, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_forward(
    out, tensors, rows, ignore_index,
    KIND: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, WEIGHT_PARTS: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Loss of each row (rows,) for "none", else their sum or mean; statistics of each row for backward.

    With tensors.out also the gradient for an upstream gradient of 1. Rows that are split into PARTS parts at most, ROWS
    rows at most, are put together by the last program; without out.loss_ptr they are left in parts.
    Bytes: logits and dense targets once, with the gradient a second time from a cache unless WHOLE; gradient written
    once; 12 or 16 a row saved.
    """
    DENSE: tl.constexpr = KIND == "probabilities"
    outer, row, row_mask, row_index = program_rows(rows, tl.program_id(0), LANES, VECTOR)
    confidence, smoothing_per_class = smoothing_terms(tensors.second, rows.classes, ACC)
    label, valid = read_labels(tensors.second, outer, row, row_mask, rows, ignore_index, KIND, ACC)
    places = locate_rows(tensors, outer, row, row_mask, label, valid != 0.0, rows, DENSE, CLASSES, VECTOR)
    # a tile's gradient may be written over logits that another thread has yet to read
    KEEP: tl.constexpr = VECTOR > 0 or tensors.out.ptr is not None
    context = (label, valid, confidence, smoothing_per_class, KEEP, rows.invariant is not None)
    whole = load_whole(tensors, rows, places, float("-inf"), DENSE, ACC, WHOLE, CLASSES, LANES, VECTOR)
    state = reduce_rows(
        update_loss_state, fresh_state(LANES, ACC), context, whole, tensors, rows, places, KIND, DENSE, ACC,
        WHOLE, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    state = merge_lanes(state, label, tensors.first, places[0], rows, KEEP, VECTOR, ACC)
    SAVES_TOTAL: tl.constexpr = DENSE or tensors.second.weight_ptr is not None
    if out.loss_ptr is None:
        store_partials(out.scratch_ptr, state, row_index, row_mask, rows, tensors.second, KIND)
    elif PARTS > 1:
        partials_ptr = scratch_sums(out, count_rows(rows), SAVES_TOTAL, REDUCTION, KIND)
        store_partials(partials_ptr, state, row_index, row_mask, rows, tensors.second, KIND)
        if takes_last_ticket(out.ticket_ptr):
            combine_parts(
                out, partials_ptr, tensors.second, rows, ignore_index, SAVES_TOTAL, KIND, REDUCTION, ACC, ROWS, PARTS
            )  # fmt: skip
    else:
        row_max, log_s, total, loss, log_p = finalize_rows(state, label, valid, confidence, tensors.second, ACC)
        weight = denominator_share(label, valid, tensors.second, ACC)
        if tensors.out.ptr is not None:
            g = mean_factor(out, weight, row_mask, rows, REDUCTION, KIND, WEIGHT_PARTS, ACC)
            g += tl.zeros(valid.shape, ACC)
            context = gradient_context(
                row_max, log_s, total, log_p, g, label, valid, confidence, smoothing_per_class, tensors.second, ACC
            )  # fmt: skip
            map_rows(
                loss_gradient, context, whole, tensors, rows, places, KIND, DENSE, "evict_first", ACC,
                WHOLE, CLASSES, LANES, VECTOR,
            )  # fmt: skip
        store_losses(
            out, row_index, row_mask, count_rows(rows), row_max, log_s, total, log_p, loss, weight,
            SAVES_TOTAL, REDUCTION, KIND, out.ticket_ptr is None,
        )  # fmt: skip


@triton.jit
def load_statistics(stats_ptr, row_index, row_mask, count, valid, HAS_TOTAL: tl.constexpr, KIND: tl.constexpr):
    """Return m, log s, A and log p of the target class of each row, as `store_losses` stored them."""
    stats_ptr += row_index
    row_max = tl.load(stats_ptr, mask=row_mask, other=0.0)
    log_s = tl.load(stats_ptr + count, mask=row_mask, other=0.0)
    log_p = log_s
    if KIND != "probabilities":
        log_p = tl.load(stats_ptr + 2 * count, mask=row_mask, other=0.0)
        stats_ptr += count
    total = valid
    if HAS_TOTAL:
        total = tl.load(stats_ptr + 2 * count, mask=row_mask, other=0.0)
    return row_max, log_s, total, log_p


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward(
    stats_ptr, upstream, tensors, rows, ignore_index,
    GRAD_PRECOMPUTED: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr,
    CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from the saved row statistics: g * (A * exp(z - m - log s) - a).

    GRAD_PRECOMPUTED: tensors.out holds the gradient for an upstream gradient of 1 already; rows where it is 1 are left
    as they are. Bytes: logits read once, gradient written once, dense targets read once, 12 or 16 a row of statistics.
    """
    DENSE: tl.constexpr = KIND == "probabilities"
    outer, row, row_mask, row_index = program_rows(rows, tl.program_id(0), LANES, VECTOR)
    g = tl.load(upstream.ptr + value_offsets(outer, row, rows, upstream.strides), mask=row_mask, other=0.0).to(ACC)
    if GRAD_PRECOMPUTED:
        row_mask = row_mask & (g != 1.0)
    SAVES_TOTAL: tl.constexpr = DENSE or tensors.second.weight_ptr is not None
    if upstream.mean is not None:
        g = g / tl.load(stats_ptr + statistics_size(count_rows(rows), SAVES_TOTAL, KIND))
    confidence, smoothing_per_class = smoothing_terms(tensors.second, rows.classes, ACC)
    label, valid = read_labels(tensors.second, outer, row, row_mask, rows, ignore_index, KIND, ACC)
    places = locate_rows(tensors, outer, row, row_mask, label, valid != 0.0, rows, DENSE, CLASSES, VECTOR)
    row_max, log_s, total, log_p = load_statistics(
        stats_ptr, row_index, row_mask, count_rows(rows), valid, SAVES_TOTAL, KIND
    )  # fmt: skip
    context = gradient_context(
        row_max, log_s, total, log_p, g, label, valid, confidence, smoothing_per_class, tensors.second, ACC
    )  # fmt: skip
    whole = load_whole(tensors, rows, places, float("-inf"), DENSE, ACC, WHOLE, CLASSES, LANES, VECTOR)
    map_rows(
        loss_gradient, context, whole, tensors, rows, places, KIND, DENSE, "", ACC, WHOLE, CLASSES, LANES, VECTOR
    )  # fmt: skip
