"""The kernels' host side, and the only module that imports triton: tile choice, grid, launch."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from softmax_fused.backends.triton import tiles as _tiles
from softmax_fused.backends.triton.layout import Rows, describe
from softmax_fused.backends.triton.tiles import Tile, choose_tile, long_tile, power_of_2, split_rows
from softmax_fused.kernels import rows as readers
from softmax_fused.kernels.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_both,
    cross_entropy_forward,
    cross_entropy_reduce,
    cross_entropy_weights,
)
from softmax_fused.kernels.long_rows import (
    cross_entropy_combine,
    cross_entropy_long_backward,
    cross_entropy_long_both,
    cross_entropy_long_forward,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Spec
    from softmax_fused.backends.triton.tiles import LongTile

INTERPRETED = not isinstance(cross_entropy_forward, triton.JITFunction)
"""Whether the kernels run through Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""

# Triton 3.10 turns fused multiply-add off by default; the kernels count on it and are as accurate with it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def launch(kernel: Any, programs: int, warps: int, device: torch.device, *args: Any) -> None:
    """Launch `kernel` on the device that holds its tensors."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=warps, **OPTIONS)


def plan(rows: Rows, itemsize: int, table: tuple[LongTile, ...], *strides: tuple[int, ...]) -> tuple[Tile, int]:
    """Return the tile and the number of programs, before long rows are split.

    `strides` are those of the logits and, where it is written, of the gradient: it may lie otherwise, when the logits
    share memory.
    """
    adjacent = rows.classes == 1 or all(stride[-1] == 1 for stride in strides)
    if adjacent and rows.classes > _tiles.tables.long_row_classes:
        return long_tile(rows.classes, itemsize, table), math.prod(rows.sizes)
    tile = choose_tile(rows.classes, rows.sizes, adjacent, itemsize)
    return tile, math.prod(rows.sizes[:-1]) * -(-rows.sizes[-1] // tile.rows)


def accumulator(dtype: torch.dtype) -> Any:
    """Return the type to compute in."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def constants(spec: Spec) -> tuple[Any, Any]:
    """Return the target helper and the accumulation type."""
    return getattr(readers, spec.reader), accumulator(spec.acc)


def packed(weight: Tensor | None) -> Tensor | None:
    """Return the class weights without gaps: C numbers, cheaper to copy than to address by a stride."""
    return None if weight is None else weight.contiguous()


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


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
    """Return the shapes of what `loss` saves: (m, log s[, A]) of each row, and the denominator of a mean."""
    rows = logits.numel() // logits.shape[min(logits.ndim - 1, 1)]
    stats = (rows, 2 + spec.saves_target_sum(weight))
    return [stats, (1,)] if spec.reduction == "mean" else [stats]


class Outputs(NamedTuple):
    """What a loss kernel fills, None where nobody asks for it."""

    loss: Tensor
    stats: Tensor | None
    sums: Tensor | None
    denominator: Tensor | None

    def saved(self) -> list[Tensor]:
        """Return what `gradient` needs."""
        return [tensor for tensor in (self.stats, self.denominator) if tensor is not None]


def outputs(logits: Tensor, weight: Tensor | None, spec: Spec, programs: int, save: bool) -> Outputs:
    """Allocate; partial sums only where several programs compute a mean or a sum."""
    reduced = spec.reduction != "none"
    row_shape = () if reduced or logits.ndim == 1 else (logits.shape[0], *logits.shape[2:])
    return Outputs(
        logits.new_empty(row_shape, dtype=spec.dtype),
        logits.new_empty(saved_shapes(logits, weight, spec)[0], dtype=spec.acc) if save else None,
        logits.new_empty((2, programs), dtype=spec.acc) if reduced and programs > 1 else None,
        logits.new_empty((1,), dtype=spec.acc) if spec.reduction == "mean" else None,
    )


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: row statistics, and the denominator of a mean."""
    rows = describe(logits, target)
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, rows.strides[0])
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    out = outputs(logits, weight, spec, 1 if parts > 1 else programs, save)
    helper, acc = constants(spec)
    weight = packed(weight)
    inputs = (logits, target, weight, rows.sizes, *rows.strides, rows.classes)
    options = (spec.ignore_index, split(spec.label_smoothing), helper, spec.reduction, acc)
    device = logits.device
    if not tile.lanes:
        launch(
            cross_entropy_forward, programs, tile.warps, device,
            out.loss, out.stats, out.sums, out.denominator, *inputs, *options, tile.rows, tile.classes,
        )  # fmt: skip
    else:
        pieces = logits.new_empty((4, programs, parts), dtype=spec.acc) if parts > 1 else None
        launch(
            cross_entropy_long_forward, programs * parts, tile.warps, device,
            out.loss, out.stats, out.sums, out.denominator, pieces, *inputs, parts, *options,
            tile.classes, tile.lanes, tile.vector,
        )  # fmt: skip
        if pieces is not None:
            launch(
                cross_entropy_combine, 1, 4, device,
                out.loss, out.stats, out.denominator, pieces, *inputs, parts, *options,
                power_of_2(programs), power_of_2(parts),
            )  # fmt: skip
    if out.sums is not None:
        block = min(1024, power_of_2(programs))
        launch(cross_entropy_reduce, 1, 4, device, out.loss, out.denominator, out.sums, programs, block)
    return out.loss, out.saved()


def gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits from what `loss` saved; `upstream` is a scalar or has the rows' shape.

    It is written to `grad` where given, which may be the logits themselves.
    """
    grad = torch.empty_like(logits) if grad is None else grad
    return fill_gradient(upstream, logits, target, weight, saved, spec, grad, "all")


def rescale_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
) -> Tensor:
    """Rescale `grad`, computed for an upstream gradient of 1: rows where it is 1 are not touched."""
    return fill_gradient(upstream, logits, target, weight, saved, spec, grad, "not one")


def fill_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
    wanted: str,
) -> Tensor:
    """Launch the backward kernel for all rows, or for those whose upstream gradient is not 1."""
    stats, denominator = saved if spec.reduction == "mean" else (saved[0], None)
    if spec.reduction != "none":
        upstream = upstream.expand((*logits.shape[: min(logits.ndim - 1, 1)], *logits.shape[2:]))
    rows = describe(logits, target, grad, upstream)
    logits_strides, target_strides, grad_strides, upstream_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, logits_strides, grad_strides)
    helper, acc = constants(spec)
    tensors = (grad, stats, upstream, denominator, logits, target, packed(weight), rows.sizes)
    options = (ignored(spec), smoothing(spec), wanted == "not one", helper, acc)
    if not tile.lanes:
        launch(
            cross_entropy_backward, programs, tile.warps, logits.device,
            *tensors, grad_strides, upstream_strides, logits_strides, target_strides,
            rows.classes, *options, tile.rows, tile.classes,
        )  # fmt: skip
        return grad
    parts = split_rows(programs, rows.classes, tile.classes)
    launch(
        cross_entropy_long_backward, programs * parts, tile.warps, logits.device,
        *tensors, None if grad_strides == logits_strides else grad_strides, upstream_strides, logits_strides,
        target_strides, rows.classes, parts, *options, tile.classes, tile.lanes, tile.vector,
    )  # fmt: skip
    return grad


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Compute the loss, what `gradient` needs, and the gradient for an upstream gradient of 1.

    It is written to `grad` where given, which may be the logits themselves. No gradient where rows are few and long:
    splitting them over programs, as `loss` does, is faster.
    """
    rows = describe(logits, target)
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.two_pass, rows.strides[0])
    if tile.lanes and split_rows(programs, rows.classes, tile.classes) > 1:
        return *loss(logits, target, weight, spec, save=True), None
    grad = torch.empty_like(logits) if grad is None else grad
    rows = describe(logits, target, grad)
    logits_strides, target_strides, grad_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.two_pass, logits_strides, grad_strides)
    out = outputs(logits, weight, spec, programs, True)
    helper, acc = constants(spec)
    options = (spec.ignore_index, split(spec.label_smoothing))
    weight, ticket, weights = packed(weight), None, None
    if out.sums is not None:
        ticket = logits.new_empty((1,), dtype=torch.int32)
        if spec.reduction == "mean" and spec.target.weighted_mean:
            programs_of_weights = _tiles.tables.weight_programs
            weights = logits.new_empty((programs_of_weights,), dtype=torch.float64)
            launch(
                cross_entropy_weights, programs_of_weights, 4, logits.device,
                weights, ticket, target, weight, rows.sizes, target_strides, rows.classes, spec.ignore_index, acc, 1024,
            )  # fmt: skip
        else:
            ticket.zero_()
    if tile.lanes:
        kernel: Any = cross_entropy_long_both
        steps: tuple[int, ...] = (tile.classes, tile.lanes, tile.vector)
        out_strides = None if grad_strides == logits_strides else grad_strides
    else:
        kernel, steps, out_strides = cross_entropy_both, (tile.rows, tile.classes), grad_strides
    launch(
        kernel, programs, tile.warps, logits.device,
        out.loss, grad, out.stats, out.sums, ticket, weights, out.denominator, logits, target, weight,
        rows.sizes, out_strides, logits_strides, target_strides, rows.classes, *options, math.prod(rows.sizes),
        helper, spec.reduction, acc, _tiles.tables.weight_programs, *steps,
    )  # fmt: skip
    return out.loss, out.saved(), grad
