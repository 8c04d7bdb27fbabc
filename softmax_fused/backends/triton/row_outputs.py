"""Several outputs of each row by the kernels: tile choice, grid, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused.backends.triton import launch, tiles
from softmax_fused.backends.triton.launch import NO_TENSOR, accumulator, as_first, load_of, packed, plan, split
from softmax_fused.backends.triton.layout import describe
from softmax_fused.kernels.row_outputs import (
    RowPointers,
    RowTarget,
    RowUpstream,
    row_outputs_backward,
    row_outputs_forward,
)
from softmax_fused.kernels.rows import RowLayout, Strided, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowSpec, Upstream


def transform(options: RowSpec) -> tuple[Any, Any]:
    """Return (scale / softcap, softcap), (scale, None) or, where nothing is to be done, (None, None)."""
    if options.softcap is None:
        return None if options.scale == 1 else parts(options.scale), None
    return parts(options.scale / options.softcap), parts(options.softcap)


def parts(value: float) -> tuple[float, float]:
    """Return a float64 as the sum of two float32."""
    return split(value) or (0.0, 0.0)


def target_of(target: Tensor, weight: Tensor | None, options: RowSpec, strides: tuple[int, ...] | None) -> RowTarget:
    """Return the target and what is done to the logits, as kernels get them."""
    return RowTarget(target, strides, packed(weight), split(options.spec.label_smoothing), *transform(options))


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec, save: bool
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for and, with `save`, what `gradient` needs."""
    rows = describe(logits, target)
    logits_strides, target_strides = rows.strides
    load = load_of(options.spec)
    load["crowded"] |= "entropy" in options.outputs or options.softcap is not None
    tile, programs = plan(rows, logits.itemsize, tiles.tables.one_pass, logits_strides, **load)
    out = options.allocate(logits)
    stats = logits.new_empty((5, logits.numel() // rows.classes), dtype=options.spec.acc) if save else None
    target_layout = target_of(target, weight, options, as_first(logits_strides, target_strides, tile))
    launch.launch(
        row_outputs_forward, programs, tile.warps, logits.device,
        RowPointers(*out, stats), Tensors(Strided(logits, logits_strides), target_layout, NO_TENSOR),
        RowLayout(rows.sizes, rows.classes, 1), options.spec.ignore_index, options.spec.reader,
        accumulator(options.spec.acc), *tile.constants(),
    )  # fmt: skip
    return out, stats


def gradient(
    upstream: Upstream, logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor | None, options: RowSpec
) -> Tensor:
    """Compute the gradient of the logits from those of loss, logsumexp and entropy, None where not asked for."""
    grad = torch.empty_like(logits)
    given = [g for g in upstream if g is not None]
    rows = describe(logits, target, grad, *given)
    logits_strides, target_strides, grad_strides, *some = rows.strides
    upstream_strides = iter(some)
    load = load_of(options.spec)
    load["crowded"] |= upstream[2] is not None or options.softcap is not None
    tile, programs = plan(rows, logits.itemsize, tiles.tables.one_pass, logits_strides, grad_strides, **load)
    target_layout = target_of(target, weight, options, as_first(logits_strides, target_strides, tile))
    grad_layout = Strided(grad, as_first(logits_strides, grad_strides, tile))
    launch.launch(
        row_outputs_backward, programs, tile.warps, logits.device,
        stats, RowUpstream(*[None if g is None else Strided(g, next(upstream_strides)) for g in upstream]),
        Tensors(Strided(logits, logits_strides), target_layout, grad_layout),
        RowLayout(rows.sizes, rows.classes, 1), options.spec.ignore_index, options.spec.reader,
        accumulator(options.spec.acc), *tile.constants(),
    )  # fmt: skip
    return grad
