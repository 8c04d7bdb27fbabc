"""The loss and its gradient by the kernels: tile choice, grid, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused.backends.triton import launch, tiles
from softmax_fused.backends.triton.launch import NO_TENSOR, accumulator, as_first, ignored, load_of, plan, target_of
from softmax_fused.backends.triton.layout import describe
from softmax_fused.backends.triton.tiles import power_of_2, split_rows
from softmax_fused.kernels.cross_entropy import (
    Saved,
    cross_entropy_backward,
    cross_entropy_combine,
    cross_entropy_forward,
)
from softmax_fused.kernels.reduce import LossOutputs, cross_entropy_reduce, cross_entropy_weights
from softmax_fused.kernels.rows import RowLayout, Strided, Tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Spec


def saved_numbers(weight: Tensor | None, spec: Spec) -> int:
    """Return how many numbers of a row are saved: m, log s[, log p of the target class][, A]."""
    return 2 + spec.target.has_labels + spec.saves_target_sum(weight)


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
    """Return the shapes of what `loss` saves: (m, log s[, log p][, A]) of each row, and the denominator of a mean."""
    rows = logits.numel() // logits.shape[min(logits.ndim - 1, 1)]
    stats = (saved_numbers(weight, spec), rows)
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


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: row statistics, and the denominator of a mean."""
    rows = describe(logits, target)
    logits_strides, target_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, tiles.tables.one_pass, logits_strides, **load_of(spec))
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    out = outputs(logits, weight, spec, 1 if parts > 1 else programs, save)
    target_layout = target_of(target, weight, spec, target_strides, logits_strides, tile)
    tensors = Tensors(Strided(logits, logits_strides), target_layout, NO_TENSOR)
    layout = RowLayout(rows.sizes, rows.classes, parts)
    constants = (spec.ignore_index, spec.reader, spec.reduction, accumulator(spec.acc))
    if parts > 1:
        out = out._replace(
            partials_ptr=logits.new_empty((5 if spec.has_dense_target else 3, programs, parts), dtype=spec.acc)
        )
    launch.launch(
        cross_entropy_forward, programs * parts, tile.warps, logits.device,
        out, tensors, layout, *constants, tiles.tables.weight_programs, *tile.constants(),
    )  # fmt: skip
    if parts > 1:
        launch.launch(
            cross_entropy_combine, 1, 4, logits.device,
            out, target_layout, layout, *constants, power_of_2(programs), power_of_2(parts),
        )  # fmt: skip
    if out.sums_ptr is not None:
        launch.launch(cross_entropy_reduce, 1, 4, logits.device, out, programs, min(1024, power_of_2(programs)))
    return out.loss_ptr, saved(out)


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
    tile, programs = plan(rows, logits.itemsize, tiles.tables.one_pass, logits_strides, grad_strides, **load_of(spec))
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    tensors = Tensors(
        Strided(logits, logits_strides),
        target_of(target, weight, spec, target_strides, logits_strides, tile),
        Strided(grad, as_first(logits_strides, grad_strides, tile)),
    )
    launch.launch(
        cross_entropy_backward, programs * parts, tile.warps, logits.device,
        Saved(stats, denominator), Strided(upstream, upstream_strides), tensors,
        RowLayout(rows.sizes, rows.classes, parts), ignored(spec), wanted == "not one", spec.reader,
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
    load = load_of(spec)
    tile, programs = plan(rows, logits.itemsize, tiles.tables.one_pass, rows.strides[0], **load)
    if tile.lanes and split_rows(programs, rows.classes, tile.classes) > 1:
        return *loss(logits, target, weight, spec, save=True), None
    grad = torch.empty_like(logits) if grad is None else grad
    rows = describe(logits, target, grad)
    logits_strides, target_strides, grad_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, tiles.tables.two_pass, logits_strides, grad_strides, **load)
    out = outputs(logits, weight, spec, programs, True)
    target_layout = target_of(target, weight, spec, target_strides, logits_strides, tile)
    layout = RowLayout(rows.sizes, rows.classes, 1)
    acc, weight_programs = accumulator(spec.acc), tiles.tables.weight_programs
    if out.sums_ptr is not None:
        out = out._replace(ticket_ptr=logits.new_empty((1,), dtype=torch.int32))
        if spec.reduction == "mean" and spec.target.weighted_mean:
            out = out._replace(weights_ptr=logits.new_empty((weight_programs,), dtype=torch.float64))
            launch.launch(
                cross_entropy_weights, weight_programs, 4, logits.device,
                out, target_layout._replace(smoothing=None), layout, spec.ignore_index, acc, 1024,
            )  # fmt: skip
        else:
            out.ticket_ptr.zero_()
    grad_layout = Strided(grad, as_first(logits_strides, grad_strides, tile))
    launch.launch(
        cross_entropy_forward, programs, tile.warps, logits.device,
        out, Tensors(Strided(logits, logits_strides), target_layout, grad_layout), layout,
        spec.ignore_index, spec.reader, spec.reduction, acc, weight_programs, *tile.constants(),
    )  # fmt: skip
    return out.loss_ptr, saved(out), grad
