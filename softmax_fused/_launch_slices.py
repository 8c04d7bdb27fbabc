"""Statistics and gradient of a slice of the classes by the kernels: tile choice, grid, launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from softmax_fused import _launch, _torch_slices
from softmax_fused._launch import FORWARD_WARPS, constants, packed, plan, smoothing, split_rows
from softmax_fused._layout import describe
from softmax_fused.kernels.cross_entropy import cross_entropy_statistics
from softmax_fused.kernels.long_rows import cross_entropy_long_forward

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._autograd import Spec


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
    """Return m, s and, where a is more than the true class's, its sum and <a, z - m>, of each row of the slice."""
    if not logits.numel():
        return _torch_slices.statistics(logits, target, weight, spec)
    rows = describe(logits, target)
    tile, programs = plan(rows, logits.itemsize, FORWARD_WARPS, rows.strides[0])
    number = math.prod(rows.sizes)
    parts = split_rows(programs, rows.classes, tile.classes) if tile.lanes else 1
    kinds = 4 if spec.label_smoothing or not spec.indices else 2
    out = logits.new_empty((4, number, parts), dtype=spec.acc)
    helper, acc = constants(spec)
    inputs = (logits, target, packed(weight), rows.sizes, *rows.strides, rows.classes)
    options = (spec.ignore_index, smoothing(spec), helper)
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
    found = joined(out[:kinds]) if parts > 1 else out[:kinds]
    return found.view(kinds, *((logits.shape[0], *logits.shape[2:]) if logits.ndim > 1 else ()))


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


gradient = _launch.gradient
"""The plain loss's: the row statistics it reads are those of all slices together."""
