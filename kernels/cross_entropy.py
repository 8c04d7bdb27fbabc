"""Cross-entropy of logits against class indices or class probabilities, with weights and label smoothing.

a = w * ((1 - e) t + keep * e / C),  A = sum(a),  m = max z,  s = sum exp(z - m)
loss = A * log s - <a, z - m>,       d loss / d z = g * (A * softmax(z) - a)

m and log s are kept apart: their sum would lose digits when |z| is large. 0 * (-inf) in <a, z - m> is 0. The true
class stays out of s until the end: where it is the maximum, log s = log1p(the others), and confident rows keep all
their digits. TARGET is index_target or probability_target; weight, smoothing and outputs are None where not wanted.
"""

import triton
import triton.language as tl

from .rows import class_weight, expm1, log1p, row_offsets, row_tile, smoothing_terms


@triton.jit
def spread(t, keep, on, off, weight_ptr, c, exists, DENSE: tl.constexpr, ACC: tl.constexpr):
    """Return the block of a = w * ((1 - e) t + keep * e / C) without the labelled class's t; 0 outside the classes."""
    a = tl.where(exists[None, :], (keep * off)[:, None], 0.0)
    if DENSE:
        a += on * t
    return a * class_weight(weight_ptr, c, exists, ACC)[None, :]


@triton.jit
def finish(loss_ptr, denominator_ptr, loss, weight):
    """Store the reduced loss; for the mean also its denominator, NaN where the weights sum to 0, as torch has it."""
    if denominator_ptr is not None:
        weight = tl.where(weight == 0.0, float("nan"), weight)
        loss = loss / weight
        tl.store(denominator_ptr, weight.to(denominator_ptr.dtype.element_ty))
    if loss_ptr.dtype.element_ty == tl.bfloat16:
        loss = loss.to(tl.float32)  # Triton's interpreter has no conversion from float64 to bfloat16
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_forward(
    loss_ptr, stats_ptr, sums_ptr, denominator_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, target_strides, classes, ignore_index, smoothing,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss of each row, or the sums over this program's rows; saves (m, log s[, A]) of each row, A unless it is keep.

    loss_ptr is (rows,) for "none", else one value; sums_ptr is (2, programs), or None where one program has all rows.
    Bytes: logits and dense targets once, 8 or 12 a row saved.
    """
    outer, row, live, number = row_tile(sizes, ROWS)
    z_rows = logits_ptr + row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    lanes = tl.arange(0, CLASSES)
    first = live[:, None] & (lanes < classes)[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, lanes, first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()  # else t is the label alone
    saved: tl.constexpr = 3 if dense or weight_ptr is not None else 2

    m = tl.full((ROWS,), float("-inf"), ACC)  # running maximum
    shift = tl.zeros((ROWS,), ACC)  # m, or 0 as long as every logit is -inf
    s = tl.zeros((ROWS,), ACC)  # sum exp(z - shift) without the labelled class
    total = tl.zeros((ROWS,), ACC)  # sum a, likewise
    dot = tl.zeros((ROWS,), ACC)  # <a, z - shift>, likewise
    for start in range(0, classes, CLASSES):
        c = start + lanes
        exists = c < classes
        inside = live[:, None] & exists[None, :]
        z = tl.load(z_rows[:, None] + c.to(tl.int64)[None, :] * z_step, mask=inside, other=float("-inf")).to(ACC)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        old = shift
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        z -= shift[:, None]
        others = tl.where(c[None, :] == label[:, None], 0.0, tl.exp(z))
        s = s * tl.exp(m - shift) + tl.sum(others, axis=1)
        m = m_new
        if dense or smoothing is not None:
            t = TARGET(target_ptr, t_rows, c, inside, live, classes, ignore_index, t_step, ACC)[2]
            a = spread(t, keep, on, off, weight_ptr, c, exists, dense, ACC)
            dot += total * (old - shift) + tl.sum(tl.where(a == 0.0, 0.0, a * z), axis=1)
            total += tl.sum(a, axis=1)

    labelled = label >= 0
    w_true = class_weight(weight_ptr, label, labelled, ACC)
    a_true = tl.where(labelled, on * w_true, 0.0)
    z_true = tl.load(z_rows + label * z_step, mask=labelled, other=float("-inf")).to(ACC) - shift
    e_true = tl.exp(z_true)
    log_s = tl.where(e_true == 1.0, log1p(s), tl.log(s + e_true))
    total = (total + a_true) * keep
    loss = total * log_s - dot - tl.where(a_true == 0.0, 0.0, a_true * z_true)
    loss = tl.where(live & (keep != 0.0), loss, 0.0)

    if stats_ptr is not None:
        tl.store(stats_ptr + number * saved, shift, mask=live)
        tl.store(stats_ptr + number * saved + 1, log_s, mask=live)
        if saved == 3:
            tl.store(stats_ptr + number * saved + 2, total, mask=live)
    if REDUCTION == "none":
        tl.store(loss_ptr + number, loss.to(loss_ptr.dtype.element_ty), mask=live)
    else:
        weight = tl.where(labelled, w_true, tl.where(live & (keep == 1.0), 1.0, 0.0))
        loss_sum = tl.sum(loss, axis=0)
        weight_sum = tl.sum(weight, axis=0)
        if sums_ptr is None:
            finish(loss_ptr, denominator_ptr, loss_sum, weight_sum)
        else:
            tl.store(sums_ptr + tl.program_id(0), loss_sum)
            tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)


@triton.jit
def cross_entropy_reduce(loss_ptr, denominator_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """Sum (2, programs) partial sums in one program and a fixed order, in float64: means of 10**6 rows stay exact."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        loss += tl.load(sums_ptr + i, mask=i < programs, other=0.0).to(tl.float64)
        weight += tl.load(sums_ptr + programs + i, mask=i < programs, other=0.0).to(tl.float64)
    finish(loss_ptr, denominator_ptr, tl.sum(loss, axis=0), tl.sum(weight, axis=0))


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward(
    grad_ptr, stats_ptr, upstream_ptr, denominator_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, upstream_strides, logits_strides, target_strides, classes, ignore_index, smoothing,
    TARGET: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from the saved row statistics: g * (A * exp(z - m - log s) - a).

    The true class gets g * (A * (p - 1) + A - a) with p - 1 = expm1(log p): right relative to itself when p is near 1.
    Bytes: logits read once, gradient written once, dense targets read once, 8 or 12 a row of statistics.
    """
    outer, row, live, number = row_tile(sizes, ROWS)
    z_rows = logits_ptr + row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    out_rows = grad_ptr + row_offsets(outer, row, sizes, grad_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    out_step = grad_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    lanes = tl.arange(0, CLASSES)
    first = live[:, None] & (lanes < classes)[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, lanes, first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()  # else t is the label alone
    saved: tl.constexpr = 3 if dense or weight_ptr is not None else 2

    shift = tl.load(stats_ptr + number * saved, mask=live, other=0.0)
    log_s = tl.load(stats_ptr + number * saved + 1, mask=live, other=0.0)
    total = keep
    if saved == 3:
        total = tl.load(stats_ptr + number * saved + 2, mask=live, other=0.0)
    g = tl.load(upstream_ptr + row_offsets(outer, row, sizes, upstream_strides), mask=live, other=0.0).to(ACC)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr)

    labelled = label >= 0
    z_true = tl.load(z_rows + label * z_step, mask=labelled, other=0.0).to(ACC)
    a_true = (on + off) * class_weight(weight_ptr, label, labelled, ACC)
    g_true = g * (total * expm1((z_true - shift) - log_s) + (total - a_true))
    scale = g * total
    for start in range(0, classes, CLASSES):
        c = start + lanes
        exists = c < classes
        inside = live[:, None] & exists[None, :]
        steps = c.to(tl.int64)[None, :]
        z = tl.load(z_rows[:, None] + steps * z_step, mask=inside, other=float("-inf")).to(ACC)
        grad = scale[:, None] * tl.exp((z - shift[:, None]) - log_s[:, None])
        if dense or smoothing is not None:
            t = TARGET(target_ptr, t_rows, c, inside, live, classes, ignore_index, t_step, ACC)[2]
            grad -= g[:, None] * spread(t, keep, on, off, weight_ptr, c, exists, dense, ACC)
        grad = tl.where(c[None, :] == label[:, None], g_true[:, None], grad)
        grad = tl.where(keep[:, None] == 0.0, 0.0, grad)
        tl.store(out_rows[:, None] + steps * out_step, grad.to(grad_ptr.dtype.element_ty), mask=inside)
