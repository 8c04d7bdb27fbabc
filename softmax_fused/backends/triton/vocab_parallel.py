"""Statistics, loss and gradient of a slice of the classes by the kernels: tile choice, grid, launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from softmax_fused._spec import row_shape
from softmax_fused.backends.torch import vocab_parallel as _torch_slices
from softmax_fused.backends.triton import launch as _launch
from softmax_fused.backends.triton import tiles as _tiles
from softmax_fused.backends.triton.launch import Outputs, constants, ignored, packed, plan, smoothing
from softmax_fused.backends.triton.layout import describe
from softmax_fused.backends.triton.tiles import split_rows
from softmax_fused.kernels.cross_entropy import cross_entropy_reduce, cross_entropy_statistics
from softmax_fused.kernels.long_rows import cross_entropy_long_forward
from softmax_fused.kernels.slices import cross_entropy_close, cross_entropy_terms

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import Spec


def prepare(logits: Tensor, target: Tensor, spec: Spec) -> Tensor:  # noqa: ARG001
    """Return the target: the kernels find their slice in it."""
    return target


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return m, s and, where a is more than the true class's, its sum and <a, z - m>, of each row of the slice."""
    if not logits.numel():
        return _torch_slices.statistics(logits, target, weight, spec)
    rows = describe(logits, target)
    tile, programs = plan(rows, logits.itemsize, _tiles.tables.one_pass, rows.strides[0])
    number = math.prod(rows.sizes)
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    out = logits.new_empty((4 if spec.has_dense_target else 2, number, parts), dtype=spec.acc)
    helper, acc = constants(spec)
    inputs = (logits, target, packed(weight), rows.sizes, *rows.strides, rows.classes)
    options = (ignored(spec), smoothing(spec), helper)
    if tile.lanes:
        _launch.launch(
            cross_entropy_long_forward, programs * parts, tile.warps, logits.device,
            None, None, None, None, out, *inputs, parts, *options, "none", acc, tile.classes, tile.lanes, tile.vector,
        )  # fmt: skip
    else:
        _launch.launch(
            cross_entropy_statistics, programs, tile.warps, logits.device,
            out, *inputs, number, *options, acc, tile.rows, tile.classes,
        )  # fmt: skip
    return joined(out) if parts > 1 else out.squeeze(2)


def joined(pieces: Tensor) -> Tensor:
    """Bring the parts of rows together, (kinds, rows, parts)."""
    m = pieces[0].amax(1, keepdim=True)
    delta = pieces[0] - m
    out = pieces.new_empty(pieces.shape[:2])
    out[0], out[1] = m.squeeze(1), (pieces[1] * delta.exp()).sum(1)
    if len(pieces) == 4:
        out[2] = pieces[2].sum(1)
        out[3] = (pieces[3] + (pieces[2] * delta).masked_fill_(pieces[2] == 0, 0)).sum(1)
    return out


def by_row(target: Tensor, spec: Spec) -> Tensor:
    """Return class indices one after another; of class probabilities the kernels want the type alone."""
    return target.contiguous() if spec.target.has_labels else target


def terms(parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return what is summed over ranks, from the slice's statistics and the m of all slices."""
    if not logits.numel():
        return _torch_slices.terms(parts, m, logits, target, weight, spec)
    rows = describe(logits)
    number, block = len(m), _tiles.tables.row_block
    kinds = (3 if spec.has_dense_target else 1) + (0 if not spec.target.has_labels else 1 if weight is None else 2)
    out = m.new_empty((kinds, number))
    helper, acc = constants(spec)
    _launch.launch(
        cross_entropy_terms, -(-number // block), 4, logits.device,
        out, parts, m, logits, by_row(target, spec), packed(weight), rows.sizes, rows.strides[0], rows.classes, number,
        ignored(spec), spec.has_dense_target, helper, acc, block,
    )  # fmt: skip
    return out


def finalize(
    sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and what `gradient` needs, from the sums over ranks."""
    number, block = len(m), _tiles.tables.row_block
    if not number:
        return _torch_slices.finalize(sums, m, logits, target, weight, spec)
    programs = -(-number // block)
    reduced = spec.reduction != "none"
    out = Outputs(
        m.new_empty(() if reduced else row_shape(logits.shape), dtype=spec.dtype),
        m.new_empty((number, 2 + spec.saves_target_sum(weight))),
        m.new_empty((2, programs)) if reduced and programs > 1 else None,
        m.new_empty((1,)) if spec.reduction == "mean" else None,
    )
    helper, acc = constants(spec)
    _launch.launch(
        cross_entropy_close, programs, 4, logits.device,
        out.loss, out.stats, out.sums, out.denominator, sums, m, by_row(target, spec), spec.classes, number,
        ignored(spec), smoothing(spec), spec.has_dense_target, weight is not None, helper, spec.reduction, acc, block,
    )  # fmt: skip
    if out.sums is not None:
        _launch.launch(cross_entropy_reduce, 1, 4, logits.device, out.loss, out.denominator, out.sums, programs, 256)
    return out.loss, out.saved()


gradient = _launch.gradient
"""The plain loss's: the row statistics it reads are those of all slices together."""
