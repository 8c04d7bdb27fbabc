"""What depends on a call's signature alone, decided once: which kernel, on how many threads, in how much memory."""

from __future__ import annotations

import functools
import math
import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

from softmax_fused._spec import row_shape
from softmax_fused.backends.numba import compilation
from softmax_fused.backends.numba.call import (
    BLOCK,
    LANE_VECTORS,
    LANES,
    REDUCTIONS,
    ROW_COPIES,
    RowFields,
    Signature,
    Stage,
)
from softmax_fused.backends.numba.compilation import Kernel, Key
from softmax_fused.backends.numba.layout import (
    NOWHERE,
    Rows,
    class_strides,
    count_rows,
    flatten,
    row_strides,
    strides_along,
)

if TYPE_CHECKING:
    import torch

    from softmax_fused._spec import RowSpec, Spec

TILE_CLASSES = 95
"""Up to this many classes rows go in tiles also where classes lie side by side."""

MOST_TILE_CLASSES = 2**24
"""A tile counts classes in float32."""

FEW_LANES = 16
"""Where fewer rows of a tile lie at one stride, and the tile would be mostly empty, a copy of all rows costs less."""

PARALLEL_NUMEL = 2**16
"""From this many logits on threads share the rows; below, starting them takes as long as they save."""

CHUNK = 2**15
"""About how many logits a thread takes at a time: so few that none waits long for the last."""


class Plan(NamedTuple):
    """How a call is made."""

    kernel: Kernel
    call: array[int]  # without addresses
    team: int  # threads
    losses: int  # bytes of the rows' losses in scratch memory, before what each thread needs
    scratch: int  # numbers
    result: tuple[int, ...]  # the shape
    weighs_all: bool = False  # whether the weight of every class is read, be there weights or not


def bits(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    (integer,) = struct.unpack("q", struct.pack("d", number))
    return int(integer)


def divide(rows: Rows, tiled: bool, threads: int, copies: int = 1) -> tuple[int, int, int, int]:
    """Return units, a thread's scratch, how many units it takes at a time, and threads.

    The scratch holds so many `copies` of a unit, a row or tile.
    """
    if tiled:
        units, scratch = rows.outer * -(-rows.inner // LANES), LANES * (copies * rows.classes + LANE_VECTORS)
        chunk = max(1, CHUNK // (LANES * rows.classes))
    else:
        units, scratch = rows.outer * rows.inner, copies * -(-rows.classes // BLOCK) * BLOCK
        chunk = max(1, CHUNK // rows.classes)
    many = rows.outer * rows.inner * rows.classes >= PARALLEL_NUMEL
    return units, scratch, chunk, min(threads, -(-units // chunk)) if many else 1


NO_STRIDES, NO_KERNEL = "no strides", "no kernel"

READERS = ("indices", "probabilities")
"""The kinds of target that there are kernels for, as the protocol calls them."""


def covers(spec: Spec) -> bool:
    """Whether there are kernels for such a call."""
    return spec.target.reader in READERS and not spec.batch_invariant


@functools.lru_cache(256)
def make_plan(
    spec: Spec,
    shape: tuple[int, ...],
    logits: tuple[int, ...],
    target: tuple[int, ...],
    grad: tuple[int, ...] | None,
    upstream: tuple[int, ...] | None,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    with_loss: bool,
    threads: int,
) -> Plan | str:
    """Return the plan; NO_STRIDES where rows are to be copied first, NO_KERNEL where there is none or none can be had.

    `logits`, `target`, `grad` and `upstream` are strides, None for what is absent; `shape` and `dtype` are the logits'.
    """
    if not covers(spec):
        return NO_KERNEL
    has_labels = spec.target.has_labels
    given = [
        class_strides(shape, logits),
        (row_strides if has_labels else class_strides)(shape, target),
        NOWHERE if grad is None else class_strides(shape, grad),
        NOWHERE if upstream is None else row_strides(shape, upstream),
    ]
    known = [strides for strides in given if strides is not None]
    if len(known) < len(given):
        return NO_STRIDES
    rows, strides = flatten(count_rows(shape), known)
    side_by_side = strides[0][2] == 1 and all(by_class in (0, 1) for _, _, by_class in strides[1:3])
    if rows.outer > 1 and rows.inner < FEW_LANES and not side_by_side:
        return NO_STRIDES
    tiled = rows.classes <= TILE_CLASSES or not side_by_side
    kernel = compilation.load_kernel(Key(dtype, None if has_labels else target_dtype, spec.acc, tiled))
    if kernel is None:
        return NO_KERNEL
    number = rows.outer * rows.inner
    units, scratch, chunk, team = divide(rows, tiled, threads)
    reduced = with_loss and spec.reduction != "none"
    call = Signature(
        *rows, *strides[0], *strides[1], *strides[2], *strides[3][:2], scratch, units, chunk,
        REDUCTIONS[spec.reduction], spec.ignore_index, bits(spec.label_smoothing),
        Stage.everything if team == 1 else Stage.prepare,
    )  # fmt: skip
    losses = number if reduced else 0
    result = row_shape(shape) if spec.reduction == "none" else ()
    scratch = losses + team * scratch
    return Plan(kernel, array("q", call), team, losses * spec.acc.itemsize, scratch, result, spec.has_dense_target)


@functools.lru_cache(256)
def make_rows_plan(
    operation: str,
    options: RowSpec,
    shape: tuple[int, ...],
    logits: tuple[int, ...],
    target: tuple[int, ...],
    grad: tuple[int, ...] | None,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    threads: int,
) -> Plan | str:
    """Return the plan of one of OF_ROWS, likewise; NO_KERNEL also for an output that the kernels do not know."""
    spec = options.spec
    if not covers(spec) or not set(options.outputs) <= set(RowFields._fields):
        return NO_KERNEL
    has_labels = spec.target.has_labels
    given = [
        class_strides(shape, logits),
        (row_strides if has_labels else class_strides)(shape, target),
        NOWHERE if grad is None else class_strides(shape, grad),
    ]
    known = [strides for strides in given if strides is not None]
    if len(known) < len(given):
        return NO_STRIDES
    rows, strides = flatten(count_rows(shape), known)
    side_by_side = strides[0][2] == 1 and (grad is None or strides[2][2] == 1)
    tiled = rows.classes <= TILE_CLASSES or not side_by_side
    if tiled and rows.classes > MOST_TILE_CLASSES:
        return NO_KERNEL
    kernel = compilation.load_kernel(Key(dtype, None if has_labels else target_dtype, spec.acc, tiled, operation))
    if kernel is None:
        return NO_KERNEL
    units, scratch, chunk, team = divide(rows, tiled, threads, ROW_COPIES)
    call = Signature(
        *rows, *strides[0], *strides[1], *strides[2], 0, 0, scratch, units, chunk, REDUCTIONS["none"],
        spec.ignore_index, bits(spec.label_smoothing), Stage.everything if team == 1 else Stage.prepare,
    )  # fmt: skip
    return Plan(kernel, array("q", call), team, 0, team * scratch, row_shape(shape), spec.has_dense_target)


@functools.lru_cache(256)
def make_softmax_plan(
    name: str,
    dim: int,
    shape: tuple[int, ...],
    read: tuple[int, ...],
    upstream: tuple[int, ...] | None,
    written: tuple[int, ...],
    dtype: torch.dtype,
    acc: torch.dtype,
    threads: int,
) -> Plan | str:
    """Return the plan of one of OF_SOFTMAX, likewise; `read`, `upstream` and `written` are strides."""
    given = [
        strides_along(dim, shape, read),
        NOWHERE if upstream is None else strides_along(dim, shape, upstream),
        strides_along(dim, shape, written),
    ]
    known = [strides for strides in given if strides is not None]
    if len(known) < len(given):
        return NO_STRIDES
    count = Rows(math.prod(shape[:dim]), math.prod(shape[dim + 1 :]), shape[dim])
    rows, strides = flatten(count, known)
    side_by_side = all(by_class == 1 for _, _, by_class in (strides[0], strides[2]))
    tiled = rows.classes <= TILE_CLASSES or not side_by_side
    kernel = compilation.load_kernel(Key(dtype, None if upstream is None else dtype, acc, tiled, name))
    if kernel is None:
        return NO_KERNEL
    units, scratch, chunk, team = divide(rows, tiled, threads, copies=1 if upstream is None else 2)
    call = Signature(
        *rows, *strides[0], *strides[1], *strides[2], 0, 0, scratch, units, chunk, 0, 0, 0, Stage.everything
    )
    return Plan(kernel, array("q", call), team, 0, team * scratch, shape)
