"""Several outputs of each row by the kernels: what a signature decides, memory, launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from softmax_fused._row_outputs import DIFFERENTIABLE
from softmax_fused._spec import class_dim
from softmax_fused.backends.triton import tiles
from softmax_fused.backends.triton.launch import (
    NO_TENSOR,
    accumulator,
    as_first,
    choose,
    ignored,
    load_of,
    row_layout,
    smoothing,
    split,
)
from softmax_fused.backends.triton.layout import Strides, like, rows_of
from softmax_fused.backends.triton.plan import Launch, planned
from softmax_fused.kernels.row_outputs import (
    RowPointers,
    RowTarget,
    RowUpstream,
    row_outputs_backward,
    row_outputs_forward,
)
from softmax_fused.kernels.rows import Strided, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowSpec, Upstream

TENSORS = (Tensors, (Strided,), (RowTarget, *[None] * 6, (Strided,)), (Strided,))


def transform(options: RowSpec) -> tuple[Any, Any]:
    """Return (scale / softcap, softcap), (scale, None) or, where nothing is to be done, (None, None)."""
    if options.softcap is None:
        return None if options.scale == 1 else parts(options.scale), None
    return parts(options.scale / options.softcap), parts(options.softcap)


def parts(value: float) -> tuple[float, float]:
    """Return a float64 as the sum of two float32."""
    return split(value) or (0.0, 0.0)


class RowsPlan(NamedTuple):
    """How the outputs of rows of a signature, or their gradient, are computed."""

    launch: Launch
    logits: Strides
    target: Strides | None
    options: tuple[Any, ...]  # label smoothing, scale and softcap, as kernels get them
    row_scale: Strides | None
    grad: Strides | None = None
    upstream: tuple[Strides | None, ...] = ()


def saved_shape(logits: Tensor) -> tuple[int, int]:
    """Return the shape of what `forward` saves: five numbers a row."""
    return 5, logits.numel() // logits.shape[class_dim(logits.ndim)]


@planned
def plan_rows(
    options: RowSpec, dtype: torch.dtype, shape: tuple[int, ...], strides: Strides, target_strides: Strides,
    scale_strides: Strides | None, device: torch.device, *_: object,
) -> RowsPlan:  # fmt: skip
    """Decide how the outputs are computed; `_` tells signatures apart."""
    scale = [] if scale_strides is None else [scale_strides]
    rows = rows_of(shape, class_dim(len(shape)), strides, target_strides, *scale)
    load = load_of(options.spec)
    load["crowded"] |= "entropy" in options.outputs or options.softcap is not None
    tile, programs = choose(rows, dtype.itemsize, tiles.tables.one_pass, rows.strides[0], **load)
    launch = Launch(
        row_outputs_forward, programs, tile.warps, device, ((RowPointers,), TENSORS),
        row_layout(rows, 1, tile, options.spec), ignored(options.spec), options.spec.reader,
        accumulator(options.spec.acc), *tile.constants(),
    )  # fmt: skip
    target = as_first(rows.strides[0], rows.strides[1], tile)
    numbers = smoothing(options.spec), *transform(options)
    return RowsPlan(launch, rows.strides[0], target, numbers, rows.strides[2] if scale else None)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: RowSpec,
    save: bool,
    row_scale: Tensor | None = None,
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for and, with `save`, what `gradient` needs."""
    if weight is not None:
        weight = weight.contiguous()
    plan = plan_rows(
        options, logits.dtype, logits.shape, logits.stride(), target.stride(),
        None if row_scale is None else row_scale.stride(), logits.device, save, target.dtype,
        logits.data_ptr() % 16, target.data_ptr() % 16,
        weight is not None and (weight.dtype, weight.data_ptr() % 16),
        row_scale is not None and (row_scale.dtype, row_scale.data_ptr() % 16),
    )  # fmt: skip
    out = options.allocate(logits)
    stats = torch.empty(saved_shape(logits), dtype=options.spec.acc, device=logits.device) if save else None
    scale = None if row_scale is None else (row_scale, plan.row_scale)
    of_target = (target, plan.target, weight, *plan.options, scale)
    plan.launch((*out, stats), ((logits, plan.logits), of_target, NO_TENSOR))
    return out, stats


@planned
def plan_rows_gradient(
    options: RowSpec, dtype: torch.dtype, shape: tuple[int, ...], strides: Strides, target_strides: Strides,
    grad_strides: Strides | None, upstream_strides: tuple[Strides | None, ...], scale_strides: Strides | None,
    device: torch.device, *_: object,
) -> RowsPlan:  # fmt: skip
    """Decide how the gradient is computed; `_` tells signatures apart."""
    if grad_strides is None:
        grad_strides = like(shape, strides)
    given = [it for it in (*upstream_strides, scale_strides) if it is not None]
    rows = rows_of(shape, class_dim(len(shape)), strides, target_strides, grad_strides, *given)
    first, target, grad, *some = rows.strides
    load = load_of(options.spec)
    load["crowded"] |= upstream_strides[DIFFERENTIABLE.index("entropy")] is not None or options.softcap is not None
    tile, programs = choose(rows, dtype.itemsize, tiles.tables.one_pass, first, grad, **load)
    launch = Launch(
        row_outputs_backward, programs, tile.warps, device,
        (None, (RowUpstream, (Strided,), (Strided,), (Strided,), (Strided,)), TENSORS),
        row_layout(rows, 1, tile, options.spec), ignored(options.spec), options.spec.reader,
        accumulator(options.spec.acc), *tile.constants(),
    )  # fmt: skip
    merged = iter(some)
    return RowsPlan(
        launch,
        first,
        as_first(first, target, tile),
        (smoothing(options.spec), *transform(options)),
        None if scale_strides is None else some[-1],
        as_first(first, grad, tile),
        tuple(None if it is None else next(merged) for it in upstream_strides),
    )


def gradient(
    upstream: Upstream,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    options: RowSpec,
    row_scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits from those of the differentiable outputs, None where there is none.

    It is written to `grad` where given, which may be the logits themselves.
    """
    if weight is not None:
        weight = weight.contiguous()
    plan = plan_rows_gradient(
        options, logits.dtype, logits.shape, logits.stride(), target.stride(), None if grad is None else grad.stride(),
        tuple([None if g is None else g.stride() for g in upstream]),
        None if row_scale is None else row_scale.stride(), logits.device, target.dtype,
        logits.data_ptr() % 16, target.data_ptr() % 16,
        weight is not None and (weight.dtype, weight.data_ptr() % 16),
        row_scale is not None and (row_scale.dtype, row_scale.data_ptr() % 16),
        grad is not None and grad.data_ptr() % 16, *[g is not None and (g.dtype, g.data_ptr() % 16) for g in upstream],
    )  # fmt: skip
    grad = torch.empty_like(logits) if grad is None else grad
    scale = None if row_scale is None else (row_scale, plan.row_scale)
    plan.launch(
        stats,
        tuple([None if g is None else (g, strides) for g, strides in zip(upstream, plan.upstream, strict=True)]),
        ((logits, plan.logits), (target, plan.target, weight, *plan.options, scale), (grad, plan.grad)),
    )
    return grad
