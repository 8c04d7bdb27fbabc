"""Several outputs of each row from one read of its logits: loss, log sum exp, prediction, entropy; and their gradient.

x = softcap * tanh(scale * z / softcap),  m = max x,  s = sum exp(x - m),  u = sum exp(x - m) (x - m)
log sum exp = m + log s,  entropy H = log s - u / s,  prediction = argmax x,  loss as in cross_entropy.py
gradient by x = p * (g_loss * A + g_lse - g_H * (log p + H)) - g_loss * a;  by z, times scale * (1 - tanh^2)

What is not asked for has no pointer, and no instruction. scale is (scale / softcap, softcap) or (scale, None).
"""

import triton
import triton.language as tl

from .cross_entropy import close_rows, spread, true_gradient
from .rows import (
    absorb,
    along,
    convert,
    expm1,
    exponential,
    lane_max,
    lane_min,
    lane_sum,
    load_tile,
    lowest,
    row_offsets,
    row_tile,
    smoothing_terms,
)


@triton.jit
def number(parts, ACC: tl.constexpr):
    """Return a number that came as two float32, high and low part."""
    return tl.full((), parts[0], ACC) + tl.full((), parts[1], ACC)


@triton.jit
def tanh(x):
    """Return tanh x, accurate relative to itself: (1 - e) / (1 + e) with e = exp(-2|x|), where 1 - e cancels otherwise.

    Float32 has a series up to 1/4, with a truncation error of 1e-8; float64 has expm1.
    """
    if x.dtype == tl.float64:
        y = expm1(-2.0 * tl.abs(x))
        y = -y / (2.0 + y)
        y = tl.where(x < 0.0, -y, y)
    else:
        e = exponential(-2.0 * tl.abs(x))
        far = (1.0 - e) / (1.0 + e)
        x2 = x * x
        near = x + x * x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835))))
        y = tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))
    return y


@triton.jit
def effective(z, scale, softcap, ACC: tl.constexpr):
    """Return the logits scaled and capped, and what the gradient by them is multiplied by."""
    slope = tl.full(z.shape, 1.0, ACC)
    if scale is not None:
        factor = number(scale, ACC)
        z = z * factor
        slope *= factor
    if softcap is not None:
        cap = number(softcap, ACC)
        t = tanh(z)
        z = cap * t
        slope *= cap * (1.0 - t * t)
    return z, slope


@triton.jit
def moved(u, s, delta):
    """Return u for a maximum that is higher by -delta, before its terms are scaled by exp(delta)."""
    return u + tl.where(s == 0.0, 0.0, s * delta)


@triton.jit
def shifted(u, s, delta):
    """Return u for a maximum that is higher by -delta."""
    return moved(u, s, delta) * exponential(delta)


@triton.jit
def absorb_row(x, others, a, c, state, SPREAD: tl.constexpr, ENTROPY: tl.constexpr, PREDICT: tl.constexpr):
    """Add a block to m, s, sum a, <a, x - m>, u, the largest x and its class, lane by lane; NaN is the largest."""
    m, s, total, dot, u, best, index = state
    m_new, s_new, total, dot = absorb(x, others, a, m, s, total, dot, SPREAD)
    if ENTROPY:
        y = others - along(m_new, others)
        e = exponential(y)
        u = shifted(u, s, m - m_new) + lane_sum(tl.where(e == 0.0, 0.0, e * y))
    if PREDICT:
        x = tl.where(x == x, x, float("inf"))
        top = lane_max(x)
        first = lane_min(tl.where(x == along(top, x), c, 2147483647))
        index = tl.where(top > best, first, index)
        best = tl.maximum(best, top)
    return m_new, s_new, total, dot, u, best, index


@triton.jit
def fresh(LANES: tl.constexpr, ACC: tl.constexpr):
    """Return the state of lanes that have seen nothing."""
    zero = tl.zeros((LANES,), ACC)
    least = tl.full((LANES,), float("-inf"), ACC)
    return lowest(LANES, ACC), zero, zero, zero, zero, least, tl.zeros((LANES,), tl.int32)


@triton.jit
def store_outputs(
    loss_ptr, lse_ptr, prediction_ptr, entropy_ptr, stats_ptr, rows, live, state, x_true, label, keep, on, weight_ptr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Store what is asked for, and (m, log s, A, H) of each row for backward."""
    m, s, total, dot, u, _, index = state
    shift, log_s, total, loss, _ = close_rows(m, s, total, dot, x_true, label, keep, on, weight_ptr, ACC)
    if weight_ptr is not None:
        total = tl.where(keep == 0.0, 0.0, total)  # an infinite weight's is NaN in ignored rows
    delta = m - shift
    x_true -= shift
    e_true = exponential(x_true)
    u = shifted(u, s, delta) + tl.where(e_true == 0.0, 0.0, e_true * x_true)
    entropy = log_s - u / (s * exponential(delta) + e_true)
    if loss_ptr is not None:
        tl.store(loss_ptr + rows, convert(loss, loss_ptr.dtype.element_ty), mask=live)
    if lse_ptr is not None:
        lse = tl.where(tl.abs(shift) == float("inf"), shift, shift + log_s)
        tl.store(lse_ptr + rows, convert(lse, lse_ptr.dtype.element_ty), mask=live)
    if prediction_ptr is not None:
        tl.store(prediction_ptr + rows, index.to(tl.int64), mask=live)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, convert(entropy, entropy_ptr.dtype.element_ty), mask=live)
    if stats_ptr is not None:
        tl.store(stats_ptr + rows * 4, shift, mask=live)
        tl.store(stats_ptr + rows * 4 + 1, log_s, mask=live)
        tl.store(stats_ptr + rows * 4 + 2, total, mask=live)
        tl.store(stats_ptr + rows * 4 + 3, entropy, mask=live)


@triton.jit
def upstream(pointer, outer, row, live, sizes, strides, ACC: tl.constexpr):
    """Return an output's upstream gradient of each row, 0 where it was not asked for."""
    g = tl.zeros(row.shape, ACC)
    if pointer is not None:
        g = tl.load(pointer + row_offsets(outer, row, sizes, strides), mask=live, other=0.0).to(ACC)
    return g


@triton.jit
def by_logits(x, m, log_s, total, entropy, g_loss, g_lse, g_entropy, ENTROPY: tl.constexpr):
    """Return p * (g_loss * A + g_lse - g_H * (log p + H))."""
    log_p = (x - m) - log_s
    p = exponential(log_p)
    grad = p * (g_loss * total + g_lse)
    if ENTROPY:
        grad -= tl.where(p == 0.0, 0.0, p * (g_entropy * (log_p + entropy)))
    return grad


@triton.jit
def at_label(
    z_true, scale, softcap, m, log_s, total, entropy, g_loss, g_lse, g_entropy, label, on, off, weight_ptr,
    ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the labelled class's gradient by z, in which no digit cancels where the row is confident."""
    x, slope = effective(z_true, scale, softcap, ACC)
    nothing = tl.zeros(total.shape, ACC)  # g_loss * 0 would be NaN times an infinite A
    grad = by_logits(x, m, log_s, nothing, entropy, nothing, g_lse, g_entropy, ENTROPY)
    return slope * (grad + true_gradient(x, m, log_s, total, g_loss, label, on, off, weight_ptr, ACC))


@triton.jit(do_not_specialize=["ignore_index"])
def row_outputs_forward(
    loss_ptr, lse_ptr, prediction_ptr, entropy_ptr, stats_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, target_strides, classes, ignore_index, smoothing, scale, softcap,
    TARGET: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Outputs of the rows of a tile. Bytes: logits and dense targets once, 16 a row saved."""
    outer, row, live, rows = row_tile(tl.program_id(0), sizes, ROWS)
    z_rows = row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    first = (tl.arange(0, CLASSES) < classes)[:, None] & live[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, tl.arange(0, CLASSES), first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    spreads: tl.constexpr = dense or smoothing is not None
    state = fresh(ROWS, ACC)
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        exists = c < classes
        inside = exists[:, None] & live[None, :]
        z = load_tile(logits_ptr, z_rows[None, :] + c.to(tl.int64)[:, None] * z_step, inside).to(ACC)
        x = effective(z, scale, softcap, ACC)[0]
        x = tl.where(inside, x, float("-inf"))
        a = x
        if spreads:
            t = TARGET(target_ptr, t_rows, c, inside, live, classes, ignore_index, t_step, ACC)[2]
            a = spread(t, keep, on, off, weight_ptr, c, exists, dense, True, ACC)
        others = tl.where(c[:, None] == label[None, :], float("-inf"), x)
        at = c[:, None] + tl.zeros(x.shape, tl.int32)
        state = absorb_row(x, others, a, at, state, spreads, entropy_ptr is not None, prediction_ptr is not None)
    z_true = tl.load(logits_ptr + z_rows + label.to(tl.int64) * z_step, mask=label >= 0, other=0.0).to(ACC)
    x_true = effective(z_true, scale, softcap, ACC)[0]
    x_true = tl.where(label >= 0, x_true, float("-inf"))
    store_outputs(
        loss_ptr, lse_ptr, prediction_ptr, entropy_ptr, stats_ptr, rows, live, state, x_true, label, keep, on,
        weight_ptr, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def row_outputs_backward(
    grad_ptr, stats_ptr, g_loss_ptr, g_lse_ptr, g_entropy_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, g_loss_strides, g_lse_strides, g_entropy_strides, logits_strides, target_strides,
    classes, ignore_index, smoothing, scale, softcap,
    TARGET: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows of a tile. Bytes: logits read once, gradient written once, dense targets read once."""
    outer, row, live, rows = row_tile(tl.program_id(0), sizes, ROWS)
    z_rows = row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    out_rows = grad_ptr + row_offsets(outer, row, sizes, grad_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    out_step = grad_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    first = (tl.arange(0, CLASSES) < classes)[:, None] & live[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, tl.arange(0, CLASSES), first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    m = tl.load(stats_ptr + rows * 4, mask=live, other=0.0)
    log_s = tl.load(stats_ptr + rows * 4 + 1, mask=live, other=0.0)
    total = tl.load(stats_ptr + rows * 4 + 2, mask=live, other=0.0)
    entropy = tl.load(stats_ptr + rows * 4 + 3, mask=live, other=0.0)
    g_loss = upstream(g_loss_ptr, outer, row, live, sizes, g_loss_strides, ACC)
    g_lse = upstream(g_lse_ptr, outer, row, live, sizes, g_lse_strides, ACC)
    g_entropy = upstream(g_entropy_ptr, outer, row, live, sizes, g_entropy_strides, ACC)
    wanted = (keep != 0.0) | (g_lse != 0.0) | (g_entropy != 0.0)
    z_true = tl.load(logits_ptr + z_rows + label.to(tl.int64) * z_step, mask=label >= 0, other=0.0).to(ACC)
    g_true = at_label(
        z_true, scale, softcap, m, log_s, total, entropy, g_loss, g_lse, g_entropy, label, on, off, weight_ptr,
        g_entropy_ptr is not None, ACC,
    )  # fmt: skip
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        exists = c < classes
        inside = exists[:, None] & live[None, :]
        steps = c.to(tl.int64)[:, None]
        z = load_tile(logits_ptr, z_rows[None, :] + steps * z_step, inside).to(ACC)
        x, slope = effective(z, scale, softcap, ACC)
        grad = by_logits(
            x, m[None, :], log_s[None, :], total[None, :], entropy[None, :],
            g_loss[None, :], g_lse[None, :], g_entropy[None, :], g_entropy_ptr is not None,
        )  # fmt: skip
        if g_loss_ptr is not None and (dense or smoothing is not None):
            t = TARGET(target_ptr, t_rows, c, inside, live, classes, ignore_index, t_step, ACC)[2]
            a = spread(t, keep, on, off, weight_ptr, c, exists, dense, False, ACC)
            if weight_ptr is not None:
                a = tl.where(keep[None, :] == 0.0, 0.0, a)  # an infinite weight's is NaN in ignored rows
            grad -= g_loss[None, :] * a
        grad = tl.where(c[:, None] == label[None, :], g_true[None, :], grad * slope)
        grad = tl.where(wanted[None, :], grad, 0.0)
        tl.store(out_rows[None, :] + steps * out_step, convert(grad, grad_ptr.dtype.element_ty), mask=inside)
