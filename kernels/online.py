"""The online softmax: a running maximum m and sum s of each lane, updated block by block and merged at the end.

A block is (classes, rows), where a lane has a row, or (repeats, lanes, vector), where all lanes share one row and each
thread holds a lane's part. Values of a lane are (lanes,); values of a row are (rows,), one where lanes share it.
"""

import triton
import triton.language as tl

from .math import exponential, lowest, rounded_product


@triton.jit
def reduce_by_halves(z, REDUCE: tl.constexpr):
    """Reduce (before, n, after) along its middle, n a power of 2 up to 1024: one half with the other, and so on.

    Triton reduces first what a thread holds, then what a warp does: which classes those are, it decides by alignment
    and by the number of rows, too. Of two halves it has nothing to decide.
    """
    for _ in tl.static_range(10):
        if z.shape[1] > 1:
            z = REDUCE(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2, z.shape[2])), axis=1)
    return z


@triton.jit
def lane_reduce(z, REDUCE: tl.constexpr, INVARIANT: tl.constexpr = False):
    """Reduce a lane's part of a block by tl.max, tl.min or tl.sum.

    INVARIANT: in an order that the block's shape alone decides.
    """
    if len(z.shape) == 2:
        if INVARIANT:
            y = reduce_by_halves(tl.reshape(z, (1, z.shape[0], z.shape[1])), REDUCE)
            y = tl.reshape(y, (z.shape[1],))
        else:
            y = REDUCE(z, axis=0)
    elif z.shape[2] == 1:
        y = tl.reshape(z, (z.shape[1],))
    elif INVARIANT:
        y = reduce_by_halves(tl.reshape(z, (z.shape[0] * z.shape[1], z.shape[2], 1)), REDUCE)
        y = reduce_by_halves(tl.reshape(y, (1, z.shape[0], z.shape[1])), REDUCE)
        y = tl.reshape(y, (z.shape[1],))
    else:
        y = REDUCE(REDUCE(z, axis=2), axis=0)
    return y


@triton.jit
def broadcast_lanes(x, z):
    """A value of each lane, shaped to broadcast against the block z."""
    if len(z.shape) == 3:
        y = x[None, :, None]
    else:
        y = x[None, :]
    return y


@triton.jit
def broadcast_rows(x, z):
    """A value of each row, shaped to broadcast against the block z."""
    if len(z.shape) == 3:
        y = tl.sum(x, axis=0)  # of one row
    else:
        y = x[None, :]
    return y


@triton.jit
def fresh_state(LANES: tl.constexpr, ACC: tl.constexpr):
    """Return the state of lanes that have seen nothing: m, s, sum a, <a, z - m>, and the target class's logit."""
    zero = tl.zeros((LANES,), ACC)
    return lowest(LANES, ACC), zero, zero, zero, zero


@triton.jit
def online_softmax_update(m, s, z, others, INVARIANT: tl.constexpr = False):
    """Add a block to the running maximum m of z and the running sum s of exp(others - m).

    m starts at the lowest finite number: a block of -inf needs no test, exp(-inf - m) is 0.
    """
    m_new = tl.maximum(m, lane_reduce(z, tl.max))
    s = s * exponential(m - m_new) + lane_reduce(
        exponential(others - broadcast_lanes(m_new, others)), tl.sum, INVARIANT
    )  # fmt: skip
    return m_new, s


@triton.jit
def shift_dot(dot, total, delta):
    """Return <a, z - m> for a maximum that is higher by -delta; total is sum a. 0 * inf is 0."""
    return dot + tl.where(total == 0.0, 0.0, total * delta)


@triton.jit
def sum_parts(x, INVARIANT: tl.constexpr):
    """Sum (rows, parts) over the parts."""
    if INVARIANT:
        y = reduce_by_halves(tl.reshape(x, (x.shape[0], x.shape[1], 1)), tl.sum)
        y = tl.reshape(y, (x.shape[0],))
    else:
        y = tl.sum(x, axis=1)
    return y


@triton.jit
def merge_partials(m, s, total, dot, INVARIANT: tl.constexpr = False):
    """Merge m, s, sum a and <a, z - m> of the parts of rows, all (rows, parts)."""
    row_max = tl.max(m, axis=1)
    delta = m - row_max[:, None]
    s = sum_parts(rounded_product(s, exponential(delta)), INVARIANT)
    return row_max, s, sum_parts(total, INVARIANT), sum_parts(shift_dot(dot, total, delta), INVARIANT)
