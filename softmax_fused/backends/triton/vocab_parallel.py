"""Statistics, loss and gradient of a slice of the classes by the kernels: what a signature decides, memory, launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from softmax_fused._spec import class_dim, row_shape
from softmax_fused.backends.torch import vocab_parallel as torch_vocab_parallel
from softmax_fused.backends.triton import cross_entropy, tiles
from softmax_fused.backends.triton.launch import (
    NO_TENSOR,
    TARGET_TENSORS,
    accumulator,
    as_first,
    choose,
    ignored,
    load_of,
    smoothing,
)
from softmax_fused.backends.triton.layout import Strides, rows_of
from softmax_fused.backends.triton.plan import Launch, planned
from softmax_fused.backends.triton.tiles import split_rows
from softmax_fused.kernels.cross_entropy import cross_entropy_forward
from softmax_fused.kernels.reduce import LossOutputs
from softmax_fused.kernels.rows import RowLayout
from softmax_fused.kernels.targets import Target
from softmax_fused.kernels.vocab_parallel import cross_entropy_from_terms, cross_entropy_terms

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import Spec


def prepare(logits: Tensor, target: Tensor, spec: Spec) -> Tensor:  # noqa: ARG001
    """Return the target: the kernels find their slice in it."""
    return target


# Statistics of the slice


class StatisticsPlan(NamedTuple):
    """How the statistics of a signature are computed."""

    launch: Launch
    out: tuple[int, int, int]  # kinds of statistics, rows, parts of a row
    logits: Strides
    target: Strides | None


@planned
def plan_statistics(
    spec: Spec, dtype: torch.dtype, shape: tuple[int, ...], strides: Strides, target_strides: Strides,
    device: torch.device, *_: object,
) -> StatisticsPlan:  # fmt: skip
    """Decide how the statistics are computed; `_` tells signatures apart."""
    rows = rows_of(shape, class_dim(len(shape)), strides, target_strides)
    tile, programs = choose(rows, dtype.itemsize, tiles.tables.one_pass, rows.strides[0], **load_of(spec))
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    launch = Launch(
        cross_entropy_forward, programs * parts, tile.warps, device, ((LossOutputs,), TARGET_TENSORS),
        RowLayout(rows.sizes, rows.classes, parts), ignored(spec), spec.reader, "none", accumulator(spec.acc),
        tiles.tables.weight_programs, 1, 1, *tile.constants(),
    )  # fmt: skip
    out = (5 if spec.has_dense_target else 3, math.prod(rows.sizes), parts)
    return StatisticsPlan(launch, out, rows.strides[0], as_first(rows.strides[0], rows.strides[1], tile))


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return m, s and the target class's logit of each row of the slice.

    Where other classes have a share of the target, sum a and <a, z - m> follow.
    """
    if not logits.numel():
        return torch_vocab_parallel.statistics(logits, target, weight, spec)
    if weight is not None:
        weight = weight.contiguous()
    plan = plan_statistics(
        spec, logits.dtype, logits.shape, logits.stride(), target.stride(), logits.device, target.dtype,
        logits.data_ptr() % 16, target.data_ptr() % 16,
        weight is not None and (weight.dtype, weight.data_ptr() % 16),
    )  # fmt: skip
    out = torch.empty(plan.out, dtype=spec.acc, device=logits.device)
    plan.launch(
        (None, out, None, None, None),
        ((logits, plan.logits), (target, plan.target, weight, smoothing(spec)), NO_TENSOR),
    )
    return merge(out) if plan.out[2] > 1 else out.squeeze(2)


def merge(partials: Tensor) -> Tensor:
    """Merge the parts of rows, (kinds, rows, parts)."""
    m = partials[0].amax(1, keepdim=True)
    delta = partials[0] - m
    out = partials.new_empty(partials.shape[:2])
    out[0], out[1], out[2] = m.squeeze(1), (partials[1] * delta.exp()).sum(1), partials[2].sum(1)
    if len(partials) == 5:
        total, dot = partials[3:]
        out[3] = total.sum(1)
        out[4] = (dot + (total * delta).masked_fill_(total == 0, 0)).sum(1)
    return out


# What ranks add up, and the loss from its sum


@planned
def plan_terms(
    spec: Spec, number: int, classes: int, device: torch.device, weighted: bool, finalizes: bool, *_: object
) -> Launch:
    """Decide how the terms are computed or, with `finalizes`, the loss from their sums; `_` tells signatures apart."""
    block = tiles.tables.row_block
    programs = -(-number // block)
    layout = RowLayout((number,), classes, 1)
    if finalizes:
        return Launch(
            cross_entropy_from_terms, programs, 4, device, ((LossOutputs,), None, None, (Target,)),
            layout, ignored(spec), spec.has_dense_target, weighted, spec.reader, spec.reduction, accumulator(spec.acc),
            block,
        )  # fmt: skip
    return Launch(
        cross_entropy_terms, programs, 4, device, (None, None, None, (Target,)),
        layout, ignored(spec), spec.has_dense_target, spec.reader, accumulator(spec.acc), block,
    )  # fmt: skip


def labels(target: Tensor, spec: Spec) -> Tensor | None:
    """Return class indices one after another; of class probabilities the kernels want nothing more."""
    return target.contiguous() if spec.target.has_labels else None


def terms(parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return what is summed over ranks, from the slice's statistics and the m of all slices."""
    if not logits.numel():
        return torch_vocab_parallel.terms(parts, m, logits, target, weight, spec)
    indices = labels(target, spec)
    if weight is not None:
        weight = weight.contiguous()
    kinds = (3 if spec.has_dense_target else 1) + (0 if indices is None else 1 if weight is None else 2)
    out = torch.empty((kinds, len(m)), dtype=m.dtype, device=m.device)
    launch = plan_terms(
        spec, len(m), logits.shape[class_dim(logits.ndim)], m.device, weight is not None, False,
        parts.data_ptr() % 16, m.data_ptr() % 16, indices is not None and indices.data_ptr() % 16,
        weight is not None and (weight.dtype, weight.data_ptr() % 16),
    )  # fmt: skip
    launch(out, parts, m, (indices, (1, 0), weight, smoothing(spec)))
    return out


def finalize(
    sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `gradient` needs, from the sums over ranks."""
    number = len(m)
    if not number:
        return torch_vocab_parallel.finalize(sums, m, logits, target, weight, spec)
    indices = labels(target, spec)
    launch = plan_terms(
        spec, number, spec.classes, m.device, weight is not None, True,
        sums.data_ptr() % 16, m.data_ptr() % 16, indices is not None and indices.data_ptr() % 16,
    )  # fmt: skip
    reduced = spec.reduction != "none"
    has_ticket = reduced and launch.programs > 1
    size = cross_entropy.saved_size(number, weight is not None, spec) + 2 * launch.programs * has_ticket
    loss = torch.empty(() if reduced else row_shape(logits.shape), dtype=spec.dtype, device=m.device)
    scratch = torch.empty(size, dtype=m.dtype, device=m.device)
    out = (loss, scratch, 1, launch.ticket() if has_ticket else None, None)
    launch(out, sums, m, (indices, (1, 0), None, smoothing(spec)))
    return loss, [scratch]


gradient = cross_entropy.gradient
"""The plain loss's: the row statistics it reads are those of all slices together."""
