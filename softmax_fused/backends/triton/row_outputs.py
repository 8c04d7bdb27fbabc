"""Several outputs of each row by the kernels: tile choice, grid, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from softmax_fused.backends.triton import launch as _launch
from softmax_fused.backends.triton import tiles as _tiles
from softmax_fused.backends.triton.launch import constants, packed, plan, split
from softmax_fused.backends.triton.layout import describe
from softmax_fused.kernels.long_row_outputs import row_outputs_long_backward, row_outputs_long_forward
from softmax_fused.kernels.row_outputs import row_outputs_backward, row_outputs_forward

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


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec, save: bool
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for and, with `save`, what `gradient` needs."""
    rows = describe(logits, target)
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, rows.strides[0])
    helper, acc = constants(options.spec)
    out = options.allocate(logits)
    stats = logits.new_empty((logits.numel() // rows.classes, 4), dtype=options.spec.acc) if save else None
    if tile.lanes:
        kernel: Any = row_outputs_long_forward
        shape: tuple[int, ...] = (tile.classes, tile.lanes, tile.vector)
    else:
        kernel, shape = row_outputs_forward, (tile.rows, tile.classes)
    _launch.launch(
        kernel, programs, tile.warps, logits.device,
        *out, stats, logits, target, packed(weight), rows.sizes, *rows.strides, rows.classes,
        options.spec.ignore_index, split(options.spec.label_smoothing), *transform(options), helper, acc, *shape,
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
    strides = [None if g is None else next(upstream_strides) for g in upstream]
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, logits_strides, grad_strides)
    helper, acc = constants(options.spec)
    if tile.lanes:
        kernel: Any = row_outputs_long_backward
        shape: tuple[int, ...] = (tile.classes, tile.lanes, tile.vector)
        out_strides = None if grad_strides == logits_strides else grad_strides
    else:
        kernel, shape, out_strides = row_outputs_backward, (tile.rows, tile.classes), grad_strides
    _launch.launch(
        kernel, programs, tile.warps, logits.device,
        grad, stats, *upstream, logits, target, packed(weight), rows.sizes, out_strides, *strides, logits_strides,
        target_strides, rows.classes, options.spec.ignore_index, split(options.spec.label_smoothing),
        *transform(options), helper, acc, *shape,
    )  # fmt: skip
    return grad
