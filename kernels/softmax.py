"""Softmax and its logarithm along one dimension, forward and backward from the output.

m = max z,  s = sum exp(z - m),  softmax = exp(z - m) / s,  log softmax = (z - m) - log s
backward: y * (g - <g, y>) from y = softmax;  g - exp(y) * sum(g) from y = log softmax

Rows lie as in cross_entropy.py, several a program, or as in long_rows.py, one a program. Outputs and gradients may have
another type than the input.
"""

import triton
import triton.language as tl

from .long_rows import positions
from .rows import absorb, convert, exponential, lane_sum, load_tile, lowest, rounded_product, row_offsets, row_tile


@triton.jit
def stream(z, m, s):
    """Add a block to the running maximum m and s, lane by lane."""
    m, s, _, _ = absorb(z, z, z, m, s, m, m, False)
    return m, s


@triton.jit
def normaliser(s, LOG: tl.constexpr):
    """Return log s or 1 / s."""
    if LOG:
        x = tl.log(s)
    else:
        x = 1.0 / s
    return x


@triton.jit
def normalised(z, m, norm, LOG: tl.constexpr):
    """Return the (log) softmax of a block, from its rows' m and normaliser."""
    if LOG:
        y = (z - m) - norm
    else:
        y = exponential(z - m) * norm
    return y


@triton.jit
def inner_product(y, g, LOG: tl.constexpr):
    """Return what a block adds to its rows' <g, y>, or to sum(g) for the logarithm, lane by lane."""
    if LOG:
        x = lane_sum(g)
    else:
        x = lane_sum(g * y)
    return x


@triton.jit
def tile_product(y, g, start, live, classes, LOG: tl.constexpr):
    """Return inner_product of the classes from `start` on of a tile's rows.

    A row may lie across lanes here. Products are replaced outside the tile, not factors: the selection keeps the
    compiler from fusing a product into the lanes' sum, see rounded_product.
    """
    inside = (start + tl.arange(0, y.shape[0]) < classes)[:, None] & live[None, :]
    if LOG:
        x = g
    else:
        x = g * y
    return lane_sum(tl.where(inside, x, 0.0))


@triton.jit
def input_gradient(y, g, dot, LOG: tl.constexpr):
    """Return the gradient of a block of the input."""
    if LOG:
        x = g - exponential(y) * dot
    else:
        x = y * (g - dot)
    return x


@triton.jit
def tile_block(ptr, rows, step, start, live, classes, CLASSES: tl.constexpr, ACC: tl.constexpr):
    """Load the classes from `start` on of a tile's rows, -inf outside."""
    c = start + tl.arange(0, CLASSES)
    inside = (c < classes)[:, None] & live[None, :]
    return load_tile(ptr, rows[None, :] + c.to(tl.int64)[:, None] * step, inside).to(ACC)


@triton.jit
def store_tile(ptr, rows, step, start, live, classes, x, CLASSES: tl.constexpr):
    """Store a block of a tile's rows."""
    c = start + tl.arange(0, CLASSES)
    inside = (c < classes)[:, None] & live[None, :]
    tl.store(ptr + (rows[None, :] + c.to(tl.int64)[:, None] * step), convert(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_forward(
    out_ptr, input_ptr, sizes, out_strides, input_strides, classes,
    LOG: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(Log) softmax of the rows of a tile, all their classes at once where WHOLE.

    Bytes: input read once, a second time from a cache unless WHOLE; output written once.
    """
    outer, row, live, _ = row_tile(tl.program_id(0), sizes, ROWS)
    z_rows = row_offsets(outer, row, sizes, input_strides)
    out_rows = row_offsets(outer, row, sizes, out_strides)
    z_step = input_strides[len(sizes)]
    out_step = out_strides[len(sizes)]
    m = lowest(ROWS, ACC)
    s = tl.zeros((ROWS,), ACC)
    if WHOLE:
        z = tile_block(input_ptr, z_rows, z_step, 0, live, classes, CLASSES, ACC)
        m, s = stream(z, m, s)
        x = normalised(z, m[None, :], normaliser(s, LOG)[None, :], LOG)
        store_tile(out_ptr, out_rows, out_step, 0, live, classes, x, CLASSES)
    else:
        for start in range(0, classes, CLASSES):
            z = tile_block(input_ptr, z_rows, z_step, start, live, classes, CLASSES, ACC)
            m, s = stream(z, m, s)
        norm = normaliser(s, LOG)
        for start in range(0, classes, CLASSES):
            z = tile_block(input_ptr, z_rows, z_step, start, live, classes, CLASSES, ACC)
            x = normalised(z, m[None, :], norm[None, :], LOG)
            store_tile(out_ptr, out_rows, out_step, start, live, classes, x, CLASSES)


@triton.jit
def softmax_backward(
    grad_ptr, upstream_ptr, out_ptr, sizes, grad_strides, upstream_strides, out_strides, classes,
    LOG: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, of the rows of a tile.

    Bytes: output and upstream gradient read once, a second time from a cache unless WHOLE; gradient written once.
    """
    outer, row, live, _ = row_tile(tl.program_id(0), sizes, ROWS)
    y_rows = row_offsets(outer, row, sizes, out_strides)
    g_rows = row_offsets(outer, row, sizes, upstream_strides)
    x_rows = row_offsets(outer, row, sizes, grad_strides)
    y_step = out_strides[len(sizes)]
    g_step = upstream_strides[len(sizes)]
    x_step = grad_strides[len(sizes)]
    if WHOLE:
        y = tile_block(out_ptr, y_rows, y_step, 0, live, classes, CLASSES, ACC)
        g = tile_block(upstream_ptr, g_rows, g_step, 0, live, classes, CLASSES, ACC)
        dot = tile_product(y, g, 0, live, classes, LOG)
        store_tile(grad_ptr, x_rows, x_step, 0, live, classes, input_gradient(y, g, dot[None, :], LOG), CLASSES)
    else:
        dot = tl.zeros((ROWS,), ACC)
        for start in range(0, classes, CLASSES):
            y = tile_block(out_ptr, y_rows, y_step, start, live, classes, CLASSES, ACC)
            g = tile_block(upstream_ptr, g_rows, g_step, start, live, classes, CLASSES, ACC)
            dot += tile_product(y, g, start, live, classes, LOG)
        for start in range(0, classes, CLASSES):
            y = tile_block(out_ptr, y_rows, y_step, start, live, classes, CLASSES, ACC)
            g = tile_block(upstream_ptr, g_rows, g_step, start, live, classes, CLASSES, ACC)
            store_tile(grad_ptr, x_rows, x_step, start, live, classes, input_gradient(y, g, dot[None, :], LOG), CLASSES)


@triton.jit
def long_offset(sizes, strides):
    """Return the offset of the program's row."""
    number = tl.program_id(0)
    inner = sizes[len(sizes) - 1]
    return row_offsets(number // inner, (number % inner).to(tl.int64), sizes, strides)


@triton.jit
def long_span(classes, skip, CLASSES: tl.constexpr, EDGE: tl.constexpr):
    """Return where full blocks begin and end, where the first masked step would be among them, and where the row stops.

    The row's beginning, where it is not aligned, counts as the masked step before the last full block.
    """
    stop = classes + skip
    edge = stop // EDGE * EDGE
    first = tl.where((skip > 0) & (edge > 0), EDGE, 0)
    high = first + (edge - first) // CLASSES * CLASSES
    return first, high, high - first, stop


@triton.jit
def masked(start, high, skip, stop, EDGE: tl.constexpr):
    """Return the positions of a masked step and which of them exist."""
    j, _, exists = positions(tl.where(start < high, 0, start), skip, stop, EDGE)
    return j, exists


@triton.jit
def softmax_long_forward(
    out_ptr, input_ptr, sizes, out_strides, input_strides, classes,
    LOG: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(Log) softmax of a row a program; out_strides is None where they are the input's.

    Bytes: input read once from memory, then from a cache; output written once.
    """
    EDGE: tl.constexpr = LANES * VECTOR
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    offset = long_offset(sizes, input_strides)
    aligned = offset // VECTOR * VECTOR
    skip = (offset - aligned).to(tl.int32)
    z_row = input_ptr + aligned
    out_row = out_ptr + aligned
    if out_strides is not None:
        out_row = out_ptr + long_offset(sizes, out_strides) - skip
    first, high, ends, stop = long_span(classes, skip, CLASSES, EDGE)
    m = lowest(LANES, ACC)
    s = tl.zeros((LANES,), ACC)
    for start in range(first, high, CLASSES):
        z = tl.load(z_row + start + tl.arange(0, CLASSES)).to(ACC)
        m, s = stream(tl.reshape(z, (CLASSES // EDGE, LANES, VECTOR)), m, s)
    for start in range(ends, stop, EDGE):
        j, exists = masked(start, high, skip, stop, EDGE)
        z = tl.load(z_row + j, mask=exists, other=float("-inf")).to(ACC)
        m, s = stream(tl.reshape(z, (1, LANES, VECTOR)), m, s)
    row_m = tl.max(m, axis=0)
    norm = normaliser(tl.sum(rounded_product(s, exponential(m - row_m)), axis=0), LOG)
    for start in range(first, high, CLASSES):
        z = tl.load(z_row + start + tl.arange(0, CLASSES)).to(ACC)
        tl.store(out_row + start + tl.arange(0, CLASSES), convert(normalised(z, row_m, norm, LOG), OUT))
    for start in range(ends, stop, EDGE):
        j, exists = masked(start, high, skip, stop, EDGE)
        z = tl.load(z_row + j, mask=exists, other=float("-inf")).to(ACC)
        tl.store(out_row + j, convert(normalised(z, row_m, norm, LOG), OUT), mask=exists)


@triton.jit
def softmax_long_backward(
    grad_ptr, upstream_ptr, out_ptr, sizes, grad_strides, upstream_strides, out_strides, classes,
    LOG: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, a row a program; strides of the gradients are None where they are the output's.

    Bytes: output and upstream gradient read once from memory, then from a cache; gradient written once.
    """
    EDGE: tl.constexpr = LANES * VECTOR
    OUT: tl.constexpr = grad_ptr.dtype.element_ty
    offset = long_offset(sizes, out_strides)
    aligned = offset // VECTOR * VECTOR
    skip = (offset - aligned).to(tl.int32)
    y_row = out_ptr + aligned
    g_row = upstream_ptr + aligned
    x_row = grad_ptr + aligned
    if upstream_strides is not None:
        g_row = upstream_ptr + long_offset(sizes, upstream_strides) - skip
    if grad_strides is not None:
        x_row = grad_ptr + long_offset(sizes, grad_strides) - skip
    first, high, ends, stop = long_span(classes, skip, CLASSES, EDGE)
    dots = tl.zeros((LANES,), ACC)
    for start in range(first, high, CLASSES):
        j = start + tl.arange(0, CLASSES)
        y = tl.reshape(tl.load(y_row + j).to(ACC), (CLASSES // EDGE, LANES, VECTOR))
        g = tl.reshape(tl.load(g_row + j).to(ACC), (CLASSES // EDGE, LANES, VECTOR))
        dots += inner_product(y, g, LOG)
    for start in range(ends, stop, EDGE):
        j, exists = masked(start, high, skip, stop, EDGE)
        y = tl.reshape(tl.load(y_row + j, mask=exists, other=0.0).to(ACC), (1, LANES, VECTOR))
        g = tl.reshape(tl.load(g_row + j, mask=exists, other=0.0).to(ACC), (1, LANES, VECTOR))
        dots += inner_product(y, g, LOG)
    dot = tl.sum(dots, axis=0)
    for start in range(first, high, CLASSES):
        j = start + tl.arange(0, CLASSES)
        y = tl.load(y_row + j).to(ACC)
        g = tl.load(g_row + j).to(ACC)
        tl.store(x_row + j, convert(input_gradient(y, g, dot, LOG), OUT))
    for start in range(ends, stop, EDGE):
        j, exists = masked(start, high, skip, stop, EDGE)
        y = tl.load(y_row + j, mask=exists, other=0.0).to(ACC)
        g = tl.load(g_row + j, mask=exists, other=0.0).to(ACC)
        tl.store(x_row + j, convert(input_gradient(y, g, dot, LOG), OUT), mask=exists)
