"""What launches have in common: Triton's dispatch, the choice of a tile, and arguments as kernels get them."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from softmax_fused.backends.triton import tiles
from softmax_fused.backends.triton.tiles import Tile, choose_tile, long_tile
from softmax_fused.kernels.reduce import cross_entropy_weights
from softmax_fused.kernels.rows import RowLayout, Strided, Tensors
from softmax_fused.kernels.targets import Target

if TYPE_CHECKING:
    from softmax_fused._spec import Spec
    from softmax_fused.backends.triton.layout import Rows, Strides
    from softmax_fused.backends.triton.tiles import LongTile

INTERPRETED = not isinstance(cross_entropy_weights, triton.JITFunction)
"""Whether the kernels run through Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""

# Triton 3.10 turns fused multiply-add off by default; the kernels count on it and are as accurate with it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


NO_TENSOR = Strided(None, None)

TARGET_TENSORS = (Tensors, (Strided,), (Target,), (Strided,))
"""Logits, their target and perhaps their gradient, see `plan.named`."""


def launch(kernel: Any, programs: int, warps: int, *args: Any) -> Any:
    """Launch `kernel` on the current device by Triton's own dispatch, and return what it compiled."""
    return kernel[(programs,)](*args, num_warps=warps, **OPTIONS)


def choose(
    rows: Rows,
    itemsize: int,
    table: tuple[LongTile, ...],
    *strides: Strides,
    streams: int = 1,
    crowded: bool = False,
) -> tuple[Tile, int]:
    """Return the tile and the number of programs, before long rows are split.

    `strides` are those of the logits and, where it is written, of the gradient: it may lie otherwise, when the logits
    share memory. `streams` and `crowded` as in `long_tile`.
    """
    adjacent = rows.classes == 1 or all(stride[-1] == 1 for stride in strides)
    if adjacent and rows.classes > tiles.tables.long_row_classes:
        return long_tile(rows.classes, itemsize, table, streams, crowded), math.prod(rows.sizes)
    tile = choose_tile(rows.classes, rows.sizes, adjacent, itemsize)
    return tile, math.prod(rows.sizes[:-1]) * -(-rows.sizes[-1] // tile.rows)


def row_layout(rows: Rows, parts: int, tile: Tile, spec: Spec) -> RowLayout:
    """Return where rows lie as kernels get it; they are unaligned where a row may begin within a vector."""
    if not spec.batch_invariant:
        return RowLayout(rows.sizes, rows.classes, parts)
    unaligned = tile.vector and any(stride % tile.vector for stride in rows.strides[0][:-1])
    return RowLayout(rows.sizes, rows.classes, parts, 1, 1 if unaligned else None)


def load_of(spec: Spec) -> dict[str, Any]:
    """Return how many rows the loss reads at once, and whether a target of all classes takes registers."""
    return {"streams": 2 if spec.target.dense else 1, "crowded": spec.has_dense_target}


def accumulator(dtype: torch.dtype) -> Any:
    """Return the type to compute in."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def split(value: float) -> tuple[float, float] | None:
    """Return a float64 as the sum of two float32, or None for 0: kernels get floats in single precision only."""
    if not value:
        return None
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def smoothing(spec: Spec) -> tuple[float | int, ...] | None:
    """Return the label smoothing as kernels get it, with the number of all classes where the logits are a slice."""
    terms = split(spec.label_smoothing)
    return (*terms, spec.classes) if terms and spec.classes else terms


def ignored(spec: Spec) -> int | tuple[int, int, int]:
    """Return the ignored index as kernels get it, with where a slice begins and the number of all classes."""
    return (spec.ignore_index, spec.first, spec.classes) if spec.classes else spec.ignore_index


def as_first(first: Strides, strides: Strides, tile: Tile) -> Strides | None:
    """Return strides, or None where they are the first tensor's and rows are long: the kernel then knows it."""
    return None if strides == first and tile.lanes else strides
