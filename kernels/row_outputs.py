"""Several outputs of each row from one read of its logits, and their gradient.

x = softcap * tanh(scale * z / softcap),  m = max x,  s = sum exp(x - m),  u = sum exp(x - m) (x - m)
log sum exp = m + log s,  entropy H = log s - u / s,  prediction = argmax x,  loss and log p of the target class as in
cross_entropy.py; rank = how many z are larger than the target class's;  t is one-hot at the target class
gradient by x = p * (g_loss * A + g_lse - g_log_prob - g_H * (log p + H)) - g_loss * a + g_log_prob * t;  by z, times
scale * (1 - tanh^2)

What is not asked for has no pointer, and no instruction.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cross_entropy import finalize_rows, merge_lanes, target_gradient, update_loss_state
from .math import convert, expm1, exponential, from_parts, rounded_product, tanh
from .online import broadcast_lanes, broadcast_rows, fresh_state, lane_reduce, shift_dot, sum_parts
from .rows import count_rows, load_whole, locate_rows, map_rows, program_rows, reduce_rows, value_offsets
from .targets import read_labels, smoothed_target, smoothing_terms


class RowTarget(NamedTuple):
    """A target as in targets.py, and what is done to the logits first; all numbers in two parts."""

    ptr: Any
    strides: Any
    weight_ptr: Any
    smoothing: Any
    scale: Any  # scale / softcap where there is a softcap; None for 1
    softcap: Any
    row_scale: Any  # Strided: a number a row, which the scale is multiplied by


class RowPointers(NamedTuple):
    """What a kernel fills, as the host passes it; None where it is not asked for."""

    loss: Any
    logsumexp: Any
    prediction: Any
    entropy: Any
    log_prob: Any
    rank: Any
    stats: Any  # (5, rows): m, log s, A, H, and log p of the target class, for backward


class RowUpstream(NamedTuple):
    """Upstream gradients; None where there is none."""

    loss: Any
    logsumexp: Any
    entropy: Any
    log_prob: Any


@triton.jit
def load_row_scale(target, outer, row, row_mask, rows, ACC: tl.constexpr):
    """Return the scale of each row, all of it; where all rows have the same, a placeholder."""
    row_scale = tl.full(row_mask.shape, 1.0, ACC)
    if target.row_scale is not None:
        offsets = value_offsets(outer, row, rows, target.row_scale.strides)
        row_scale = tl.load(target.row_scale.ptr + offsets, mask=row_mask, other=1.0).to(ACC)
        if target.scale is not None:
            row_scale *= from_parts(target.scale, ACC)
    return row_scale


@triton.jit
def scale_logits(z, target, row_scale, ACC: tl.constexpr):
    """Return the logits scaled; they have the order of x, into which the cap rounds ties."""
    if target.row_scale is not None:
        if len(z.shape) == 1:
            z = z * row_scale
        else:
            z = z * broadcast_rows(row_scale, z)
    elif target.scale is not None:
        z = z * from_parts(target.scale, ACC)
    return z


@triton.jit
def transform_logits(z, target, row_scale, ACC: tl.constexpr):
    """Return x: the logits, of blocks or one a row, scaled and capped."""
    z = scale_logits(z, target, row_scale, ACC)
    if target.softcap is not None:
        z = from_parts(target.softcap, ACC) * tanh(z)
    return z


@triton.jit
def transform_slope(x, target, row_scale, ACC: tl.constexpr):
    """Return dx / dz at x: scale * (1 - (x / softcap)^2)."""
    slope = tl.full(x.shape, 1.0, ACC)
    if target.row_scale is not None:
        slope *= broadcast_rows(row_scale, x)
    elif target.scale is not None:
        slope *= from_parts(target.scale, ACC)
    if target.softcap is not None:
        softcap = from_parts(target.softcap, ACC)
        t = x * (1.0 / softcap)
        slope *= softcap * (1.0 - t * t)
    return slope


@triton.jit
def update_row_state(
    state, block, context, target, KIND: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Take a block into the state of the loss and what the context asks for: u, the largest x and its class, the rank.

    NaN is the largest; everything is larger than a target class's NaN.
    """
    loss_state, u, best, index, rank = state
    loss_context, row_scale, y_target, ENTROPY, PREDICTION, RANK, INVARIANT = context
    z, t, c, class_mask = block
    x = transform_logits(z, target, row_scale, ACC)
    if target.scale is not None or (target.softcap is not None or target.row_scale is not None):
        x = tl.where(class_mask, x, float("-inf"))  # a masked -inf does not stay what it is
    m, s, _, _, _ = loss_state
    loss_state = update_loss_state(loss_state, (x, t, c, class_mask), loss_context, target, KIND, ACC)
    if ENTROPY:
        m_new = loss_state[0]
        others = x
        if KIND != "probabilities" and (len(z.shape) == 2 or z.shape[len(z.shape) - 1] == 1):
            others = tl.where(c == broadcast_rows(loss_context[0], z), float("-inf"), x)
        y = others - broadcast_lanes(m_new, others)
        e = exponential(y)
        u = shift_dot(u, s, m - m_new) * exponential(m - m_new) + lane_reduce(
            tl.where(e == 0.0, 0.0, e * y), tl.sum, INVARIANT
        )  # fmt: skip
    if PREDICTION:
        x = tl.where(x == x, x, float("inf"))
        top = lane_reduce(x, tl.max)
        first = lane_reduce(tl.where(x == broadcast_lanes(top, x), c, 2147483647), tl.min)
        index = tl.where(top > best, first, index)
        best = tl.maximum(best, top)
    if RANK:
        y = scale_logits(z, target, row_scale, ACC)
        larger = tl.where(y <= broadcast_rows(y_target, z), 0.0, 1.0)  # exact up to 2^24 classes
        rank += lane_reduce(tl.where(class_mask, larger, 0.0), tl.sum)
    return loss_state, u, best, index, rank


@triton.jit
def store_row_outputs(
    out, loss_state, u, index, rank, row_index, row_mask, label, valid, confidence, target, rows, ACC: tl.constexpr
):  # fmt: skip
    """Store what is asked for, and the statistics of each row for backward."""
    m, s, _, _, target_logit = loss_state
    row_max, log_s, total, loss, log_p = finalize_rows(loss_state, label, valid, confidence, target, ACC)
    if target.weight_ptr is not None:
        total = tl.where(valid == 0.0, 0.0, total)  # an infinite weight's is NaN in ignored rows
    delta = m - row_max
    x_target = target_logit - row_max
    e_target = exponential(x_target)
    u = shift_dot(u, s, delta) * exponential(delta) + tl.where(e_target == 0.0, 0.0, e_target * x_target)
    entropy = log_s - u / (s * exponential(delta) + e_target)
    if out.loss is not None:
        tl.store(out.loss + row_index, convert(loss, out.loss.dtype.element_ty), mask=row_mask)
    if out.logsumexp is not None:
        top = row_max
        if out.logsumexp.dtype.element_ty == tl.float64:
            top = row_max.to(tl.float64)  # the sum keeps the digits of both, whatever ACC is
        lse = tl.where(tl.abs(top) == float("inf"), top, top + log_s)
        tl.store(out.logsumexp + row_index, convert(lse, out.logsumexp.dtype.element_ty), mask=row_mask)
    if out.prediction is not None:
        tl.store(out.prediction + row_index, index.to(tl.int64), mask=row_mask)
    if out.entropy is not None:
        tl.store(out.entropy + row_index, convert(entropy, out.entropy.dtype.element_ty), mask=row_mask)
    if out.log_prob is not None:
        log_prob = tl.where(valid == 1.0, log_p, valid)  # 0 where ignored, NaN where there is no such class
        tl.store(out.log_prob + row_index, convert(log_prob, out.log_prob.dtype.element_ty), mask=row_mask)
    if out.rank is not None:
        tl.store(out.rank + row_index, tl.where(label >= 0, rank, -1).to(tl.int64), mask=row_mask)
    if out.stats is not None:
        count = count_rows(rows)
        tl.store(out.stats + row_index, row_max, mask=row_mask)
        tl.store(out.stats + count + row_index, log_s, mask=row_mask)
        tl.store(out.stats + 2 * count + row_index, total, mask=row_mask)
        tl.store(out.stats + 3 * count + row_index, entropy, mask=row_mask)
        tl.store(out.stats + 4 * count + row_index, log_p, mask=row_mask)


@triton.jit
def read_target_logit(tensors, row_scale, outer, row, label, rows, ACC: tl.constexpr):
    """Return the target class's logit of each row, scaled: known before the row passes, it is compared on the way."""
    offsets = value_offsets(outer, row, rows, tensors.first.strides)
    offsets += label.to(tl.int64) * tensors.first.strides[len(rows.sizes)]
    z = tl.load(tensors.first.ptr + offsets, mask=label >= 0, other=0.0).to(ACC)
    return scale_logits(z, tensors.second, row_scale, ACC)


@triton.jit(do_not_specialize=["ignore_index"])
def row_outputs_forward(
    out, tensors, rows, ignore_index,
    KIND: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Outputs of a program's rows. Bytes: logits and dense targets once, 20 a row saved."""
    DENSE: tl.constexpr = KIND == "probabilities"
    outer, row, row_mask, row_index = program_rows(rows, tl.program_id(0), LANES, VECTOR)
    confidence, smoothing_per_class = smoothing_terms(tensors.second, rows.classes, ACC)
    label, valid = read_labels(tensors.second, outer, row, row_mask, rows, ignore_index, KIND, ACC)
    read = valid != 0.0  # an ignored row is not, where only its loss is asked for
    if (out.logsumexp is not None or out.prediction is not None) or out.entropy is not None:
        read = row_mask
    places = locate_rows(tensors, outer, row, row_mask, label, read, rows, DENSE, CLASSES, VECTOR)
    ENTROPY: tl.constexpr = out.entropy is not None
    PREDICTION: tl.constexpr = out.prediction is not None
    RANK: tl.constexpr = out.rank is not None
    row_scale = load_row_scale(tensors.second, outer, row, row_mask, rows, ACC)
    y_target = tl.zeros(row_mask.shape, ACC)
    if RANK:
        y_target = read_target_logit(tensors, row_scale, outer, row, label, rows, ACC)
    INVARIANT: tl.constexpr = rows.invariant is not None
    loss_context = (label, valid, confidence, smoothing_per_class, VECTOR > 0, INVARIANT)
    context = (loss_context, row_scale, y_target, ENTROPY, PREDICTION, RANK, INVARIANT)
    least = tl.full((LANES,), float("-inf"), ACC)
    index, rank = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.float32)
    state = (fresh_state(LANES, ACC), tl.zeros((LANES,), ACC), least, index, rank)
    whole = load_whole(tensors, rows, places, float("-inf"), DENSE, ACC, WHOLE, CLASSES, LANES, VECTOR)
    loss_state, u, best, index, rank = reduce_rows(
        update_row_state, state, context, whole, tensors, rows, places, KIND, DENSE, ACC, WHOLE, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    m, s, _, _, _ = loss_state
    loss_state = merge_lanes(loss_state, label, tensors.first, places[0], rows, VECTOR > 0, VECTOR, ACC)
    if VECTOR > 0:
        delta = m - loss_state[0]
        u = sum_parts(rounded_product(shift_dot(u, s, delta), exponential(delta))[None, :], INVARIANT)
        index = tl.min(tl.where(best == tl.max(best, axis=0), index, 2147483647), axis=0) + tl.zeros((1,), tl.int32)
        rank = tl.sum(rank, axis=0) + tl.zeros((1,), tl.float32)
    else:
        x_target = transform_logits(loss_state[4], tensors.second, row_scale, ACC)
        x_target = tl.where(label >= 0, x_target, float("-inf"))
        loss_state = (loss_state[0], loss_state[1], loss_state[2], loss_state[3], x_target)
    store_row_outputs(
        out, loss_state, u, index, rank, row_index, row_mask, label, valid, confidence, tensors.second, rows, ACC
    )  # fmt: skip


@triton.jit
def load_upstream(tensor, outer, row, row_mask, rows, ACC: tl.constexpr):
    """Return an output's upstream gradient of each row, 0 where it was not asked for."""
    g = tl.zeros(row_mask.shape, ACC)
    if tensor is not None:
        offsets = value_offsets(outer, row, rows, tensor.strides)
        g = tl.load(tensor.ptr + offsets, mask=row_mask, other=0.0).to(ACC)
    return g


@triton.jit
def probability_gradient(log_p, total, entropy, g_loss, g_lse, g_entropy, HAS_ENTROPY: tl.constexpr):
    """Return p * (g_loss * A + g_lse - g_H * (log p + H))."""
    p = exponential(log_p)
    grad = p * (g_loss * total + g_lse)
    if HAS_ENTROPY:
        grad -= tl.where(p == 0.0, 0.0, p * (g_entropy * (log_p + entropy)))
    return grad


@triton.jit
def row_gradient(block, context, target, KIND: tl.constexpr, ACC: tl.constexpr):
    """Return the gradient of a block by z."""
    z, t, c, class_mask = block
    statistics, upstream, row_scale, at_target, wanted, label, valid, terms, flags = context
    row_max, log_s, total, entropy = statistics
    g_loss, g_lse, g_entropy = upstream
    HAS_LOSS, HAS_ENTROPY = flags
    x = transform_logits(z, target, row_scale, ACC)
    log_p = (x - broadcast_rows(row_max, z)) - broadcast_rows(log_s, z)
    grad = probability_gradient(
        log_p, broadcast_rows(total, z), broadcast_rows(entropy, z), broadcast_rows(g_loss, z),
        broadcast_rows(g_lse, z), broadcast_rows(g_entropy, z), HAS_ENTROPY,
    )  # fmt: skip
    if HAS_LOSS and (KIND == "probabilities" or target.smoothing is not None):
        a = smoothed_target(t, broadcast_rows(valid, z), terms[0], terms[1], target, c, class_mask, False, KIND, ACC)
        if target.weight_ptr is not None:
            a = tl.where(broadcast_rows(valid, z) == 0.0, 0.0, a)  # an infinite weight's is NaN in ignored rows
        grad -= broadcast_rows(g_loss, z) * a
    if KIND != "probabilities" and (len(z.shape) == 2 or z.shape[len(z.shape) - 1] == 1):
        grad = tl.where(c == broadcast_rows(label, z), broadcast_rows(at_target, z), grad)
    return tl.where(broadcast_rows(wanted, z) != 0, grad * transform_slope(x, target, row_scale, ACC), 0.0)


@triton.jit(do_not_specialize=["ignore_index"])
def row_outputs_backward(
    stats_ptr, upstream, tensors, rows, ignore_index,
    KIND: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of a program's rows. Bytes: logits read once, gradient written once, dense targets read once."""
    HAS_LOSS: tl.constexpr = upstream.loss is not None
    HAS_ENTROPY: tl.constexpr = upstream.entropy is not None
    DENSE: tl.constexpr = KIND == "probabilities" and HAS_LOSS
    outer, row, row_mask, row_index = program_rows(rows, tl.program_id(0), LANES, VECTOR)
    terms = smoothing_terms(tensors.second, rows.classes, ACC)
    label, valid = read_labels(tensors.second, outer, row, row_mask, rows, ignore_index, KIND, ACC)
    g_loss = load_upstream(upstream.loss, outer, row, row_mask, rows, ACC)
    g_lse = load_upstream(upstream.logsumexp, outer, row, row_mask, rows, ACC)
    g_entropy = load_upstream(upstream.entropy, outer, row, row_mask, rows, ACC)
    wanted = (valid != 0.0) | (g_lse != 0.0) | (g_entropy != 0.0)
    places = locate_rows(tensors, outer, row, row_mask, label, wanted, rows, DENSE, CLASSES, VECTOR)
    count = count_rows(rows)
    row_max = tl.load(stats_ptr + row_index, mask=row_mask, other=0.0)
    log_s = tl.load(stats_ptr + count + row_index, mask=row_mask, other=0.0)
    total = tl.load(stats_ptr + 2 * count + row_index, mask=row_mask, other=0.0)
    entropy = tl.load(stats_ptr + 3 * count + row_index, mask=row_mask, other=0.0)
    log_p = tl.load(stats_ptr + 4 * count + row_index, mask=row_mask, other=0.0)
    # no digit of the target class cancels where the row is confident; g_loss * 0 would be NaN times an infinite A
    nothing = tl.zeros(row_mask.shape, ACC)
    at_target = probability_gradient(log_p, nothing, entropy, nothing, g_lse, g_entropy, HAS_ENTROPY)
    if HAS_LOSS:
        at_target += target_gradient(log_p, total, g_loss, label, terms[0], terms[1], tensors.second, ACC)
    else:
        total = nothing
    if upstream.log_prob is not None:
        g_log_prob = load_upstream(upstream.log_prob, outer, row, row_mask, rows, ACC)
        g_log_prob = tl.where(valid == 0.0, 0.0, g_log_prob * valid)
        at_target -= g_log_prob * expm1(log_p)
        g_lse -= g_log_prob  # of the other classes, p is what both are multiplied by
    context = (
        (row_max, log_s, total, entropy), (g_loss, g_lse, g_entropy),
        load_row_scale(tensors.second, outer, row, row_mask, rows, ACC), at_target, wanted.to(tl.int32), label, valid,
        terms, (HAS_LOSS, HAS_ENTROPY),
    )  # fmt: skip
    whole = load_whole(tensors, rows, places, float("-inf"), DENSE, ACC, WHOLE, CLASSES, LANES, VECTOR)
    map_rows(
        row_gradient, context, whole, tensors, rows, places, KIND, DENSE, "", ACC, WHOLE, CLASSES, LANES, VECTOR
    )  # fmt: skip
