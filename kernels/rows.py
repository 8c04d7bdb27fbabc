"""Where rows lie in memory, and how a program goes over them.

Rows are the logits' dimensions without the class dimension, merged where memory allows: sizes = (outer..., inner). A
tensor is a pointer and a tuple of strides (outer..., inner, class), so every layout is read where it lies.

Two kinds of programs, told apart by VECTOR:

VECTOR == 0, a tile: LANES rows, neighbours along the inner dimension, their classes in blocks of (CLASSES, LANES).
VECTOR > 0, a long row or a part of one, whose classes are adjacent: blocks of (REPEATS, LANES, VECTOR), CLASSES in all,
    where each lane has VECTOR adjacent classes, 16 bytes, at every repeat. Positions count from the 16-byte boundary at
    or before the row's first element: position j holds class j - head_offset. Vectors that the row fills go through
    blocks; what is left, the beginning and the end of a row that is not aligned and the vector of the target class, is
    the row's edge, an element a lane: no other element is compared with anything.

Where a row's bits must be the same in every batch, positions count from the row's first element instead: vectors are
then the same classes wherever the row lies, and are loaded an element at a time where it is not aligned.

WHOLE: the first block holds all classes, and stays in registers from the first pass to the second.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import convert


class RowLayout(NamedTuple):
    """The rows of a call, as the host passes them."""

    sizes: Any  # (outer..., inner)
    classes: Any
    parts: Any  # programs that share a long row
    invariant: Any = None  # 1: a row's bits are the same in every batch; None: they need not be
    unaligned: Any = (
        None  # 1: then, and rows begin between multiples of 16 bytes; None: they do not, or need not be known
    )


class Strided(NamedTuple):
    """A tensor, as the host passes it; its strides are None where it lies in memory as the first tensor does."""

    ptr: Any
    strides: Any


class Tensors(NamedTuple):
    """The tensors with a class dimension, as the host passes them; one with neither where there is none."""

    first: Any  # the logits, or the softmax
    second: Any  # the target, or the upstream gradient
    out: Any  # the gradient, or the softmax


@triton.jit
def count_rows(rows):
    """Return the number of rows."""
    count = tl.full((), 1, tl.int64)
    for i in tl.static_range(len(rows.sizes)):
        count *= rows.sizes[i]
    return count


@triton.jit
def program_rows(rows, program, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return a program's rows: their outer index, their inner indices, which of them exist, and their numbers.

    The inner index of a long row is a scalar; the last two are vectors of one row.
    """
    inner = rows.sizes[len(rows.sizes) - 1]
    if VECTOR == 0:
        tiles = tl.cdiv(inner, LANES)
        outer = program // tiles
        row = (program % tiles).to(tl.int64) * LANES + tl.arange(0, LANES)
        row_mask = row < inner
        row_index = outer.to(tl.int64) * inner + row
    else:
        number = program // rows.parts
        outer = number // inner
        row = (number % inner).to(tl.int64)
        row_mask = tl.full((1,), True, tl.int1)
        row_index = number.to(tl.int64) + tl.arange(0, 1)
    return outer, row, row_mask, row_index


@triton.jit
def row_offsets(outer, row, rows, strides):
    """Return the offset of each row's first element, in 64 bits: N * C above 2**31 is ordinary."""
    offset = row * strides[len(rows.sizes) - 1]
    for i in tl.static_range(len(rows.sizes) - 2, -1, -1):
        offset += (outer % rows.sizes[i]).to(tl.int64) * strides[i]
        outer = outer // rows.sizes[i]
    return offset


@triton.jit
def value_offsets(outer, row, rows, strides):
    """Return the offset of each row's value in a tensor without the class dimension, (rows,) for a long row, too."""
    offset = row_offsets(outer, row, rows, strides)
    if len(offset.shape) == 0:
        offset += tl.arange(0, 1)
    return offset


@triton.jit
def row_segment(offset, row_mask, target_class, read, rows, CLASSES: tl.constexpr, VECTOR: tl.constexpr):
    """Return what a program goes over; `offset` is of the first tensor.

    A tile: the first and the last class, and which rows exist. A long row, as positions of vectors: where the program's
    part begins and stops, where the vectors end that the row fills, and the one of the target class; then head_offset,
    whether the program has the row's edge, and whether the row is read: an ignored one is not. Without its row a
    program has nothing.
    """
    if VECTOR == 0:
        segment = (0, rows.classes, row_mask)
    else:
        head_offset = tl.full((), 0, tl.int32)
        if rows.invariant is None:
            head_offset = offset.to(tl.int32) & (VECTOR - 1)
        wanted = tl.max(row_mask.to(tl.int32), axis=0) != 0
        label = tl.max(target_class, axis=0)
        labelled = tl.where(label >= 0, (head_offset + label) // VECTOR * VECTOR, -VECTOR)
        first = tl.where(head_offset > 0, VECTOR, 0)
        last = tl.where(wanted, (head_offset + rows.classes) // VECTOR * VECTOR, first)
        size = tl.cdiv(tl.cdiv(last - first, CLASSES), rows.parts) * CLASSES
        part = tl.program_id(0) % rows.parts
        begin = tl.minimum(first + part * size, last)
        stop = tl.minimum(begin + size, last)
        is_read = tl.max(read.to(tl.int32), axis=0) != 0
        segment = (begin, stop, last, labelled, head_offset, wanted & (part == 0), is_read)
    return segment


@triton.jit
def stretch(part, segment, CLASSES: tl.constexpr):
    """Return the bounds of one of two stretches: filled blocks from low to high, masked ones from high to end.

    The first ends with the block of the target class, if the program has it, the second with the program's part.
    """
    begin, stop, _, labelled, _, _, read = segment
    filled = tl.where(read, begin + (stop - begin) // CLASSES * CLASSES, begin)
    found = (labelled >= begin) & (labelled < filled)
    middle = tl.where(found, begin + (labelled - begin) // CLASSES * CLASSES, filled)
    rest = tl.where(found, middle + CLASSES, stop)
    low = tl.where(part == 0, begin, rest)
    high = tl.where(part == 0, middle, tl.where(found, filled, rest))
    return low, high, tl.where(part == 0, rest, stop)


@triton.jit
def base_offset(tensor, first_base, outer, row, rows):
    """Return where a tensor's rows begin: at class 0, or as the first tensor's where it lies as that does."""
    base = first_base
    if tensor.strides is not None:
        base = row_offsets(outer, row, rows, tensor.strides)
    return base


@triton.jit
def locate_rows(
    tensors, outer, row, row_mask, target_class, read, rows, PAIRED: tl.constexpr, CLASSES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Return where the rows of the three tensors begin, and the segment that the program goes over."""
    offset = row_offsets(outer, row, rows, tensors.first.strides)
    segment = row_segment(offset, row_mask, target_class, read, rows, CLASSES, VECTOR)
    base = offset
    if VECTOR > 0 and rows.unaligned is None:
        base = offset // VECTOR * VECTOR
    second_base = base
    if PAIRED:
        second_base = base_offset(tensors.second, base, outer, row, rows)
    out_base = base
    if tensors.out.ptr is not None:
        out_base = base_offset(tensors.out, base, outer, row, rows)
    return base, second_base, out_base, segment


@triton.jit
def block_offsets(tensor, base, j, c, rows):
    """Return the offsets of a block: of the classes c or, where it lies as the first tensor does, of positions j."""
    if tensor.strides is None:
        offset = base + j
    elif len(c.shape) == 1:
        offset = base + c.to(tl.int64) * tensor.strides[len(rows.sizes)]
    else:
        offset = base[None, :] + c.to(tl.int64) * tensor.strides[len(rows.sizes)]
    return offset


@triton.jit
def block_places(start, segment, rows, CLASSES: tl.constexpr, VECTOR: tl.constexpr):
    """Return a block's positions and classes, which classes exist, and which elements; of a long row all (CLASSES,)."""
    if VECTOR == 0:
        j = (start + tl.arange(0, CLASSES))[:, None]
        c = j
        class_mask = c < rows.classes
        mask = class_mask & segment[2][None, :]
    else:
        j = start + tl.arange(0, CLASSES)
        c = j - segment[4]
        vector = start + tl.arange(0, CLASSES) // VECTOR * VECTOR
        class_mask = (vector < segment[2]) & (vector != segment[3])
        mask = class_mask
    return j, c, class_mask, mask


@triton.jit
def edge_places(segment, rows, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return positions, classes and mask of a long row's edge: the vectors it does not fill, and the target class's."""
    _, _, last, labelled, head_offset, has_edge, _ = segment
    lane = tl.arange(0, LANES)
    piece = lane // VECTOR
    vector = tl.where(piece == 0, 0, tl.where(piece == 1, labelled, last))
    first = tl.where(head_offset > 0, VECTOR, 0)
    mask = tl.where(piece == 1, (vector >= first) & (vector < last), (piece == 2) | ((piece == 0) & (head_offset > 0)))
    j = vector + lane % VECTOR
    c = j - head_offset
    mask = mask & (c >= 0) & (c < rows.classes) & has_edge
    c = tl.where(mask, c, -2)  # no class: not even a row's that has none
    return j, c, mask


@triton.jit
def load_tile(ptr, offsets, mask, OTHER: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr):
    """Load a block of a tile.

    Where classes are adjacent: flattening the offsets makes Triton assign one row to each thread; with the 2-D shape it
    vectorises along classes, and every reduction of a row needs shuffles. The loads' sectors come through the L1 cache;
    stores, not treated so, are rearranged. Blocks of four classes or fewer are left alone: there rows are adjacent, or
    next to it.
    """
    if CLASSES > 4:
        flat = tl.reshape(offsets, (CLASSES * LANES,))
        z = tl.load(ptr + flat, mask=tl.reshape(mask, (CLASSES * LANES,)), other=OTHER)
        z = tl.reshape(z, (CLASSES, LANES))
    else:
        z = tl.load(ptr + offsets, mask=mask, other=OTHER)
    return z


@triton.jit
def load_vectors(
    address, mask, OTHER: tl.constexpr, EVICT: tl.constexpr, FILLED: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Load a block of a long row: without a mask where it is FILLED.

    Loaded as a vector and then reshaped: so Triton 3.6, too, gives every thread a lane, and nothing is exchanged.
    """
    if FILLED:
        z = tl.load(address, eviction_policy=EVICT)
    else:
        z = tl.load(address, mask=mask, other=OTHER, eviction_policy=EVICT)
    return tl.reshape(z, (z.shape[0] // (LANES * VECTOR), LANES, VECTOR))


@triton.jit
def load_block(
    start, tensors, rows, places, OTHER: tl.constexpr, PAIRED: tl.constexpr, EVICT: tl.constexpr, ACC: tl.constexpr,
    FILLED: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Load a block of the first tensor, OTHER where it has no elements, and of the second where PAIRED.

    Returns both (a placeholder for what is not PAIRED), the block's classes, and which of them exist and are read.
    """
    base, second_base, _, segment = places
    j, c, class_mask, mask = block_places(start, segment, rows, CLASSES, VECTOR)
    if VECTOR == 0:
        z = load_tile(
            tensors.first.ptr, block_offsets(tensors.first, base, j, c, rows), mask, OTHER, CLASSES, LANES
        ).to(ACC)
        t = z
        if PAIRED:
            offsets = block_offsets(tensors.second, second_base, j, c, rows)
            t = load_tile(tensors.second.ptr, offsets, mask, 0.0, CLASSES, LANES).to(ACC)
    else:
        class_mask = mask & segment[6]
        address = tensors.first.ptr + base + j
        z = load_vectors(address, class_mask, OTHER, EVICT, FILLED, LANES, VECTOR).to(ACC)
        t = z
        if PAIRED:
            address = tensors.second.ptr + block_offsets(tensors.second, second_base, j, c, rows)
            t = load_vectors(address, class_mask, 0.0, EVICT, FILLED, LANES, VECTOR).to(ACC)
        c = tl.reshape(c, (CLASSES // (LANES * VECTOR), LANES, VECTOR))
        class_mask = tl.reshape(class_mask, (CLASSES // (LANES * VECTOR), LANES, VECTOR))
        if FILLED:
            class_mask = tl.full(z.shape, True, tl.int1)
    return z, t, c, class_mask


@triton.jit
def load_edge(
    tensors, rows, places, OTHER: tl.constexpr, PAIRED: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """As `load_block`, of a long row's edge, an element a lane."""
    base, second_base, _, segment = places
    j, c, mask = edge_places(segment, rows, LANES, VECTOR)
    mask = mask & segment[6]
    z = tl.load(tensors.first.ptr + base + j, mask=mask, other=OTHER).to(ACC)
    t = z
    if PAIRED:
        address = tensors.second.ptr + block_offsets(tensors.second, second_base, j, c, rows)
        t = tl.load(address, mask=mask, other=0.0).to(ACC)
    return z[None, :, None], t[None, :, None], c[None, :, None], mask[None, :, None]


@triton.jit
def load_whole(
    tensors, rows, places, OTHER: tl.constexpr, PAIRED: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr,
    CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return what stays in registers from pass to pass: the only block where it is WHOLE, else nothing."""
    block = 0
    if WHOLE:
        block = load_block(places[3][0], tensors, rows, places, OTHER, PAIRED, "", ACC, False, CLASSES, LANES, VECTOR)
    return block


@triton.jit
def reduce_rows(
    BODY: tl.constexpr, state, context, whole, tensors, rows, places, KIND: tl.constexpr, PAIRED: tl.constexpr,
    ACC: tl.constexpr, WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Take the program's rows into the state, block by block, and return it.

    BODY(state, block, context, second tensor, KIND, ACC) returns the state after a block.
    """
    EVICT: tl.constexpr = "" if tensors.out.ptr is None else "evict_last"  # rows with an output are read a second time
    OTHER: tl.constexpr = 0.0 if KIND == "gradient" or KIND == "log gradient" else float("-inf")
    segment = places[3]
    if VECTOR > 0:
        edge = load_edge(tensors, rows, places, OTHER, PAIRED, ACC, LANES, VECTOR)
        state = BODY(state, edge, context, tensors.second, KIND, ACC)
    if WHOLE:
        state = BODY(state, whole, context, tensors.second, KIND, ACC)
    elif VECTOR == 0:
        for start in range(0, rows.classes, CLASSES):
            block = load_block(start, tensors, rows, places, OTHER, PAIRED, EVICT, ACC, False, CLASSES, LANES, VECTOR)
            state = BODY(state, block, context, tensors.second, KIND, ACC)
    else:
        for part in range(2):
            low, high, end = stretch(part, segment, CLASSES)
            for start in range(low, high, CLASSES):
                block = load_block(
                    start, tensors, rows, places, OTHER, PAIRED, EVICT, ACC, True, CLASSES, LANES, VECTOR
                )  # fmt: skip
                state = BODY(state, block, context, tensors.second, KIND, ACC)
            for start in range(high, tl.where(segment[6], end, high), CLASSES):
                block = load_block(
                    start, tensors, rows, places, OTHER, PAIRED, EVICT, ACC, False, CLASSES, LANES, VECTOR
                )  # fmt: skip
                state = BODY(state, block, context, tensors.second, KIND, ACC)
    return state


@triton.jit
def store_block(
    y, start, out, rows, places, EVICT: tl.constexpr, FILLED: tl.constexpr,
    CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store a block of the output: without a mask where it is FILLED."""
    j, c, _, mask = block_places(start, places[3], rows, CLASSES, VECTOR)
    y = convert(y, out.ptr.dtype.element_ty)
    if VECTOR > 0:
        y = tl.reshape(y, (CLASSES,))
    if FILLED:
        tl.store(out.ptr + block_offsets(out, places[2], j, c, rows), y, eviction_policy=EVICT)
    else:
        tl.store(out.ptr + block_offsets(out, places[2], j, c, rows), y, mask=mask, eviction_policy=EVICT)


@triton.jit
def map_rows(
    BODY: tl.constexpr, context, whole, tensors, rows, places, KIND: tl.constexpr, PAIRED: tl.constexpr,
    EVICT: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr, CLASSES: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Write BODY(block, context, second tensor, KIND, ACC) for every block of the program's rows, and the edge.

    Long rows go from their end to their beginning: what was read last is still in the L2 cache, even where the rows
    under way do not fit into it.
    """
    OTHER: tl.constexpr = 0.0 if KIND == "gradient" or KIND == "log gradient" else float("-inf")
    segment = places[3]
    if VECTOR > 0:
        j, c, mask = edge_places(segment, rows, LANES, VECTOR)
        edge = load_edge(tensors, rows, places, OTHER, PAIRED, ACC, LANES, VECTOR)
        at_edge = convert(BODY(edge, context, tensors.second, KIND, ACC), tensors.out.ptr.dtype.element_ty)
        at_edge = tl.reshape(at_edge, (LANES,))
        tl.store(tensors.out.ptr + block_offsets(tensors.out, places[2], j, c, rows), at_edge, mask=mask)
    if WHOLE:
        y = BODY(whole, context, tensors.second, KIND, ACC)
        store_block(y, segment[0], tensors.out, rows, places, EVICT, False, CLASSES, LANES, VECTOR)
    elif VECTOR == 0:
        for start in range(0, rows.classes, CLASSES):
            block = load_block(start, tensors, rows, places, OTHER, PAIRED, EVICT, ACC, False, CLASSES, LANES, VECTOR)
            y = BODY(block, context, tensors.second, KIND, ACC)
            store_block(y, start, tensors.out, rows, places, EVICT, False, CLASSES, LANES, VECTOR)
    else:
        for part in range(2):
            low, high, end = stretch(1 - part, segment, CLASSES)
            for start in range(high, end, CLASSES):
                block = load_block(
                    start, tensors, rows, places, OTHER, PAIRED, EVICT, ACC, False, CLASSES, LANES, VECTOR
                )  # fmt: skip
                y = BODY(block, context, tensors.second, KIND, ACC)
                store_block(y, start, tensors.out, rows, places, EVICT, False, CLASSES, LANES, VECTOR)
            for at in range(low, high, CLASSES):
                start = low + high - CLASSES - at
                block = load_block(
                    start, tensors, rows, places, OTHER, PAIRED, EVICT, ACC, True, CLASSES, LANES, VECTOR
                )  # fmt: skip
                y = BODY(block, context, tensors.second, KIND, ACC)
                store_block(y, start, tensors.out, rows, places, EVICT, True, CLASSES, LANES, VECTOR)
