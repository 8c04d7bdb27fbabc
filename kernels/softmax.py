"""Softmax and its logarithm along one dimension, forward and backward from the output.

m = max z,  s = sum exp(z - m),  softmax = exp(z - m) / s,  log softmax = (z - m) - log s
backward: y * (g - <g, y>) from y = softmax;  g - exp(y) * sum(g) from y = log softmax

Outputs and gradients may have another type than the input.
"""

import triton
import triton.language as tl

from .math import exponential, lowest, rounded_product
from .online import broadcast_rows, lane_reduce, online_softmax_update
from .rows import load_whole, locate_rows, map_rows, program_rows, reduce_rows


@triton.jit
def update_softmax_state(state, block, context, second, KIND: tl.constexpr, ACC: tl.constexpr):
    """Take a block into m and s of each lane."""
    return online_softmax_update(state[0], state[1], block[0], block[0])


@triton.jit
def normalize(block, context, second, KIND: tl.constexpr, ACC: tl.constexpr):
    """Return the softmax of a block or, for "log", its logarithm."""
    row_max, factor = context
    z = block[0] - broadcast_rows(row_max, block[0])
    if KIND == "log":
        y = z - broadcast_rows(factor, z)
    else:
        y = exponential(z) * broadcast_rows(factor, z)
    return y


@triton.jit
def softmax_forward(
    tensors, rows,
    KIND: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """(Log) softmax of a program's rows.

    Bytes: input read once, a second time from a cache unless WHOLE; output written once.
    """
    outer, row, row_mask, _ = program_rows(rows, tl.program_id(0), LANES, VECTOR)
    label = tl.full(row_mask.shape, -1, tl.int32)
    places = locate_rows(tensors, outer, row, row_mask, label, row_mask, rows, False, CLASSES, VECTOR)
    whole = load_whole(tensors, rows, places, float("-inf"), False, ACC, WHOLE, CLASSES, LANES, VECTOR)
    m, s = reduce_rows(
        update_softmax_state, (lowest(LANES, ACC), tl.zeros((LANES,), ACC)), (label,), whole, tensors, rows, places,
        KIND, False, ACC, WHOLE, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    if VECTOR > 0:
        row_max = tl.max(m, axis=0)
        s = tl.sum(rounded_product(s, exponential(m - row_max)), axis=0) + tl.zeros((1,), ACC)
        m = row_max + tl.zeros((1,), ACC)
    if KIND == "log":
        factor = tl.log(s)
    else:
        factor = 1.0 / s
    map_rows(
        normalize, (m, factor), whole, tensors, rows, places, KIND, False, "evict_first", ACC, WHOLE, CLASSES, LANES,
        VECTOR,
    )  # fmt: skip


@triton.jit
def add_inner_product(state, block, context, second, KIND: tl.constexpr, ACC: tl.constexpr):
    """Add a block to <g, y> of each lane or, for the logarithm, to sum(g)."""
    y, g, _, _ = block
    if KIND == "log gradient":
        product = g
    elif len(y.shape) == 3:
        product = g * y  # a lane's part, which no other lane adds to
    else:
        product = rounded_product(g, y)
    return (state[0] + lane_reduce(product, tl.sum),)


@triton.jit
def input_gradient(block, context, second, KIND: tl.constexpr, ACC: tl.constexpr):
    """Return the gradient of a block of the input."""
    y, g, _, _ = block
    product = broadcast_rows(context[0], y)
    if KIND == "log gradient":
        grad = g - exponential(y) * product
    else:
        grad = y * (g - product)
    return grad


@triton.jit
def softmax_backward(
    tensors, rows,
    KIND: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, of a program's rows.

    Bytes: output and upstream gradient read once, a second time from a cache unless WHOLE; gradient written once.
    """
    outer, row, row_mask, _ = program_rows(rows, tl.program_id(0), LANES, VECTOR)
    label = tl.full(row_mask.shape, -1, tl.int32)
    places = locate_rows(tensors, outer, row, row_mask, label, row_mask, rows, True, CLASSES, VECTOR)
    whole = load_whole(tensors, rows, places, 0.0, True, ACC, WHOLE, CLASSES, LANES, VECTOR)
    state = reduce_rows(
        add_inner_product, (tl.zeros((LANES,), ACC),), (label,), whole, tensors, rows, places,
        KIND, True, ACC, WHOLE, CLASSES, LANES, VECTOR,
    )  # fmt: skip
    product = state[0]
    if VECTOR > 0:
        product = tl.sum(product, axis=0) + tl.zeros((1,), ACC)
    map_rows(
        input_gradient, (product,), whole, tensors, rows, places, KIND, True, "evict_first", ACC, WHOLE, CLASSES, LANES,
        VECTOR,
    )  # fmt: skip
