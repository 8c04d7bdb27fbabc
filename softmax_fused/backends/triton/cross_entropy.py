"""The loss and its gradient by the kernels: what a signature decides, memory, launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from softmax_fused._spec import class_dim, row_shape
from softmax_fused.backends.triton import tiles
from softmax_fused.backends.triton.launch import (
    NO_TENSOR,
    TARGET_TENSORS,
    accumulator,
    as_first,
    choose,
    ignored,
    load_of,
    row_layout,
    smoothing,
)
from softmax_fused.backends.triton.layout import Strides, like, rows_of
from softmax_fused.backends.triton.plan import Launch, planned
from softmax_fused.backends.triton.tiles import Tile, power_of_2, split_rows
from softmax_fused.kernels.cross_entropy import Upstream, cross_entropy_backward, cross_entropy_forward
from softmax_fused.kernels.reduce import LossOutputs, cross_entropy_weights
from softmax_fused.kernels.targets import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Spec

WEIGHT_LANES = 1024
"""Rows at a time in a program that sums a mean's denominator."""


def saved_size(rows: int, weighted: bool, spec: Spec) -> int:
    """Return how many numbers are saved: m, log s[, log p of the target class][, A] of a row, and a mean's denominator.

    The kernels count likewise, see `statistics_size`.
    """
    numbers = 2 + spec.target.has_labels + (weighted or not spec.target.unit_sum)
    return numbers * rows + int(spec.reduction == "mean")  # rows may be symbolic, to which torch adds no bool


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
    """Return the shapes of what `loss` saves; behind it lies scratch memory that may be cut off."""
    return [(saved_size(logits.numel() // logits.shape[class_dim(logits.ndim)], weight is not None, spec),)]


def parts_of_rows(programs: int, classes: int, tile: Tile, spec: Spec) -> int:
    """Return over how many programs each row is split: over one where the number of rows must not show in its bits."""
    return split_rows(programs, classes, tile.classes) if tile.lanes and not spec.batch_invariant else 1


# The loss, perhaps with the gradient


class LossPlan(NamedTuple):
    """How the loss of a signature is computed, perhaps with its gradient."""

    launch: Launch
    loss: Tensor  # of its shape and dtype: torch.empty_like is cheaper than new_empty, which parses both
    scratch: int  # numbers of scratch memory; those that are saved come first
    saves: int | None
    has_ticket: bool
    logits: Strides
    target: tuple[Strides | None, tuple[float, ...] | None]  # strides; smoothing
    grad: Strides | None = None
    weights: Launch | None = None  # sums a mean's denominator first, where the gradient needs it


@planned
def plan_loss(
    spec: Spec, save: bool, with_grad: bool, dtype: torch.dtype, shape: tuple[int, ...], strides: Strides,
    target_strides: Strides, grad_strides: Strides | None, weighted: bool, device: torch.device, *_: object,
) -> LossPlan | None:  # fmt: skip
    """Decide how the loss is computed, None where its gradient is better computed apart; `_` tells signatures apart.

    Rows that are few and long are split over programs, which the gradient in the same launch cannot be.
    """
    others = [target_strides]
    if with_grad:
        others.append(like(shape, strides) if grad_strides is None else grad_strides)
    rows = rows_of(shape, class_dim(len(shape)), strides, *others)
    load = load_of(spec)
    tile, programs = choose(rows, dtype.itemsize, tiles.tables.one_pass, rows.strides[0], **load)
    parts = parts_of_rows(programs, rows.classes, tile, spec)
    if with_grad:
        if parts > 1:
            return None
        tile, programs = choose(rows, dtype.itemsize, tiles.tables.two_pass, rows.strides[0], rows.strides[2], **load)
    number, reduced = math.prod(rows.sizes), spec.reduction != "none"
    has_ticket = parts > 1 or (reduced and programs > 1)
    scratch = saved_size(number, weighted, spec) if save else 0
    if parts > 1:
        scratch += (5 if spec.has_dense_target else 3) * number * parts
    elif has_ticket:
        scratch += 2 * programs
    layout = row_layout(rows, parts, tile, spec)
    constants = (spec.reader, spec.reduction, accumulator(spec.acc), tiles.tables.weight_programs)
    launch = Launch(
        cross_entropy_forward, programs * parts, tile.warps, device, ((LossOutputs,), TARGET_TENSORS),
        layout, ignored(spec), *constants, power_of_2(number) if parts > 1 else 1, power_of_2(parts), *tile.constants(),
    )  # fmt: skip
    weights = None
    if with_grad and has_ticket and spec.reduction == "mean" and spec.target.weighted_mean:
        weights = Launch(
            cross_entropy_weights, tiles.tables.weight_programs, 4, device, (None, (Target,)),
            layout, spec.ignore_index, accumulator(spec.acc), WEIGHT_LANES,
        )  # fmt: skip
    return LossPlan(
        launch,
        torch.empty((), dtype=spec.dtype, device=device).expand(() if reduced else row_shape(shape)),
        scratch,
        1 if save else None,
        has_ticket,
        rows.strides[0],
        (as_first(rows.strides[0], rows.strides[1], tile), smoothing(spec)),
        as_first(rows.strides[0], rows.strides[2], tile) if with_grad else None,
        weights,
    )


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: row statistics, and the denominator of a mean."""
    if weight is not None:
        weight = weight.contiguous()
    plan = plan_loss(
        spec, save, False, logits.dtype, logits.shape, logits.stride(), target.stride(), None, weight is not None,
        logits.device, target.dtype, logits.data_ptr() % 16, target.data_ptr() % 16,
        weight is not None and (weight.dtype, weight.data_ptr() % 16),
    )  # fmt: skip
    out = torch.empty_like(plan.loss)
    scratch = logits.new_empty(plan.scratch, dtype=spec.acc) if plan.scratch else None
    launch, (target_strides, smoothed) = plan.launch, plan.target
    launch(
        (out, scratch, plan.saves, launch.ticket() if plan.has_ticket else None, None),
        ((logits, plan.logits), (target, target_strides, weight, smoothed), NO_TENSOR),
    )
    return out, [] if scratch is None else [scratch]


def loss_and_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: Spec,
    grad: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Compute the loss, what `gradient` needs, and the gradient for an upstream gradient of 1.

    It is written to `grad` where given, which may be the logits themselves. No gradient where rows are few and long:
    splitting them over programs, as `loss` does, is faster.
    """
    device = logits.device
    if weight is not None:
        weight = weight.contiguous()
    plan = plan_loss(
        spec, True, True, logits.dtype, logits.shape, logits.stride(), target.stride(),
        None if grad is None else grad.stride(), weight is not None, device, target.dtype, logits.data_ptr() % 16,
        target.data_ptr() % 16, weight is not None and (weight.dtype, weight.data_ptr() % 16),
        grad is not None and grad.data_ptr() % 16,
    )  # fmt: skip
    if plan is None:
        return *loss(logits, target, weight, spec, save=True), None
    grad = torch.empty_like(logits) if grad is None else grad
    out = torch.empty_like(plan.loss)
    scratch = logits.new_empty(plan.scratch, dtype=spec.acc)
    launch, (target_strides, smoothed) = plan.launch, plan.target
    weights = None
    if plan.weights is not None:
        weights = torch.empty(tiles.tables.weight_programs, dtype=torch.float64, device=device)
        plan.weights(weights, (target, target_strides, weight, None))
    launch(
        (out, scratch, plan.saves, launch.ticket() if plan.has_ticket else None, weights),
        ((logits, plan.logits), (target, target_strides, weight, smoothed), (grad, plan.grad)),
    )
    return out, [scratch], grad


# The gradient


class GradientPlan(NamedTuple):
    """How the gradient of a signature is computed."""

    launch: Launch
    upstream: Strides
    mean: int | None
    logits: Strides
    target: tuple[Strides | None, tuple[float, ...] | None]  # strides; smoothing
    grad: Strides | None


@planned
def plan_gradient(
    spec: Spec, rescale: bool, dtype: torch.dtype, shape: tuple[int, ...], strides: Strides, target_strides: Strides,
    grad_strides: Strides | None, upstream_strides: Strides, device: torch.device, *_: object,
) -> GradientPlan:  # fmt: skip
    """Decide how the gradient is computed; `_` tells signatures apart."""
    if grad_strides is None:
        grad_strides = like(shape, strides)
    if spec.reduction != "none":  # the one number is every row's
        upstream_strides = (0,) * len(row_shape(shape))
    rows = rows_of(shape, class_dim(len(shape)), strides, target_strides, grad_strides, upstream_strides)
    first, target, grad, upstream = rows.strides
    tile, programs = choose(rows, dtype.itemsize, tiles.tables.one_pass, first, grad, **load_of(spec))
    parts = parts_of_rows(programs, rows.classes, tile, spec)
    launch = Launch(
        cross_entropy_backward, programs * parts, tile.warps, device, (None, (Upstream,), TARGET_TENSORS),
        row_layout(rows, parts, tile, spec), ignored(spec), rescale, spec.reader, accumulator(spec.acc),
        *tile.constants(),
    )  # fmt: skip
    return GradientPlan(
        launch,
        upstream,
        1 if spec.reduction == "mean" else None,
        first,
        (as_first(first, target, tile), smoothing(spec)),
        as_first(first, grad, tile),
    )


def gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor | None = None,
    rescale: bool = False,
) -> Tensor:
    """Compute the gradient of the logits from what `loss` saved; `upstream` is a scalar or has the rows' shape.

    It is written to `grad` where given, which may be the logits themselves; with `rescale` only in rows whose upstream
    gradient is not 1.
    """
    (scratch,) = saved
    if weight is not None:
        weight = weight.contiguous()
    plan = plan_gradient(
        spec, rescale, logits.dtype, logits.shape, logits.stride(), target.stride(),
        None if grad is None else grad.stride(), upstream.stride(), logits.device, target.dtype, upstream.dtype,
        upstream.data_ptr() % 16, logits.data_ptr() % 16, target.data_ptr() % 16,
        weight is not None and (weight.dtype, weight.data_ptr() % 16), grad is not None and grad.data_ptr() % 16,
    )  # fmt: skip
    grad = torch.empty_like(logits) if grad is None else grad
    target_strides, smoothed = plan.target
    plan.launch(
        scratch,
        (upstream, plan.upstream, plan.mean),
        ((logits, plan.logits), (target, target_strides, weight, smoothed), (grad, plan.grad)),
    )
    return grad


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
    return gradient(upstream, logits, target, weight, saved, spec, grad, rescale=True)
