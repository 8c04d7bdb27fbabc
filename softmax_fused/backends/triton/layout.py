"""Where the rows and classes of tensors lie in memory, with as few row dimensions as their strides allow."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def merge_rows(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
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
        return (1,), tuple((0,) for _ in strides)
    return tuple(sizes), tuple(tuple(kept) for kept in merged)


class Rows(NamedTuple):
    """Where rows and classes lie: row sizes (outer..., inner), and strides (outer..., inner, class) of each tensor."""

    classes: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


@functools.lru_cache(1024)
def rows_of(shape: tuple[int, ...], class_dim: int, *strides: tuple[int, ...]) -> Rows:
    """Lay out a tensor of `shape` and its classes, and tensors of as many dimensions or without the class dimension.

    Kept for the shapes of a training run: it is half of what a call costs the host.
    """
    whole = [len(stride) == len(shape) for stride in strides]
    row_strides = [
        (*stride[:class_dim], *stride[class_dim + 1 :]) if has_classes else stride
        for stride, has_classes in zip(strides, whole, strict=True)
    ]
    steps = [stride[class_dim] if has_classes else 0 for stride, has_classes in zip(strides, whole, strict=True)]
    sizes, merged = merge_rows((*shape[:class_dim], *shape[class_dim + 1 :]), *row_strides)
    return Rows(shape[class_dim], sizes, tuple((*rows, step) for rows, step in zip(merged, steps, strict=True)))


def describe(logits: Tensor, *others: Tensor) -> Rows:
    """Describe the layout of logits (C,) or (N, C, d1..dk) and of tensors with or without the class dimension."""
    return along(min(logits.ndim - 1, 1), logits, *others)


def along(dim: int, tensor: Tensor, *others: Tensor) -> Rows:
    """Describe the layout of a tensor whose classes lie along `dim`, and of others of its shape or without `dim`."""
    return rows_of(tuple(tensor.shape), dim, tensor.stride(), *[other.stride() for other in others])
