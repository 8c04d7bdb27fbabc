"""Softmax by the kernels: tile choice, grid, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused.backends.triton import launch as _launch
from softmax_fused.backends.triton import layout as _layout
from softmax_fused.backends.triton import tiles as _tiles
from softmax_fused.backends.triton.launch import accumulator, plan
from softmax_fused.kernels.softmax import (
    softmax_backward,
    softmax_forward,
    softmax_long_backward,
    softmax_long_forward,
)

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused.backends.triton.tiles import Tile


def steps(rows: _layout.Rows, tile: Tile, strides: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Return a tile kernel's ROWS, CLASSES and WHOLE."""
    adjacent = all(stride[-1] == 1 for stride in strides)
    whole = rows.classes <= (_tiles.tables.contiguous_class_block if adjacent else _tiles.tables.whole_strided_classes)
    return tile.rows, _tiles.power_of_2(rows.classes) if whole else tile.classes, whole


def as_first(first: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return strides, or None where they are the first tensor's: the kernel then knows that it lies alike."""
    return None if strides == first else strides


def forward(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the softmax, or its logarithm, along `dim`."""
    out = torch.empty_like(input, dtype=dtype)
    rows = _layout.along(dim, input, out)
    input_strides, out_strides = rows.strides
    tile, programs = plan(rows, input.itemsize, _tiles.tables.two_pass, *rows.strides)
    acc = accumulator(torch.promote_types(input.dtype, dtype))
    if tile.lanes:
        kernel: Any = softmax_long_forward
        shape: tuple[int, ...] = (tile.classes, tile.lanes, tile.vector)
        strides: tuple[Any, ...] = (as_first(input_strides, out_strides), input_strides)
    else:
        kernel, shape = softmax_forward, steps(rows, tile, rows.strides)
        strides = (out_strides, input_strides)
    _launch.launch(
        kernel, programs, tile.warps, input.device,
        out, input, rows.sizes, *strides, rows.classes, log, acc, *shape,
    )  # fmt: skip
    return out


def backward(upstream: Tensor, out: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the gradient of the input, of `dtype`, from the output."""
    grad = torch.empty_like(out, dtype=dtype)
    rows = _layout.along(dim, out, upstream, grad)
    out_strides, upstream_strides, grad_strides = rows.strides
    tile, programs = plan(rows, out.itemsize, _tiles.tables.softmax_backward, *rows.strides)
    acc = accumulator(torch.promote_types(out.dtype, dtype))
    if tile.lanes:
        kernel: Any = softmax_long_backward
        shape: tuple[int, ...] = (tile.classes, tile.lanes, tile.vector)
        strides: tuple[Any, ...] = (as_first(out_strides, grad_strides), as_first(out_strides, upstream_strides))
    else:
        kernel, shape = softmax_backward, steps(rows, tile, rows.strides)
        strides = (grad_strides, upstream_strides)
    _launch.launch(
        kernel, programs, tile.warps, out.device,
        grad, upstream, out, rows.sizes, *strides, out_strides, rows.classes, log, acc, *shape,
    )  # fmt: skip
    return grad
