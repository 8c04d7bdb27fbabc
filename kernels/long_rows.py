"""Cross-entropy of long rows whose classes are adjacent in memory: the same maths, one row or a part of it a program.

A row is read in blocks of CLASSES from the 16-byte boundary at or before its first element: position j holds class
j - skip. Full blocks go through a loop without masks, every thread keeping m and s of its own share of the row, joined
once at the end. The ends of the row and the labelled class's neighbourhood go through a second loop, with masks, EDGE
classes a step: no other element is compared with anything.
"""

import triton
import triton.language as tl

from .cross_entropy import close_rows, mean_share, spread, store_rows, true_gradient
from .rows import absorb, convert, exponential, lowest, rounded_product, row_offsets, smoothing_terms


@triton.jit
def long_row(
    target_ptr, sizes, logits_strides, target_strides, classes, parts, ignore_index,
    TARGET: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the program's row: its number, where its reading starts, how many elements before the row that is; target.

    The target's offset, label and keep, and `live`, are vectors of one row, as in a tile.
    """
    number = tl.program_id(0) // parts
    inner = sizes[len(sizes) - 1]
    outer = number // inner
    row = (number % inner).to(tl.int64)
    offset = row_offsets(outer, row, sizes, logits_strides)
    aligned = offset // VECTOR * VECTOR
    t_rows = row_offsets(outer, row, sizes, target_strides) + tl.zeros((1,), tl.int64)
    t_step = target_strides[len(sizes)]
    live = tl.full((1,), True, tl.int1)
    first = tl.arange(0, 1)
    label, keep, _ = TARGET(target_ptr, t_rows, first, live[None, :], live, classes, ignore_index, t_step, ACC)
    return number, aligned, (offset - aligned).to(tl.int32), t_rows, live, label, keep


@triton.jit
def long_output(grad_ptr, number, aligned, skip, sizes, grad_strides):
    """Return where the gradient of position 0 goes; grad_strides is None where they are the logits'."""
    if grad_strides is None:
        out_row = grad_ptr + aligned
    else:
        inner = sizes[len(sizes) - 1]
        out_row = grad_ptr + row_offsets(number // inner, (number % inner).to(tl.int64), sizes, grad_strides) - skip
    return out_row


@triton.jit
def long_spread(
    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, exists, classes, ignore_index, on, off,
    TARGET: tl.constexpr, SUMMED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return a at the classes c of one row, without the labelled class's t."""
    t = TARGET(target_ptr, t_rows, c, exists[:, None], live, classes, ignore_index, t_step, ACC)[2]
    a = spread(t, keep, on, off, weight_ptr, c, exists, target_ptr.dtype.element_ty.is_floating(), SUMMED, ACC)
    return tl.reshape(a, c.shape)


@triton.jit
def share(classes, skip, parts, wanted, CLASSES: tl.constexpr, EDGE: tl.constexpr):
    """Return where this program's positions begin, where the row's masked end begins, and where they stop."""
    length = classes + skip
    size = tl.cdiv(tl.cdiv(length, CLASSES), parts) * CLASSES
    begin = (tl.program_id(0) % parts) * size
    stop = tl.where(wanted, tl.minimum(begin + size, length), begin)
    return begin, tl.maximum(stop // EDGE * EDGE, begin), stop


@triton.jit
def span(part, begin, edge, stop, skip, true, CLASSES: tl.constexpr, EDGE: tl.constexpr):
    """Return the bounds of one of three parts: full blocks from low to high, masked ones from high to end.

    The first part is the beginning of a row that is not aligned, masked; the second ends with the block of the labelled
    class, if one is before the edge; the third with the row.
    """
    first = tl.where((skip > 0) & (begin < edge) & (begin == 0), EDGE, begin)
    position = true + skip
    block = position // EDGE * EDGE
    found = (true >= 0) & (position >= first) & (position < edge)
    last = tl.where(found, block + EDGE, edge)
    low = tl.where(part == 2, last, tl.where(part == 1, first, begin))
    high = tl.where(part == 2, edge, tl.where(part == 1, tl.where(found, block, edge), begin))
    end = tl.where(part == 2, tl.where(found, stop, low), tl.where(part == 1, tl.where(found, last, stop), first))
    return low, low + (high - low) // CLASSES * CLASSES, end


@triton.jit
def positions(start, skip, end, EDGE: tl.constexpr):
    """Return EDGE positions from start on, their classes, and which of them exist."""
    j = start + tl.arange(0, EDGE)
    return j, j - skip, (j >= skip) & (j < end)


@triton.jit
def join(m, s, total, dot):
    """Bring m, s, sum a and <a, z - m> of the parts of rows together, all (rows, parts)."""
    row_m = tl.max(m, axis=1)
    delta = m - row_m[:, None]
    s = tl.sum(rounded_product(s, exponential(delta)), axis=1)
    dot = tl.sum(dot + tl.where(total == 0.0, 0.0, total * delta), axis=1)
    return row_m, s, tl.sum(total, axis=1), dot


@triton.jit
def long_statistics(
    z_row, skip, target_ptr, t_rows, t_step, weight_ptr, label, keep, live, classes, begin, edge, stop,
    ignore_index, on, off,
    SPREAD: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Return m, s, sum a and <a, z - m> of the program's share of its row, without the labelled class."""
    EDGE: tl.constexpr = LANES * VECTOR
    REPEATS: tl.constexpr = CLASSES // EDGE
    m = lowest(LANES, ACC)
    s = tl.zeros((LANES,), ACC)
    total = tl.zeros((LANES,), ACC)
    dot = tl.zeros((LANES,), ACC)
    true = tl.max(label, axis=0)
    for part in range(3):
        low, high, end = span(part, begin, edge, stop, skip, true, CLASSES, EDGE)
        for start in range(low, high, CLASSES):
            z = tl.load(z_row + start + tl.arange(0, CLASSES)).to(ACC)
            z = tl.reshape(z, (REPEATS, LANES, VECTOR))
            a = z
            if SPREAD:
                c = start + tl.arange(0, CLASSES) - skip
                a = long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, c < classes, classes, ignore_index, on, off,
                    TARGET, True, ACC,
                )  # fmt: skip
                a = tl.reshape(a, (REPEATS, LANES, VECTOR))
            m, s, total, dot = absorb(z, z, a, m, s, total, dot, SPREAD)
        for start in range(high, end, EDGE):
            j, c, exists = positions(start, skip, end, EDGE)
            z = tl.load(z_row + j, mask=exists, other=float("-inf")).to(ACC)
            others = tl.reshape(tl.where(c == true, float("-inf"), z), (1, LANES, VECTOR))
            a = z
            if SPREAD:
                a = long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, exists, classes, ignore_index, on, off,
                    TARGET, True, ACC,
                )  # fmt: skip
                a = tl.reshape(a, (1, LANES, VECTOR))
            m, s, total, dot = absorb(tl.reshape(z, (1, LANES, VECTOR)), others, a, m, s, total, dot, SPREAD)
    return join(m[None, :], s[None, :], total[None, :], dot[None, :])


@triton.jit
def long_gradient(
    grad_ptr, out_row, z_row, skip, target_ptr, t_rows, t_step, weight_ptr,
    shift, log_s, total, g, label, keep, live, wanted, classes, begin, edge, stop, ignore_index, on, off,
    SPREAD: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Write g * (A * exp(z - m - log s) - a) of the program's share of its row; zeros, unread, where it is ignored."""
    EDGE: tl.constexpr = LANES * VECTOR
    OUT: tl.constexpr = grad_ptr.dtype.element_ty
    true = tl.max(label, axis=0)
    position = skip + label
    here = (label >= 0) & ((position >= begin) & (position < stop))  # in place, another program may be writing there
    z_true = tl.load(z_row + position, mask=here, other=0.0).to(ACC)
    g_true = true_gradient(z_true, shift, log_s, total, g, label, on, off, weight_ptr, ACC)
    scale = g * total * tl.exp(-log_s)
    tl.debug_barrier()  # the gradient may be written over the logits: every thread has z_true
    read = wanted & (tl.max(keep, axis=0) != 0.0)
    fill = wanted & (tl.max(keep, axis=0) == 0.0)
    read_stop = tl.where(read, stop, begin)
    read_edge = tl.where(read, edge, begin)
    for part in range(3):
        low, high, end = span(part, begin, read_edge, read_stop, skip, true, CLASSES, EDGE)
        for start in range(low, high, CLASSES):
            z = tl.load(z_row + start + tl.arange(0, CLASSES)).to(ACC)
            grad = scale * exponential(z - shift)
            if SPREAD:
                c = start + tl.arange(0, CLASSES) - skip
                grad -= g * long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, c < classes, classes, ignore_index, on, off,
                    TARGET, False, ACC,
                )  # fmt: skip
            tl.store(out_row + start + tl.arange(0, CLASSES), convert(grad, OUT))
        for start in range(high, end, EDGE):
            j, c, exists = positions(start, skip, end, EDGE)
            z = tl.load(z_row + j, mask=exists, other=float("-inf")).to(ACC)
            grad = scale * exponential(z - shift)
            if SPREAD:
                grad -= g * long_spread(
                    target_ptr, t_rows, t_step, weight_ptr, keep, live, c, exists, classes, ignore_index, on, off,
                    TARGET, False, ACC,
                )  # fmt: skip
            grad = tl.where(c == true, g_true, grad)
            tl.store(out_row + j, convert(grad, OUT), mask=exists)
    fill_stop = tl.where(fill, stop, begin)
    fill_edge = tl.where(fill, edge, begin)
    for part in range(3):
        low, high, end = span(part, begin, fill_edge, fill_stop, skip, true, CLASSES, EDGE)
        for start in range(low, high, CLASSES):
            tl.store(out_row + start + tl.arange(0, CLASSES), tl.zeros((CLASSES,), OUT))
        for start in range(high, end, EDGE):
            j, _, exists = positions(start, skip, end, EDGE)
            tl.store(out_row + j, tl.zeros((EDGE,), OUT), mask=exists)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_long_forward(
    loss_ptr, stats_ptr, sums_ptr, denominator_ptr, parts_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, target_strides, classes, parts, ignore_index, smoothing,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Loss as cross_entropy_forward, a row a program, or m, s, sum a and <a, z - m> of a part of a row.

    parts_ptr is (4, rows, parts), or None where rows are not split.
    Bytes: logits and dense targets once, 8 or 12 a row saved.
    """
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    spreads: tl.constexpr = dense or smoothing is not None
    number, aligned, skip, t_rows, live, label, keep = long_row(
        target_ptr, sizes, logits_strides, target_strides, classes, parts, ignore_index, TARGET, ACC, VECTOR
    )
    z_row = logits_ptr + aligned
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    read = tl.max(keep, axis=0) != 0.0  # an ignored row is not
    begin, edge, stop = share(classes, skip, parts, read, CLASSES, LANES * VECTOR)
    m, s, total, dot = long_statistics(
        z_row, skip, target_ptr, t_rows, t_step, weight_ptr, label, keep, live, classes, begin, edge, stop,
        ignore_index, on, off, spreads, TARGET, ACC, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    if parts_ptr is None:
        z_true = tl.load(z_row + skip + label, mask=label >= 0, other=float("-inf")).to(ACC)
        shift, log_s, total, loss, weight = close_rows(m, s, total, dot, z_true, label, keep, on, weight_ptr, ACC)
        store_rows(
            loss_ptr, stats_ptr, sums_ptr, None, denominator_ptr, number + tl.arange(0, 1), live,
            shift, log_s, total, loss, weight, 3 if dense or weight_ptr is not None else 2, REDUCTION,
        )  # fmt: skip
    else:
        place = parts_ptr + tl.program_id(0) + tl.arange(0, 1)
        tl.store(place, m)
        tl.store(place + tl.num_programs(0), s)
        if spreads:
            tl.store(place + 2 * tl.num_programs(0), total)
            tl.store(place + 3 * tl.num_programs(0), dot)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_combine(
    loss_ptr, stats_ptr, denominator_ptr, parts_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, logits_strides, target_strides, classes, parts, ignore_index, smoothing,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Join the parts of rows that cross_entropy_long_forward split, all in one program, and reduce the loss."""
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    inner = sizes[len(sizes) - 1]
    rows = inner
    for i in tl.static_range(len(sizes) - 1):
        rows *= sizes[i]
    number = tl.arange(0, ROWS).to(tl.int64)
    live = number < rows
    t_rows = row_offsets(number // inner, number % inner, sizes, target_strides)
    t_step = target_strides[len(sizes)]
    on, _ = smoothing_terms(smoothing, classes, ACC)
    label, keep, _ = TARGET(
        target_ptr, t_rows, tl.arange(0, 1), live[None, :], live, classes, ignore_index, t_step, ACC
    )
    part = tl.arange(0, PARTS)
    there = live[:, None] & (part < parts)[None, :]
    place = parts_ptr + number[:, None] * parts + part[None, :]
    m = tl.where(there, tl.load(place, mask=there, other=0.0), lowest(1, ACC))
    s = tl.load(place + rows * parts, mask=there, other=0.0)
    total = tl.zeros((ROWS, PARTS), ACC)
    dot = tl.zeros((ROWS, PARTS), ACC)
    if dense or smoothing is not None:
        total = tl.load(place + 2 * rows * parts, mask=there, other=0.0)
        dot = tl.load(place + 3 * rows * parts, mask=there, other=0.0)
    m, s, total, dot = join(m, s, total, dot)
    z_rows = logits_ptr + row_offsets(number // inner, number % inner, sizes, logits_strides)
    z_true = tl.load(z_rows + label.to(tl.int64) * logits_strides[len(sizes)], mask=label >= 0, other=float("-inf")).to(
        ACC
    )
    shift, log_s, total, loss, weight = close_rows(m, s, total, dot, z_true, label, keep, on, weight_ptr, ACC)
    store_rows(
        loss_ptr, stats_ptr, None, None, denominator_ptr, number, live, shift, log_s, total, loss, weight,
        3 if dense or weight_ptr is not None else 2, REDUCTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_long_backward(
    grad_ptr, stats_ptr, upstream_ptr, denominator_ptr, logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, upstream_strides, logits_strides, target_strides, classes, parts, ignore_index, smoothing,
    GIVEN: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient as cross_entropy_backward, a row or a part of it a program; grad_strides is None where as the logits'.

    Bytes: logits read once, gradient written once, dense targets read once, 8 or 12 a row of statistics.
    """
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    saved: tl.constexpr = 3 if dense or weight_ptr is not None else 2
    number, aligned, skip, t_rows, live, label, keep = long_row(
        target_ptr, sizes, logits_strides, target_strides, classes, parts, ignore_index, TARGET, ACC, VECTOR
    )
    out_row = long_output(grad_ptr, number, aligned, skip, sizes, grad_strides)
    on, off = smoothing_terms(smoothing, classes, ACC)
    inner = sizes[len(sizes) - 1]
    upstream_ptr += row_offsets(number // inner, (number % inner).to(tl.int64), sizes, upstream_strides)
    upstream = tl.load(upstream_ptr).to(ACC)
    wanted = number >= 0
    if GIVEN:
        wanted = upstream != 1.0
    if denominator_ptr is not None:
        upstream = upstream / tl.load(denominator_ptr)
    row_stats = stats_ptr + number * saved + tl.arange(0, 1)
    shift = tl.load(row_stats)
    log_s = tl.load(row_stats + 1)
    total = keep
    if saved == 3:
        total = tl.load(row_stats + 2)
    begin, edge, stop = share(classes, skip, parts, number >= 0, CLASSES, LANES * VECTOR)
    long_gradient(
        grad_ptr, out_row, logits_ptr + aligned, skip, target_ptr, t_rows, target_strides[len(sizes)], weight_ptr,
        shift, log_s, total, upstream, label, keep, live, wanted, classes, begin, edge, stop, ignore_index, on, off,
        dense or smoothing is not None, TARGET, ACC, CLASSES, LANES, VECTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_long_both(
    loss_ptr, grad_ptr, stats_ptr, sums_ptr, ticket_ptr, weights_ptr, denominator_ptr,
    logits_ptr, target_ptr, weight_ptr,
    sizes, grad_strides, logits_strides, target_strides, classes, ignore_index, smoothing, rows,
    TARGET: tl.constexpr, REDUCTION: tl.constexpr, ACC: tl.constexpr, WEIGHT_PARTS: tl.constexpr,
    CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Loss and gradient as cross_entropy_both, a row a program.

    Bytes: logits and dense targets read once from memory, then from the L2 cache; gradient written once.
    """
    dense: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    spreads: tl.constexpr = dense or smoothing is not None
    number, aligned, skip, t_rows, live, label, keep = long_row(
        target_ptr, sizes, logits_strides, target_strides, classes, 1, ignore_index, TARGET, ACC, VECTOR
    )
    z_row = logits_ptr + aligned
    out_row = long_output(grad_ptr, number, aligned, skip, sizes, grad_strides)
    t_step = target_strides[len(sizes)]
    on, off = smoothing_terms(smoothing, classes, ACC)
    read = tl.max(keep, axis=0) != 0.0  # an ignored row is not
    begin, edge, stop = share(classes, skip, 1, read, CLASSES, LANES * VECTOR)
    m, s, total, dot = long_statistics(
        z_row, skip, target_ptr, t_rows, t_step, weight_ptr, label, keep, live, classes, begin, edge, stop,
        ignore_index, on, off, spreads, TARGET, ACC, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    z_true = tl.load(z_row + skip + label, mask=label >= 0, other=float("-inf")).to(ACC)
    shift, log_s, total, loss, weight = close_rows(m, s, total, dot, z_true, label, keep, on, weight_ptr, ACC)
    g = mean_share(weights_ptr, weight, live, rows, dense, REDUCTION, ACC, WEIGHT_PARTS)
    begin, edge, stop = share(classes, skip, 1, number >= 0, CLASSES, LANES * VECTOR)
    long_gradient(
        grad_ptr, out_row, z_row, skip, target_ptr, t_rows, t_step, weight_ptr,
        shift, log_s, total, g + tl.zeros((1,), ACC), label, keep, live, number >= 0, classes, begin, edge, stop,
        ignore_index, on, off, spreads, TARGET, ACC, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    store_rows(
        loss_ptr, stats_ptr, sums_ptr, ticket_ptr, denominator_ptr, number + tl.arange(0, 1), live,
        shift, log_s, total, loss, weight, 3 if dense or weight_ptr is not None else 2, REDUCTION,
    )  # fmt: skip
