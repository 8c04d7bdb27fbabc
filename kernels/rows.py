"""What every row-wise kernel needs: where a tile of rows lies, what its target is, and logarithms that lose no digits.

Rows are the logits' dimensions without the class dimension, merged where memory allows: sizes = (outer..., inner). A
tile is up to ROWS neighbours along the inner dimension; the outer dimensions, of any number, are decoded once a program
from the tile's number. A tensor is a pointer and a tuple of strides (outer..., inner, class), so every
layout is read where it lies.

Legend: z logits, t target row, w class weights, e label smoothing, C classes, keep 1 or 0 (ignored) or NaN (no class).
"""

import triton
import triton.language as tl


@triton.jit
def row_tile(tile, sizes, ROWS: tl.constexpr):
    """Return a tile's outer index, its rows along the inner dimension, which of them exist, and their numbers."""
    inner = sizes[len(sizes) - 1]
    tiles = tl.cdiv(inner, ROWS)
    outer = tile // tiles
    row = (tile % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
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
def load_tile(ptr, offsets, inside):
    """Load a (classes, rows) block of logits, where classes are adjacent so that a thread has a row's.

    A list of addresses without shape is dealt out to the threads one by one, rows before classes. Left to see that
    classes are adjacent, the compiler would give a row to several threads that exchange their shares and each do all of
    the work on rows. The loads' sectors come through the L1 cache; stores, not treated so, are rearranged. Four classes
    or fewer a step are left alone: there rows are adjacent, or next to it.
    """
    CLASSES: tl.constexpr = offsets.shape[0]
    ROWS: tl.constexpr = offsets.shape[1]
    if CLASSES > 4:
        flat = tl.reshape(offsets, (CLASSES * ROWS,))
        z = tl.load(ptr + flat, mask=tl.reshape(inside, (CLASSES * ROWS,)), other=float("-inf"))
        z = tl.reshape(z, (CLASSES, ROWS))
    else:
        z = tl.load(ptr + offsets, mask=inside, other=float("-inf"))
    return z


@triton.jit
def index_target(target_ptr, rows, c, inside, live, classes, ignore_index, class_stride, ACC: tl.constexpr):
    """Class indices: the label (-1 where there is none), keep, and a t that nobody reads: it is the label alone.

    An index outside [0, C) that is not ignored makes keep NaN, hence that row's loss and gradient; nothing is read
    there.
    """
    label = tl.load(target_ptr + rows, mask=live, other=-1).to(tl.int64)
    known = (label >= 0) & (label < classes)
    keep = tl.where(label == ignore_index, 0.0, tl.where(known, 1.0, float("nan"))).to(ACC)
    return tl.where(keep == 1.0, label, -1).to(tl.int32), keep, keep


@triton.jit
def slice_target(target_ptr, rows, c, inside, live, classes, ignore_index, class_stride, ACC: tl.constexpr):
    """As index_target, where `classes` are a slice: ignore_index is (ignore_index, the first class, the number of all).

    The label is relative to the slice, and -1 where another holds it.
    """
    label = tl.load(target_ptr + rows, mask=live, other=-1).to(tl.int64)
    known = (label >= 0) & (label < ignore_index[2])
    keep = tl.where(label == ignore_index[0], 0.0, tl.where(known, 1.0, float("nan"))).to(ACC)
    here = label - ignore_index[1]
    found = (keep == 1.0) & (here >= 0) & (here < classes)
    return tl.where(found, here, -1).to(tl.int32), keep, keep


@triton.jit
def probability_target(target_ptr, rows, c, inside, live, classes, ignore_index, class_stride, ACC: tl.constexpr):
    """Class probabilities: no label, every row kept, and the block of t."""
    t = tl.load(target_ptr + c.to(tl.int64)[:, None] * class_stride + rows[None, :], mask=inside, other=0.0)
    return tl.full(rows.shape, -1, tl.int32), tl.where(live, 1.0, 0.0).to(ACC), t.to(ACC)


@triton.jit
def class_weight(weight_ptr, c, exists, ACC: tl.constexpr):
    """Return w at the classes c, or 1 where there are no weights."""
    w = tl.full(c.shape, 1.0, ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=exists, other=0.0).to(ACC)
    return w


@triton.jit
def smoothing_terms(smoothing, classes, ACC: tl.constexpr):
    """Return 1 - e and e / C; e comes as two float32 (high and low part), so that float64 kernels get all its bits.

    A third part is C, where `classes` are a slice.
    """
    e = tl.full((), 0.0, ACC)
    if smoothing is not None:
        e += tl.full((), smoothing[0], ACC) + tl.full((), smoothing[1], ACC)
        if len(smoothing) == 3:
            classes = smoothing[2]
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


@triton.jit
def exponential(x):
    """exp(x): in float32 one multiplication and one EX2, subnormal results flushed to 0; float64 in full precision."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = tl.exp2(x * 1.4426950408889634)
    return y


@triton.jit
def rounded_product(x, y):
    """Return x * y for a sum over lanes.

    Lanes add their neighbour's term to their own. The compiler fuses a plain product into that addition, but cannot
    fuse the product that came from the neighbour: one term exact, one rounded, and two lanes that should hold the same
    sum differ in its last bits. A product that is already a fused multiply-add is not fused again, and costs the same.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """Return x as DTYPE, to bfloat16 by way of float32: Triton's interpreter has no other way from float64."""
    if DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def lowest(SIZE: tl.constexpr, ACC: tl.constexpr):
    """Return a vector of the lowest finite number, where a running maximum starts."""
    if ACC == tl.float64:
        m = tl.full((SIZE,), -1.7976931348623157e308, ACC)
    else:
        m = tl.full((SIZE,), -3.4028234663852886e38, ACC)
    return m


@triton.jit
def lane_max(z):
    """Maximum over a lane's share of a block: (share, lanes), or (repeats, lanes, share) that one thread holds."""
    if len(z.shape) == 3:
        y = tl.max(tl.max(z, axis=2), axis=0)
    else:
        y = tl.max(z, axis=0)
    return y


@triton.jit
def lane_min(x):
    """Minimum over a lane's share of a block."""
    if len(x.shape) == 3:
        y = tl.min(tl.min(x, axis=2), axis=0)
    else:
        y = tl.min(x, axis=0)
    return y


@triton.jit
def lane_sum(z):
    """Sum over a lane's share of a block."""
    if len(z.shape) == 3:
        y = tl.sum(tl.sum(z, axis=2), axis=0)
    else:
        y = tl.sum(z, axis=0)
    return y


@triton.jit
def along(x, z):
    """A value a lane, shaped to broadcast against the block z."""
    if len(z.shape) == 3:
        y = x[None, :, None]
    else:
        y = x[None, :]
    return y


@triton.jit
def absorb(z, others, a, m, s, total, dot, SPREAD: tl.constexpr):
    """Add a block to the running maximum m of z, s of `others` and, with SPREAD, to sum a and <a, z - m>.

    m starts at the lowest finite number: a block of -inf needs no test, exp(-inf - m) is 0.
    """
    m_new = tl.maximum(m, lane_max(z))
    s = s * exponential(m - m_new) + lane_sum(exponential(others - along(m_new, others)))
    if SPREAD:
        dot += tl.where(total == 0.0, 0.0, total * (m - m_new))
        dot += lane_sum(tl.where(a == 0.0, 0.0, a * (z - along(m_new, z))))
        total += lane_sum(a)
    return m_new, s, total, dot
