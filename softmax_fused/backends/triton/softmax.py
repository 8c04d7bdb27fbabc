"""Softmax by the kernels: tile choice, grid, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused.backends.triton import launch, layout, tiles
from softmax_fused.backends.triton.launch import NO_TENSOR, accumulator, as_first, plan
from softmax_fused.kernels.rows import RowLayout, Strided, Tensors
from softmax_fused.kernels.softmax import softmax_backward, softmax_forward

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused.backends.triton.tiles import Tile


def widen(tile: Tile, rows: layout.Rows) -> Tile:
    """Return the tile with all classes in one block where they are few, or the tile itself."""
    if tile.lanes or rows.classes > tiles.tables.whole_strided_classes:
        return tile
    return tile._replace(classes=tiles.power_of_2(rows.classes), whole=True)


def forward(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the softmax, or its logarithm, along `dim`."""
    out = torch.empty_like(input, dtype=dtype)
    rows = layout.along(dim, input, out)
    input_strides, out_strides = rows.strides
    tile, programs = plan(rows, input.itemsize, tiles.tables.two_pass, *rows.strides)
    tile = widen(tile, rows)
    launch.launch(
        softmax_forward, programs, tile.warps, input.device,
        Tensors(Strided(input, input_strides), NO_TENSOR, Strided(out, as_first(input_strides, out_strides, tile))),
        RowLayout(rows.sizes, rows.classes, 1), "log" if log else "softmax",
        accumulator(torch.promote_types(input.dtype, dtype)), *tile.constants(),
    )  # fmt: skip
    return out


def backward(upstream: Tensor, out: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the gradient of the input, of `dtype`, from the output."""
    grad = torch.empty_like(out, dtype=dtype)
    rows = layout.along(dim, out, upstream, grad)
    out_strides, upstream_strides, grad_strides = rows.strides
    tile, programs = plan(rows, out.itemsize, tiles.tables.two_pass, *rows.strides, streams=2)
    tile = widen(tile, rows)
    launch.launch(
        softmax_backward, programs, tile.warps, out.device,
        Tensors(
            Strided(out, out_strides),
            Strided(upstream, as_first(out_strides, upstream_strides, tile)),
            Strided(grad, as_first(out_strides, grad_strides, tile)),
        ),
        RowLayout(rows.sizes, rows.classes, 1), "log gradient" if log else "gradient",
        accumulator(torch.promote_types(out.dtype, dtype)), *tile.constants(),
    )  # fmt: skip
    return grad
