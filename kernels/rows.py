"""What every row-wise kernel needs: where a tile of rows lies, what its target is, and logarithms that lose no digits.

Rows are the logits' dimensions without the class dimension, merged where memory allows: sizes = (outer..., inner). One
program takes a tile of up to ROWS neighbours along the inner dimension; the outer dimensions, of any number, are
decoded once a program from its number. A tensor is a pointer and a tuple of strides (outer..., inner, class), so every
layout is read where it lies.

Legend: z logits, t target row, w class weights, e label smoothing, C classes, keep 1 or 0 (ignored) or NaN (no class).
"""

import triton
import triton.language as tl


@triton.jit
def row_tile(sizes, ROWS: tl.constexpr):
    """Return this program's outer index, its rows along the inner dimension, which of them exist, and their numbers."""
    inner = sizes[len(sizes) - 1]
    tiles = tl.cdiv(inner, ROWS)
    outer = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return outer, row, row < inner, outer.to(tl.int64) * inner + row


@triton.jit
def row_offsets(outer, row, sizes, strides):
    """Return the offset of each row's first element, in 64 bits: N * C above 2**31 is ordinary."""
    offset = row * strides[len(sizes) - 1]
    for i in tl.static_range(len(sizes) - 2, -1, -1):
        offset += (outer % sizes[i]).to(tl.int64) * strides[i]
        outer = outer // sizes[i]
    return offset


@triton.jit
def index_target(target_ptr, rows, c, inside, live, classes, ignore_index, class_stride, ACC: tl.constexpr):
    """Class indices: the label (-1 where there is none), keep, and a t that nobody reads: it is the label alone.

    An index outside [0, C) that is not ignored makes keep NaN, hence that row's loss and gradient; nothing is read
    there.
    """
    label = tl.load(target_ptr + rows, mask=live, other=-1).to(tl.int64)
    known = (label >= 0) & (label < classes)
    keep = tl.where(label == ignore_index, 0.0, tl.where(known, 1.0, float("nan"))).to(ACC)
    return tl.where(keep == 1.0, label, -1), keep, keep


@triton.jit
def probability_target(target_ptr, rows, c, inside, live, classes, ignore_index, class_stride, ACC: tl.constexpr):
    """Class probabilities: no label, every row kept, and the block of t."""
    t = tl.load(target_ptr + rows[:, None] + c.to(tl.int64)[None, :] * class_stride, mask=inside, other=0.0)
    return tl.full(rows.shape, -1, tl.int64), tl.where(live, 1.0, 0.0).to(ACC), t.to(ACC)


@triton.jit
def class_weight(weight_ptr, c, exists, ACC: tl.constexpr):
    """Return w at the classes c, or 1 where there are no weights."""
    w = tl.full(c.shape, 1.0, ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=exists, other=0.0).to(ACC)
    return w


@triton.jit
def smoothing_terms(smoothing, classes, ACC: tl.constexpr):
    """Return 1 - e and e / C; e comes as two float32 (high and low part), so that float64 kernels get all its bits."""
    e = tl.full((), 0.0, ACC)
    if smoothing is not None:
        e += tl.full((), smoothing[0], ACC) + tl.full((), smoothing[1], ACC)
    return 1.0 - e, e / tl.full((), classes, ACC)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate relative to itself: 2 atanh(x / (2 + x)) by its series up to 1/2."""
    w = x / (2.0 + x)
    w2 = w * w
    series = w2 * 0.0
    for i in tl.static_range(12, -1, -1):
        series = series * w2 + 1.0 / (2 * i + 1)
    return tl.where(x <= 0.5, 2.0 * w * series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, accurate relative to itself: the Taylor series down to -0.7."""
    series = x * 0.0 + 1.0
    for i in tl.static_range(17, 1, -1):
        series = 1.0 + x * series * (1.0 / i)
    return tl.where(x >= -0.7, x * series, tl.exp(x) - 1.0)
