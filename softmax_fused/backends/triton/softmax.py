"""Softmax by the kernels: what a signature decides, memory, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from softmax_fused.backends.triton import tiles
from softmax_fused.backends.triton.launch import NO_TENSOR, accumulator, as_first, choose
from softmax_fused.backends.triton.layout import Strides, like, rows_of
from softmax_fused.backends.triton.plan import Launch, planned
from softmax_fused.kernels.rows import RowLayout, Strided, Tensors
from softmax_fused.kernels.softmax import softmax_backward, softmax_forward

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused.backends.triton.layout import Rows
    from softmax_fused.backends.triton.tiles import Tile

TENSORS = (Tensors, (Strided,), (Strided,), (Strided,))


class SoftmaxPlan(NamedTuple):
    """How the softmax of a signature, or its gradient, is computed: a launch, and the strides of its tensors."""

    launch: Launch
    first: Strides
    second: Strides | None
    out: Strides | None


def widen(tile: Tile, rows: Rows) -> Tile:
    """Return the tile with all classes in one block where they are few, or the tile itself."""
    if tile.lanes or rows.classes > tiles.tables.whole_strided_classes:
        return tile
    return tile._replace(classes=tiles.power_of_2(rows.classes), whole=True)


@planned
def plan_softmax(
    mode: str, dim: int, dtype: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, ...], strides: Strides,
    upstream_strides: Strides | None, device: torch.device, *_: object,
) -> SoftmaxPlan:  # fmt: skip
    """Decide how the softmax along `dim` is computed or, from an upstream gradient, its gradient.

    `_` tells signatures apart.
    """
    backward = upstream_strides is not None
    others = (upstream_strides, like(shape, strides)) if backward else (like(shape, strides),)
    rows = rows_of(shape, dim, strides, *others)
    tile, programs = choose(rows, dtype.itemsize, tiles.tables.two_pass, *rows.strides, streams=1 + backward)
    tile = widen(tile, rows)
    launch = Launch(
        softmax_backward if backward else softmax_forward, programs, tile.warps, device, (TENSORS,),
        RowLayout(rows.sizes, rows.classes, 1), mode, accumulator(torch.promote_types(dtype, out_dtype)),
        *tile.constants(),
    )  # fmt: skip
    first, *rest = rows.strides
    second, out = (as_first(first, it, tile) for it in (rest if backward else (first, *rest)))
    return SoftmaxPlan(launch, first, second, out)


def forward(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the softmax, or its logarithm, along `dim`."""
    plan = plan_softmax(
        "log" if log else "softmax", dim, input.dtype, dtype, input.shape, input.stride(), None, input.device,
        input.data_ptr() % 16,
    )  # fmt: skip
    out = torch.empty_like(input, dtype=dtype)
    plan.launch(((input, plan.first), NO_TENSOR, (out, plan.out)))
    return out


def backward(upstream: Tensor, out: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the gradient of the input, of `dtype`, from the output."""
    plan = plan_softmax(
        "log gradient" if log else "gradient", dim, out.dtype, dtype, out.shape, out.stride(), upstream.stride(),
        out.device, upstream.dtype, out.data_ptr() % 16, upstream.data_ptr() % 16,
    )  # fmt: skip
    grad = torch.empty_like(out, dtype=dtype)
    plan.launch(((out, plan.first), (upstream, plan.second), (grad, plan.out)))
    return grad
