"""Statistics, loss and gradient of a slice of the classes by the kernels: tile choice, grid, launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from softmax_fused._spec import row_shape
from softmax_fused.backends.torch import vocab_parallel as torch_vocab_parallel
from softmax_fused.backends.triton import cross_entropy, launch, tiles
from softmax_fused.backends.triton.launch import (
    NO_TENSOR,
    accumulator,
    ignored,
    load_of,
    packed,
    plan,
    smoothing,
    target_of,
)
from softmax_fused.backends.triton.layout import describe
from softmax_fused.backends.triton.tiles import split_rows
from softmax_fused.kernels.cross_entropy import cross_entropy_forward
from softmax_fused.kernels.reduce import LossOutputs, cross_entropy_reduce
from softmax_fused.kernels.rows import RowLayout, Strided, Tensors
from softmax_fused.kernels.targets import Target
from softmax_fused.kernels.vocab_parallel import cross_entropy_from_terms, cross_entropy_terms

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import Spec


def prepare(logits: Tensor, target: Tensor, spec: Spec) -> Tensor:  # noqa: ARG001
    """Return the target: the kernels find their slice in it."""
    return target


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return m, s and the target class's logit of each row of the slice.

    Where other classes have a share of the target, sum a and <a, z - m> follow.
    """
    if not logits.numel():
        return torch_vocab_parallel.statistics(logits, target, weight, spec)
    rows = describe(logits, target)
    logits_strides, target_strides = rows.strides
    tile, programs = plan(rows, logits.itemsize, tiles.tables.one_pass, logits_strides, **load_of(spec))
    number = math.prod(rows.sizes)
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    out = logits.new_empty((5 if spec.has_dense_target else 3, number, parts), dtype=spec.acc)
    target_layout = target_of(target, weight, spec, target_strides, logits_strides, tile)
    launch.launch(
        cross_entropy_forward, programs * parts, tile.warps, logits.device,
        LossOutputs(partials_ptr=out), Tensors(Strided(logits, logits_strides), target_layout, NO_TENSOR),
        RowLayout(rows.sizes, rows.classes, parts), ignored(spec), spec.reader, "none", accumulator(spec.acc),
        tiles.tables.weight_programs, *tile.constants(),
    )  # fmt: skip
    return merge(out) if parts > 1 else out.squeeze(2)


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


def row_target(target: Tensor, weight: Tensor | None, spec: Spec) -> Target:
    """Return class indices one after another; of class probabilities the kernels want nothing more."""
    return Target(target.contiguous() if spec.target.has_labels else None, (1, 0), packed(weight), smoothing(spec))


def terms(parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return what is summed over ranks, from the slice's statistics and the m of all slices."""
    if not logits.numel():
        return torch_vocab_parallel.terms(parts, m, logits, target, weight, spec)
    number, block = len(m), tiles.tables.row_block
    kinds = (3 if spec.has_dense_target else 1) + (0 if not spec.target.has_labels else 1 if weight is None else 2)
    out = m.new_empty((kinds, number))
    launch.launch(
        cross_entropy_terms, -(-number // block), 4, logits.device,
        out, parts, m, row_target(target, weight, spec), RowLayout((number,), logits.shape[1], 1),
        ignored(spec), spec.has_dense_target, spec.reader, accumulator(spec.acc), block,
    )  # fmt: skip
    return out


def finalize(
    sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `gradient` needs, from the sums over ranks."""
    number, block = len(m), tiles.tables.row_block
    if not number:
        return torch_vocab_parallel.finalize(sums, m, logits, target, weight, spec)
    programs = -(-number // block)
    reduced = spec.reduction != "none"
    out = LossOutputs(
        m.new_empty(() if reduced else row_shape(logits.shape), dtype=spec.dtype),
        m.new_empty((cross_entropy.saved_numbers(weight, spec), number)),
        m.new_empty((2, programs)) if reduced and programs > 1 else None,
        m.new_empty((1,)) if spec.reduction == "mean" else None,
    )
    launch.launch(
        cross_entropy_from_terms, programs, 4, logits.device,
        out, sums, m, row_target(target, None, spec), RowLayout((number,), spec.classes, 1),
        ignored(spec), spec.has_dense_target, weight is not None, spec.reader, spec.reduction, accumulator(spec.acc),
        block,
    )  # fmt: skip
    if out.sums_ptr is not None:
        launch.launch(cross_entropy_reduce, 1, 4, logits.device, out, programs, 256)
    return out.loss_ptr, cross_entropy.saved(out)


gradient = cross_entropy.gradient
"""The plain loss's: the row statistics it reads are those of all slices together."""
