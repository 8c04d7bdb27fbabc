"""Several outputs of long rows whose classes are adjacent in memory: a row a program, read as in long_rows.py.

The maths are row_outputs.py's.
"""

import triton
import triton.language as tl

from .long_rows import join, long_output, long_row, long_spread, positions, share, span
from .row_outputs import absorb_row, at_label, by_logits, effective, fresh, moved, store_outputs, upstream
from .rows import convert, exponential, rounded_product, smoothing_terms


@triton.jit
def long_block(z, c, exists, true, LANES: tl.constexpr, VECTOR: tl.constexpr, scale, softcap, ACC: tl.constexpr):
    """Return x, x without the labelled class, and classes of a step of a long row, laid out lane by lane."""
    x = effective(z.to(ACC), scale, softcap, ACC)[0]
    x = tl.where(exists, x, float("-inf"))
    others = tl.where(c == true, float("-inf"), x)
    REPEATS: tl.constexpr = z.shape[0] // (LANES * VECTOR)
    shape: tl.constexpr = (REPEATS, LANES, VECTOR)
    return tl.reshape(x, shape), tl.reshape(others, shape), tl.reshape(c, shape)


@triton.jit(do_not_specialize=["ignore_index"])
def row_outputs_long_forward(
    loss_ptr, lse_ptr, prediction_ptr, entropy_ptr, stats_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, target_strides, classes, ignore_index, smoothing, scale, softcap,
    TARGET: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Outputs of a row a program. Bytes: logits and dense targets once, 16 a row saved."""
    EDGE: tl.constexpr = LANES * VECTOR
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    spreads: tl.constexpr = dense or smoothing is not None
    row, aligned, skip, t_rows, live, label, keep = long_row(
        target_ptr, sizes, logits_strides, target_strides, classes, 1, ignore_index, TARGET, ACC, VECTOR
    )
    z_row = logits_ptr + aligned
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    read = row >= 0
    if (lse_ptr is None and prediction_ptr is None) and entropy_ptr is None:  # Triton 3.3 knows no chains
        read = tl.max(keep, axis=0) != 0.0  # an ignored row is not
    begin, edge, stop = share(classes, skip, 1, read, CLASSES, EDGE)
    true = tl.max(label, axis=0)
    state = fresh(LANES, ACC)
    for part in range(3):
        low, high, end = span(part, begin, edge, stop, skip, true, CLASSES, EDGE)
        for start in range(low, high, CLASSES):
            c = start + tl.arange(0, CLASSES) - skip
            z = tl.load(z_row + start + tl.arange(0, CLASSES)).to(ACC)
            x = effective(z, scale, softcap, ACC)[0]
            x = tl.reshape(x, (CLASSES // EDGE, LANES, VECTOR))
            a = x
            if spreads:
                a = long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, c < classes, classes, ignore_index, on, off,
                    TARGET, True, ACC,
                )  # fmt: skip
                a = tl.reshape(a, (CLASSES // EDGE, LANES, VECTOR))
            at = tl.reshape(c, (CLASSES // EDGE, LANES, VECTOR))
            state = absorb_row(x, x, a, at, state, spreads, entropy_ptr is not None, prediction_ptr is not None)
        for start in range(high, end, EDGE):
            j, c, exists = positions(start, skip, end, EDGE)
            z = tl.load(z_row + j, mask=exists, other=0.0)
            x, others, at = long_block(z, c, exists, true, LANES, VECTOR, scale, softcap, ACC)
            a = x
            if spreads:
                a = long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, exists, classes, ignore_index, on, off,
                    TARGET, True, ACC,
                )  # fmt: skip
                a = tl.reshape(a, (1, LANES, VECTOR))
            state = absorb_row(x, others, a, at, state, spreads, entropy_ptr is not None, prediction_ptr is not None)
    m, s, total, dot, u, best, index = state
    row_m, row_s, total, dot = join(m[None, :], s[None, :], total[None, :], dot[None, :])
    delta = m - row_m
    u = tl.sum(rounded_product(moved(u, s, delta), exponential(delta)), axis=0) + tl.zeros((1,), ACC)
    index = tl.min(tl.where(best == tl.max(best, axis=0), index, 2147483647), axis=0) + tl.zeros((1,), tl.int32)
    z_true = tl.load(z_row + skip + label, mask=label >= 0, other=0.0).to(ACC)
    x_true = effective(z_true, scale, softcap, ACC)[0]
    x_true = tl.where(label >= 0, x_true, float("-inf"))
    state = row_m, row_s, total, dot, u, row_m, index
    store_outputs(
        loss_ptr, lse_ptr, prediction_ptr, entropy_ptr, stats_ptr, row + tl.arange(0, 1), live, state, x_true, label,
        keep, on, weight_ptr, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def row_outputs_long_backward(
    grad_ptr, stats_ptr, g_loss_ptr, g_lse_ptr, g_entropy_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, g_loss_strides, g_lse_strides, g_entropy_strides, logits_strides, target_strides,
    classes, ignore_index, smoothing, scale, softcap,
    TARGET: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of a row a program; grad_strides is None where as the logits'."""
    EDGE: tl.constexpr = LANES * VECTOR
    OUT: tl.constexpr = grad_ptr.dtype.element_ty
    ENTROPY: tl.constexpr = g_entropy_ptr is not None
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    spreads: tl.constexpr = g_loss_ptr is not None and (dense or smoothing is not None)
    row, aligned, skip, t_rows, live, label, keep = long_row(
        target_ptr, sizes, logits_strides, target_strides, classes, 1, ignore_index, TARGET, ACC, VECTOR
    )
    z_row = logits_ptr + aligned
    out_row = long_output(grad_ptr, row, aligned, skip, sizes, grad_strides)
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    inner = sizes[len(sizes) - 1]
    outer = row // inner
    one = (row % inner).to(tl.int64) + tl.zeros((1,), tl.int64)
    g_loss = upstream(g_loss_ptr, outer, one, live, sizes, g_loss_strides, ACC)
    g_lse = upstream(g_lse_ptr, outer, one, live, sizes, g_lse_strides, ACC)
    g_entropy = upstream(g_entropy_ptr, outer, one, live, sizes, g_entropy_strides, ACC)
    stats = stats_ptr + row * 4 + tl.arange(0, 1)
    m = tl.load(stats)
    log_s = tl.load(stats + 1)
    total = tl.load(stats + 2)
    entropy = tl.load(stats + 3)
    wanted = (keep != 0.0) | (g_lse != 0.0) | (g_entropy != 0.0)
    true = tl.max(label, axis=0)
    z_true = tl.load(z_row + skip + label, mask=label >= 0, other=0.0).to(ACC)
    g_true = at_label(
        z_true, scale, softcap, m, log_s, total, entropy, g_loss, g_lse, g_entropy, label, on, off, weight_ptr,
        ENTROPY, ACC,
    )  # fmt: skip
    begin, edge, stop = share(classes, skip, 1, row >= 0, CLASSES, EDGE)
    weighted = tl.where(tl.max(keep, axis=0) == 0.0, 0, classes)  # an ignored row's a is 0, also at infinite weights
    for part in range(3):
        low, high, end = span(part, begin, edge, stop, skip, true, CLASSES, EDGE)
        for start in range(low, high, CLASSES):
            z = tl.load(z_row + start + tl.arange(0, CLASSES)).to(ACC)
            x, slope = effective(z, scale, softcap, ACC)
            grad = by_logits(x, m, log_s, total, entropy, g_loss, g_lse, g_entropy, ENTROPY)
            if spreads:
                c = start + tl.arange(0, CLASSES) - skip
                grad -= g_loss * long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, c < weighted, classes, ignore_index, on, off,
                    TARGET, False, ACC,
                )  # fmt: skip
            tl.store(out_row + start + tl.arange(0, CLASSES), convert(tl.where(wanted, grad * slope, 0.0), OUT))
        for start in range(high, end, EDGE):
            j, c, exists = positions(start, skip, end, EDGE)
            z = tl.load(z_row + j, mask=exists, other=0.0).to(ACC)
            x, slope = effective(z, scale, softcap, ACC)
            grad = by_logits(x, m, log_s, total, entropy, g_loss, g_lse, g_entropy, ENTROPY)
            if spreads:
                grad -= g_loss * long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, exists & (c < weighted), classes,
                    ignore_index, on, off, TARGET, False, ACC,
                )  # fmt: skip
            grad = tl.where(c == true, g_true, grad * slope)
            tl.store(out_row + j, convert(tl.where(wanted, grad, 0.0), OUT), mask=exists)
