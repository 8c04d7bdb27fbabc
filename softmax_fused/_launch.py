"""The kernels' host side, and the only module that imports triton: memory layout, tile choice, grid, launch."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from softmax_fused.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward, cross_entropy_reduce
from softmax_fused.kernels.rows import index_target, probability_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._autograd import Spec

INTERPRETED = not isinstance(cross_entropy_forward, triton.JITFunction)
"""Whether the kernels run through Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""

# Triton 3.10 turns fused multiply-add off by default; the kernels count on it and are as accurate with it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """What one program takes at a time: ROWS rows, all their classes in steps of CLASSES."""

    rows: int
    classes: int
    warps: int


# Elements in a tile, by where neighbours in memory lie. Chosen from registers and coalescing, not measured on a GPU.
SMALL_TILE = 4096  # whole rows side by side, 32 elements a thread in 4 warps: a batch of 256 x 10 is one program
LONG_STEP = 4096  # one row in steps: 16 elements a thread in 8 warps, 16 bytes a load
STRIDED_CLASSES = 16  # classes apart in memory, rows adjacent: few classes a step, so that loads coalesce along rows


def choose_tile(classes: int, inner: int, classes_adjacent: bool, itemsize: int) -> Tile:
    """Return the tile for rows of `classes` logits of which `inner` follow one another."""
    budget = SMALL_TILE * 4 // max(4, itemsize)
    step = min(triton.next_power_of_2(classes), budget if classes_adjacent else STRIDED_CLASSES)
    if classes_adjacent and step > budget // 2:
        return Tile(1, min(step, LONG_STEP * 4 // max(4, itemsize)), 8)
    return Tile(min(triton.next_power_of_2(inner), budget // step), step, 4)


def merge_rows(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Merge neighbouring row dimensions wherever every tensor allows it, and drop those of size 1.

    Returns the remaining sizes, at least one, and for each tensor its strides along them.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(kept[-1] == stride[i] * size for kept, stride in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for kept, stride in zip(merged, strides, strict=True):
                kept[-1] = stride[i]
        else:
            sizes.append(size)
            for kept, stride in zip(merged, strides, strict=True):
                kept.append(stride[i])
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return tuple(sizes), [tuple(kept) for kept in merged]


class Rows(NamedTuple):
    """Where rows and classes lie: row sizes (outer..., inner), and strides (outer..., inner, class) of each tensor."""

    classes: int
    sizes: tuple[int, ...]
    strides: list[tuple[int, ...]]


def describe(logits: Tensor, *others: Tensor) -> Rows:
    """Describe the layout of logits (C,) or (N, C, d1..dk) and of tensors with or without the class dimension."""
    class_dim = min(logits.ndim - 1, 1)
    classes = logits.shape[class_dim]
    shape = (*logits.shape[:class_dim], *logits.shape[class_dim + 1 :])
    row_strides, class_strides = [], []
    for tensor in (logits, *others):
        stride = tensor.stride()
        whole = tensor.ndim == logits.ndim
        row_strides.append((*stride[:class_dim], *stride[class_dim + 1 :]) if whole else stride)
        class_strides.append(stride[class_dim] if whole else 0)
    sizes, merged = merge_rows(shape, *row_strides)
    strides = [(*rows, step) for rows, step in zip(merged, class_strides, strict=True)]
    return Rows(classes, sizes, strides)


def launch(kernel: Any, programs: int, warps: int, device: torch.device, *args: Any) -> None:
    """Launch `kernel` on the device that holds its tensors."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=warps, **OPTIONS)


def plan(rows: Rows, acc: torch.dtype) -> tuple[Tile, int]:
    """Return the tile and the number of programs."""
    inner = rows.sizes[-1]
    tile = choose_tile(rows.classes, inner, rows.strides[0][-1] == 1 or rows.classes == 1, acc.itemsize)
    return tile, math.prod(rows.sizes[:-1]) * -(-inner // tile.rows)


def constants(spec: Spec) -> tuple[Any, Any]:
    """Return the target helper and the accumulation type."""
    return (
        index_target if spec.indices else probability_target,
        tl.float64 if spec.acc is torch.float64 else tl.float32,
    )


def packed(weight: Tensor | None) -> Tensor | None:
    """Return the class weights without gaps: C numbers, cheaper to copy than to address by a stride."""
    return None if weight is None else weight.contiguous()


def split(value: float) -> tuple[float, float] | None:
    """Return a float64 as the sum of two float32, or None for 0: kernels get floats in single precision only."""
    if not value:
        return None
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
    """Return the shapes of what `loss` saves: (m, log s[, A]) of each row, and the denominator of a mean."""
    rows = logits.numel() // logits.shape[min(logits.ndim - 1, 1)]
    stats = (rows, 2 if spec.indices and weight is None else 3)
    return [stats, (1,)] if spec.reduction == "mean" else [stats]


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also what `gradient` needs: row statistics, and the denominator of a mean."""
    rows = describe(logits, target)
    tile, programs = plan(rows, spec.acc)
    helper, acc = constants(spec)
    reduced = spec.reduction != "none"
    row_shape = () if reduced or logits.ndim == 1 else (logits.shape[0], *logits.shape[2:])
    out = logits.new_empty(row_shape, dtype=spec.dtype)
    stats = logits.new_empty(saved_shapes(logits, weight, spec)[0], dtype=spec.acc) if save else None
    sums = logits.new_empty((2, programs), dtype=spec.acc) if reduced and programs > 1 else None
    denominator = logits.new_empty((1,), dtype=spec.acc) if spec.reduction == "mean" else None
    launch(
        cross_entropy_forward, programs, tile.warps, logits.device,
        out, stats, sums, denominator, logits, target, packed(weight),
        rows.sizes, *rows.strides, rows.classes, spec.ignore_index, split(spec.label_smoothing),
        helper, spec.reduction, acc, tile.rows, tile.classes,
    )  # fmt: skip
    if sums is not None:
        block = min(1024, triton.next_power_of_2(programs))
        launch(cross_entropy_reduce, 1, 4, logits.device, out, denominator, sums, programs, block)
    return out, [tensor for tensor in (stats, denominator) if tensor is not None]


def gradient(
    upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, saved: Sequence[Tensor], spec: Spec
) -> Tensor:
    """Compute the gradient of the logits from what `loss` saved; `upstream` is a scalar or has the rows' shape."""
    stats, denominator = saved if spec.reduction == "mean" else (saved[0], None)
    grad = torch.empty_like(logits)
    if spec.reduction != "none":
        upstream = upstream.expand((*logits.shape[: min(logits.ndim - 1, 1)], *logits.shape[2:]))
    rows = describe(logits, target, grad, upstream)
    logits_strides, target_strides, grad_strides, upstream_strides = rows.strides
    tile, programs = plan(rows, spec.acc)
    helper, acc = constants(spec)
    launch(
        cross_entropy_backward, programs, tile.warps, logits.device,
        grad, stats, upstream, denominator, logits, target, packed(weight),
        rows.sizes, grad_strides, upstream_strides, logits_strides, target_strides,
        rows.classes, spec.ignore_index, split(spec.label_smoothing), helper, acc, tile.rows, tile.classes,
    )  # fmt: skip
    return grad
