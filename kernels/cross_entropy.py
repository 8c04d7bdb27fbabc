"""Cross-entropy of logits against class indices or class probabilities, with weights and label smoothing.

a = w * ((1 - e) t + keep * e / C),  A = sum(a),  m = max z,  s = sum exp(z - m)
loss = A * log s - <a, z - m>,       d loss / d z = g * (A * softmax(z) - a)

m and log s are kept apart: their sum would lose digits when |z| is large. 0 * (-inf) in <a, z - m> is 0. The true
class stays out of s until the end: where it is the maximum, log s = log1p(the others), and confident rows keep all
their digits. TARGET is index_target or probability_target; weight, smoothing and outputs are None where not wanted.

Here a program takes several rows: those of few classes whole, those whose classes lie apart in memory a few classes at
a time. long_rows.py has the same three kernels for long rows.
"""

import triton
import triton.language as tl

from .rows import (
    absorb,
    class_weight,
    convert,
    expm1,
    exponential,
    index_target,
    load_tile,
    log1p,
    lowest,
    rounded_product,
    row_offsets,
    row_tile,
    smoothing_terms,
)


@triton.jit
def spread(t, keep, on, off, weight_ptr, c, exists, DENSE: tl.constexpr, SUMMED: tl.constexpr, ACC: tl.constexpr):
    """Return the block of a = w * ((1 - e) t + keep * e / C) without the labelled class's t; 0 outside the classes.

    SUMMED: the caller adds up a row's a, which may lie across lanes.
    """
    a = (keep * off)[None, :]
    if weight_ptr is None:
        a = tl.where(exists[:, None], a, 0.0)
    if DENSE:
        a += on * t
    if weight_ptr is not None:
        w = class_weight(weight_ptr, c, exists, ACC)[:, None]  # 0 outside the classes
        a = rounded_product(a, w) if SUMMED else a * w
    return a


@triton.jit
def row_weight(label, keep, weight_ptr, ACC: tl.constexpr):
    """Return each row's share of the mean's denominator."""
    w_true = class_weight(weight_ptr, label, label >= 0, ACC)
    return tl.where(label >= 0, w_true, tl.where(keep == 1.0, 1.0, 0.0))


@triton.jit
def mean_share(
    weights_ptr, weight, live, rows,
    DENSE: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, WEIGHT_PARTS: tl.constexpr,
):  # fmt: skip
    """Return what one row's gradient is multiplied by before anything is known of the other programs' losses.

    For a mean, 1 / denominator: the rows' number, or the weights' sum, in WEIGHT_PARTS parts from
    cross_entropy_weights or, in a lone program, its own.
    """
    if REDUCTION != "mean":
        denominator = tl.full((), 1.0, ACC)
    elif DENSE:
        denominator = rows.to(ACC)
    else:
        if weights_ptr is None:
            denominator = tl.sum(tl.where(live, weight, 0.0), axis=0)
        else:
            denominator = tl.sum(tl.load(weights_ptr + tl.arange(0, WEIGHT_PARTS)), axis=0).to(ACC)
        denominator = tl.where(denominator == 0.0, float("nan"), denominator)
    return 1.0 / denominator


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
def join_true(s, total, dot, z_true, a_true, keep, WEIGHTED: tl.constexpr):
    """Join the labelled class, z_true less m, to the others' s, sum a and <a, z - m>: the row's log s, A and loss."""
    e_true = exponential(z_true)
    log_s = tl.where(e_true == 1.0, log1p(s), tl.log(s + e_true))
    total = (total + a_true) * keep
    loss = row_loss(log_s, total, dot + tl.where(a_true == 0.0, 0.0, a_true * z_true), WEIGHTED)
    return log_s, total, tl.where(keep != 0.0, loss, 0.0)


@triton.jit
def close_rows(m, s, total, dot, z_true, label, keep, on, weight_ptr, ACC: tl.constexpr):
    """Join the labelled class, of logit z_true (-inf where there is none), to the others' m, s, sum a and <a, z - m>.

    Returns the whole row's m, log s, A, loss, and share of the mean's denominator.
    """
    labelled = label >= 0
    w_true = class_weight(weight_ptr, label, labelled, ACC)
    a_true = tl.where(labelled, on * w_true, 0.0)
    shift = tl.maximum(m, z_true)
    dot += tl.where(total == 0.0, 0.0, total * (m - shift))
    s = s * exponential(m - shift)
    log_s, total, loss = join_true(s, total, dot, z_true - shift, a_true, keep, weight_ptr is not None)
    return shift, log_s, total, loss, row_weight(label, keep, weight_ptr, ACC)


@triton.jit
def finish(loss_ptr, denominator_ptr, loss, weight):
    """Store the reduced loss; for the mean also its denominator, NaN where the weights sum to 0, as torch has it."""
    if denominator_ptr is not None:
        weight = tl.where(weight == 0.0, float("nan"), weight)
        loss = loss / weight
        tl.store(denominator_ptr, convert(weight, denominator_ptr.dtype.element_ty))
    tl.store(loss_ptr, convert(loss, loss_ptr.dtype.element_ty))


@triton.jit
def reduce_sums(loss_ptr, denominator_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """Add up (2, programs) partial sums in a fixed order, in float64: means of 10**6 rows stay exact."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < programs
        loss += tl.load(sums_ptr + i, mask=there, other=0.0, cache_modifier=".cg").to(tl.float64)
        weight += tl.load(sums_ptr + programs + i, mask=there, other=0.0, cache_modifier=".cg").to(tl.float64)
    finish(loss_ptr, denominator_ptr, tl.sum(loss, axis=0), tl.sum(weight, axis=0))


@triton.jit
def cross_entropy_reduce(loss_ptr, denominator_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """Reduce the loss in a second launch, of one program."""
    reduce_sums(loss_ptr, denominator_ptr, sums_ptr, programs, BLOCK)


@triton.jit
def store_rows(
    loss_ptr, stats_ptr, sums_ptr, ticket_ptr, denominator_ptr, number, live, shift, log_s, total, loss, weight,
    SAVED: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Store what a program knows of its rows: (m, log s[, A]) each, and their losses, or the losses' sum.

    Sums go to sums_ptr (2, programs), for a second launch to add up or, with a ticket, for the last program to get
    here; a lone program has no sums_ptr and is done.
    """
    if stats_ptr is not None:
        tl.store(stats_ptr + number * SAVED, shift, mask=live)
        tl.store(stats_ptr + number * SAVED + 1, log_s, mask=live)
        if SAVED == 3:
            tl.store(stats_ptr + number * SAVED + 2, total, mask=live)
    if REDUCTION == "none":
        tl.store(loss_ptr + number, convert(loss, loss_ptr.dtype.element_ty), mask=live)
    else:
        loss_sum = tl.sum(tl.where(live, loss, 0.0), axis=0)
        weight_sum = tl.sum(tl.where(live, weight, 0.0), axis=0)
        if sums_ptr is None:
            finish(loss_ptr, denominator_ptr, loss_sum, weight_sum)
        else:
            tl.store(sums_ptr + tl.program_id(0), loss_sum)
            tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)
            if ticket_ptr is not None:
                tl.debug_barrier()
                if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                    reduce_sums(loss_ptr, denominator_ptr, sums_ptr, tl.num_programs(0), 256)


@triton.jit
def true_gradient(z_true, shift, log_s, total, g, label, on, off, weight_ptr, ACC: tl.constexpr):
    """Return the labelled class's g * (A * (p - 1) + A - a), with p - 1 = expm1(log p) for its digits near p = 1.

    Where another class's weight makes A infinite, that is inf - inf, and A * p - a is right.
    """
    a_true = (on + off) * class_weight(weight_ptr, label, label >= 0, ACC)
    log_p = (z_true - shift) - log_s
    grad = total * expm1(log_p) + (total - a_true)
    if weight_ptr is not None:
        grad = tl.where(tl.abs(total) == float("inf"), total * exponential(log_p) - a_true, grad)
    return g * grad


@triton.jit
def tile_statistics(
    z_ptr, z_rows, z_step, target_ptr, t_rows, t_step, weight_ptr, label, keep, live, classes, ignore_index, on, off,
    SPREAD: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Return m, s, sum a and <a, z - m> of each row of a tile, without the labelled class in s and a."""
    m = lowest(ROWS, ACC)
    s = tl.zeros((ROWS,), ACC)
    total = tl.zeros((ROWS,), ACC)
    dot = tl.zeros((ROWS,), ACC)
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        exists = c < classes
        inside = exists[:, None] & live[None, :]
        z = load_tile(z_ptr, z_rows[None, :] + c.to(tl.int64)[:, None] * z_step, inside).to(ACC)
        a = z
        if SPREAD:
            t = TARGET(target_ptr, t_rows, c, inside, live, classes, ignore_index, t_step, ACC)[2]
            a = spread(t, keep, on, off, weight_ptr, c, exists, target_ptr.dtype.element_ty.is_floating(), True, ACC)
        others = tl.where(c[:, None] == label[None, :], float("-inf"), z)
        m, s, total, dot = absorb(z, others, a, m, s, total, dot, SPREAD)
    return m, s, total, dot


@triton.jit
def tile_gradient(
    grad_ptr, out_rows, out_step, z_ptr, z_rows, z_step, target_ptr, t_rows, t_step, weight_ptr,
    shift, log_s, total, g, label, keep, live, classes, ignore_index, on, off,
    SPREAD: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Write g * (A * exp(z - m - log s) - a) of each row of a tile."""
    z_true = tl.load(z_ptr + z_rows + label.to(tl.int64) * z_step, mask=label >= 0, other=0.0).to(ACC)
    g_true = true_gradient(z_true, shift, log_s, total, g, label, on, off, weight_ptr, ACC)
    scale = g * total * tl.exp(-log_s)
    tl.debug_barrier()  # the gradient may be written over the logits: every thread has z_true
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        exists = c < classes
        inside = exists[:, None] & live[None, :]
        steps = c.to(tl.int64)[:, None]
        z = load_tile(z_ptr, z_rows[None, :] + steps * z_step, inside).to(ACC)
        grad = scale[None, :] * exponential(z - shift[None, :])
        if SPREAD:
            t = TARGET(target_ptr, t_rows, c, inside, live, classes, ignore_index, t_step, ACC)[2]
            dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
            grad -= g[None, :] * spread(t, keep, on, off, weight_ptr, c, exists, dense, False, ACC)
        grad = tl.where(c[:, None] == label[None, :], g_true[None, :], grad)
        grad = tl.where(keep[None, :] == 0.0, 0.0, grad)
        tl.store(out_rows[None, :] + steps * out_step, convert(grad, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_forward(
    loss_ptr, stats_ptr, sums_ptr, denominator_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, target_strides, classes, ignore_index, smoothing,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss of each row (rows,) for "none", else their sum or mean; saves (m, log s[, A]) of each, A unless it is keep.

    Bytes: logits and dense targets once, 8 or 12 a row saved.
    """
    outer, row, live, number = row_tile(tl.program_id(0), sizes, ROWS)
    z_rows = row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    first = (tl.arange(0, CLASSES) < classes)[:, None] & live[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, tl.arange(0, CLASSES), first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()  # else t is the label alone
    m, s, total, dot = tile_statistics(
        logits_ptr, z_rows, z_step, target_ptr, t_rows, t_step, weight_ptr, label, keep, live, classes, ignore_index,
        on, off, dense or smoothing is not None, TARGET, ACC, ROWS, CLASSES,
    )  # fmt: skip
    z_true = tl.load(logits_ptr + z_rows + label.to(tl.int64) * z_step, mask=label >= 0, other=float("-inf")).to(ACC)
    shift, log_s, total, loss, weight = close_rows(m, s, total, dot, z_true, label, keep, on, weight_ptr, ACC)
    store_rows(
        loss_ptr, stats_ptr, sums_ptr, None, denominator_ptr, number, live, shift, log_s, total, loss, weight,
        3 if dense or weight_ptr is not None else 2, REDUCTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_statistics(
    parts_ptr, logits_ptr, target_ptr, weight_ptr, sizes, logits_strides, target_strides, classes, rows, ignore_index,
    smoothing, TARGET: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """m, s, sum a and <a, z - m> of each row of a slice of the classes, (4, rows), without the labelled class.

    Bytes: logits and dense targets once, 8 or 16 a row.
    """
    outer, row, live, number = row_tile(tl.program_id(0), sizes, ROWS)
    z_rows = row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    first = (tl.arange(0, CLASSES) < classes)[:, None] & live[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, tl.arange(0, CLASSES), first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    spreads: tl.constexpr = dense or smoothing is not None
    m, s, total, dot = tile_statistics(
        logits_ptr, z_rows, logits_strides[len(sizes)], target_ptr, t_rows, t_step, weight_ptr, label, keep, live,
        classes, ignore_index, on, off, spreads, TARGET, ACC, ROWS, CLASSES,
    )  # fmt: skip
    place = parts_ptr + number
    tl.store(place, m, mask=live)
    tl.store(place + rows, s, mask=live)
    if spreads:
        tl.store(place + 2 * rows, total, mask=live)
        tl.store(place + 3 * rows, dot, mask=live)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_backward(
    grad_ptr, stats_ptr, upstream_ptr, denominator_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, upstream_strides, logits_strides, target_strides, classes, ignore_index, smoothing,
    GIVEN: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from the saved row statistics: g * (A * exp(z - m - log s) - a).

    GIVEN: grad_ptr holds the gradient for an upstream gradient of 1 already; rows where it is 1 are left as they are.
    Bytes: logits read once, gradient written once, dense targets read once, 8 or 12 a row of statistics.
    """
    outer, row, live, number = row_tile(tl.program_id(0), sizes, ROWS)
    g = tl.load(upstream_ptr + row_offsets(outer, row, sizes, upstream_strides), mask=live, other=0.0).to(ACC)
    if GIVEN:
        live &= g != 1.0
    z_rows = row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    out_rows = grad_ptr + row_offsets(outer, row, sizes, grad_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    first = (tl.arange(0, CLASSES) < classes)[:, None] & live[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, tl.arange(0, CLASSES), first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    saved: tl.constexpr = 3 if dense or weight_ptr is not None else 2
    shift = tl.load(stats_ptr + number * saved, mask=live, other=0.0)
    log_s = tl.load(stats_ptr + number * saved + 1, mask=live, other=0.0)
    total = keep
    if saved == 3:
        total = tl.load(stats_ptr + number * saved + 2, mask=live, other=0.0)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr)
    tile_gradient(
        grad_ptr, out_rows, grad_strides[len(sizes)], logits_ptr, z_rows, z_step, target_ptr, t_rows, t_step,
        weight_ptr, shift, log_s, total, g, label, keep, live, classes, ignore_index, on, off,
        dense or smoothing is not None, TARGET, ACC, CLASSES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_weights(
    weights_ptr, ticket_ptr, target_ptr, weight_ptr, sizes, target_strides, classes, ignore_index,
    ACC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of the true classes' weights over every num_programs-th tile of rows: parts of a mean's denominator."""
    tiles = tl.cdiv(sizes[len(sizes) - 1], ROWS)
    for i in tl.static_range(len(sizes) - 1):
        tiles *= sizes[i]
    weights = tl.zeros((ROWS,), tl.float64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        outer, row, live, _ = row_tile(tile, sizes, ROWS)
        rows = row_offsets(outer, row, sizes, target_strides)
        label, keep, _ = index_target(target_ptr, rows, rows, live, live, classes, ignore_index, 0, ACC)
        weights += tl.where(live, row_weight(label, keep, weight_ptr, ACC), 0.0).to(tl.float64)
    tl.store(weights_ptr + tl.program_id(0), tl.sum(weights, axis=0))
    if tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_both(
    loss_ptr, grad_ptr, stats_ptr, sums_ptr, ticket_ptr, weights_ptr, denominator_ptr,
    logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, logits_strides, target_strides, classes, ignore_index, smoothing, rows,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, WEIGHT_PARTS: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss as cross_entropy_forward, and the gradient for an upstream gradient of 1, in one launch.

    Bytes: logits read once, the second time from a cache; gradient written once; dense targets likewise.
    """
    outer, row, live, number = row_tile(tl.program_id(0), sizes, ROWS)
    z_rows = row_offsets(outer, row, sizes, logits_strides)
    t_rows = row_offsets(outer, row, sizes, target_strides)
    out_rows = grad_ptr + row_offsets(outer, row, sizes, grad_strides)
    z_step = logits_strides[len(sizes)]
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    first = (tl.arange(0, CLASSES) < classes)[:, None] & live[None, :]
    label, keep, _ = TARGET(target_ptr, t_rows, tl.arange(0, CLASSES), first, live, classes, ignore_index, t_step, ACC)
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    m, s, total, dot = tile_statistics(
        logits_ptr, z_rows, z_step, target_ptr, t_rows, t_step, weight_ptr, label, keep, live, classes, ignore_index,
        on, off, dense or smoothing is not None, TARGET, ACC, ROWS, CLASSES,
    )  # fmt: skip
    z_true = tl.load(logits_ptr + z_rows + label.to(tl.int64) * z_step, mask=label >= 0, other=float("-inf")).to(ACC)
    shift, log_s, total, loss, weight = close_rows(m, s, total, dot, z_true, label, keep, on, weight_ptr, ACC)
    g = mean_share(weights_ptr, weight, live, rows, dense, REDUCTION, ACC, WEIGHT_PARTS)
    tile_gradient(
        grad_ptr, out_rows, grad_strides[len(sizes)], logits_ptr, z_rows, z_step, target_ptr, t_rows, t_step,
        weight_ptr, shift, log_s, total, g + tl.zeros((ROWS,), ACC), label, keep, live, classes, ignore_index, on, off,
        dense or smoothing is not None, TARGET, ACC, CLASSES,
    )  # fmt: skip
    store_rows(
        loss_ptr, stats_ptr, sums_ptr, ticket_ptr, denominator_ptr, number, live, shift, log_s, total, loss, weight,
        3 if dense or weight_ptr is not None else 2, REDUCTION,
    )  # fmt: skip
