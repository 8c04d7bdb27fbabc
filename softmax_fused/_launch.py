"""The kernels' host side, and the only module that imports triton: tile choice, grid, launch."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from softmax_fused import _tiles
from softmax_fused._layout import Rows, describe
from softmax_fused._tiles import Tile, choose_tile, long_tile, power_of_2, split_rows
from softmax_fused.kernels.cross_entropy import (
    LossTensors,
    Saved,
    cross_entropy_backward,
    cross_entropy_combine,
    cross_entropy_forward,
)
from softmax_fused.kernels.reduce import LossOutputs, cross_entropy_reduce, cross_entropy_weights
from softmax_fused.kernels.rows import RowLayout, Strided
from softmax_fused.kernels.targets import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._autograd import Spec
    from softmax_fused._tiles import LongTile

INTERPRETED = not isinstance(cross_entropy_forward, triton.JITFunction)
"""Whether the kernels run through Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""

# Triton 3.10 turns fused multiply-add off by default; the kernels count on it and are as accurate with it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def launch(kernel: Any, programs: int, warps: int, device: torch.device, *args: Any) -> None:
    """Launch `kernel` on the device that holds its tensors."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=warps, **OPTIONS)


def plan(
    rows: Rows,
    itemsize: int,
    table: tuple[LongTile, ...],
    *strides: tuple[int, ...],
    streams: int = 1,
    crowded: bool = False,
) -> tuple[Tile, int]:
    """Return the tile and the number of programs, before long rows are split.

    `strides` are those of the logits and, where it is written, of the gradient: it may lie otherwise, when the logits
    share memory. `streams` and `crowded` as in `long_tile`.
    """
    adjacent = rows.classes == 1 or all(stride[-1] == 1 for stride in strides)
    if adjacent and rows.classes > _tiles.tables.long_row_classes:
        return long_tile(rows.classes, itemsize, table, streams, crowded), math.prod(rows.sizes)
    tile = choose_tile(rows.classes, rows.sizes, adjacent, itemsize)
    return tile, math.prod(rows.sizes[:-1]) * -(-rows.sizes[-1] // tile.rows)


def load_of(weight: Tensor | None, spec: Spec) -> dict[str, Any]:
    """Return how many rows the loss reads at once, and whether weights of all classes take registers."""
    return {"streams": 1 if spec.indices else 2, "crowded": weight is not None and smooths(spec)}


def accumulator(dtype: torch.dtype) -> Any:
    """Return the type to compute in."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def kind(spec: Spec) -> str:
    """Return what the kernels call this kind of target."""
    if not spec.indices:
        return "probabilities"
    return "slice indices" if spec.classes else "indices"


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
    """Return the shapes of what `loss` saves: (m, log s[, log p][, A]) of each row, and the denominator of a mean."""
    rows = logits.numel() // logits.shape[min(logits.ndim - 1, 1)]
    stats = (3 if not spec.indices or weight is None else 4, rows)
    return [stats, (1,)] if spec.reduction == "mean" else [stats]


def outputs(logits: Tensor, weight: Tensor | None, spec: Spec, programs: int, save: bool) -> LossOutputs:
    """Allocate; partial sums only where several programs compute a mean or a sum."""
    reduced = spec.reduction != "none"
    row_shape = () if reduced or logits.ndim == 1 else (logits.shape[0], *logits.shape[2:])
    return LossOutputs(
        logits.new_empty(row_shape, dtype=spec.dtype),
        logits.new_empty(saved_shapes(logits, weight, spec)[0], dtype=spec.acc) if save else None,
        logits.new_empty((2, programs), dtype=spec.acc) if reduced and programs > 1 else None,
        logits.new_empty((1,), dtype=spec.acc) if spec.reduction == "mean" else None,
    )


def saved(out: LossOutputs) -> list[Tensor]:
    """Return what `gradient` needs."""
    return [tensor for tensor in (out.stats_ptr, out.denominator_ptr) if tensor is not None]


def as_first(first: tuple[int, ...], strides: tuple[int, ...], tile: Tile) -> tuple[int, ...] | None:
    """Return strides, or None where they are the first tensor's and rows are long: the kernel then knows it."""
    return None if strides == first and tile.lanes else strides


def target_of(
    target: Tensor, weight: Tensor | None, spec: Spec, strides: tuple[int, ...], first: tuple[int, ...], tile: Tile
) -> Target:
    """Return the target as kernels get it."""
    return Target(target, as_first(first, strides, tile), packed(weight), smoothing(spec))


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: row statistics, and the denominator of a mean."""
    rows = describe(logits, target)
    logits_strides, target_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, logits_strides, **load_of(weight, spec))
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    out = outputs(logits, weight, spec, 1 if parts > 1 else programs, save)
    target_layout = target_of(target, weight, spec, target_strides, logits_strides, tile)
    tensors = LossTensors(Strided(logits, logits_strides), target_layout, None)
    layout = RowLayout(rows.sizes, rows.classes, parts)
    constants = (spec.ignore_index, kind(spec), spec.reduction, accumulator(spec.acc))
    if parts > 1:
        out = out._replace(partials_ptr=logits.new_empty((5 if smooths(spec) else 3, programs, parts), dtype=spec.acc))
    launch(
        cross_entropy_forward, programs * parts, tile.warps, logits.device,
        out, tensors, layout, *constants, _tiles.tables.weight_programs, *tile.constants(),
    )  # fmt: skip
    if parts > 1:
        launch(
            cross_entropy_combine, 1, 4, logits.device,
            out, target_layout, layout, *constants, power_of_2(programs), power_of_2(parts),
        )  # fmt: skip
    if out.sums_ptr is not None:
        launch(cross_entropy_reduce, 1, 4, logits.device, out, programs, min(1024, power_of_2(programs)))
    return out.loss_ptr, saved(out)


def smooths(spec: Spec) -> bool:
    """Whether classes other than the target class have a share of the target."""
    return not spec.indices or spec.label_smoothing > 0


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


def unless_one(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
) -> Tensor:
    """Bring `grad`, the gradient for an upstream gradient of 1, to another: rows where it is 1 are not touched."""
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
    tile, programs = plan(
        rows, logits.itemsize, _tiles.tables.one_pass, logits_strides, grad_strides, **load_of(weight, spec)
    )
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    tensors = LossTensors(
        Strided(logits, logits_strides),
        target_of(target, weight, spec, target_strides, logits_strides, tile),
        Strided(grad, as_first(logits_strides, grad_strides, tile)),
    )
    launch(
        cross_entropy_backward, programs * parts, tile.warps, logits.device,
        Saved(stats, denominator), Strided(upstream, upstream_strides), tensors,
        RowLayout(rows.sizes, rows.classes, parts), ignored(spec), wanted == "not one", kind(spec),
        accumulator(spec.acc), *tile.constants(),
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
    load = load_of(weight, spec)
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, rows.strides[0], **load)
    if tile.lanes and split_rows(programs, rows.classes, tile.classes) > 1:
        return *loss(logits, target, weight, spec, save=True), None
    grad = torch.empty_like(logits) if grad is None else grad
    rows = describe(logits, target, grad)
    logits_strides, target_strides, grad_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.two_pass, logits_strides, grad_strides, **load)
    out = outputs(logits, weight, spec, programs, True)
    target_layout = target_of(target, weight, spec, target_strides, logits_strides, tile)
    layout = RowLayout(rows.sizes, rows.classes, 1)
    acc, weight_programs = accumulator(spec.acc), _tiles.tables.weight_programs
    if out.sums_ptr is not None:
        out = out._replace(ticket_ptr=logits.new_empty((1,), dtype=torch.int32))
        if spec.reduction == "mean" and spec.indices:
            out = out._replace(weights_ptr=logits.new_empty((weight_programs,), dtype=torch.float64))
            launch(
                cross_entropy_weights, weight_programs, 4, logits.device,
                out, target_layout, layout, spec.ignore_index, acc, 1024,
            )  # fmt: skip
        else:
            out.ticket_ptr.zero_()
    grad_layout = Strided(grad, as_first(logits_strides, grad_strides, tile))
    launch(
        cross_entropy_forward, programs, tile.warps, logits.device,
        out, LossTensors(Strided(logits, logits_strides), target_layout, grad_layout), layout,
        spec.ignore_index, kind(spec), spec.reduction, acc, weight_programs, *tile.constants(),
    )  # fmt: skip
    return out.loss_ptr, saved(out), grad
