"""Where the rows and classes of tensors lie in memory, with as few row dimensions as their strides allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Strides = tuple[int, ...]


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
    strides: tuple[Strides, ...]


def rows_of(shape: tuple[int, ...], class_dim: int, *strides: Strides) -> Rows:
    """Lay out a tensor of `shape` whose classes lie along `class_dim`.

    `strides` are its own and those of others, of as many dimensions or without that of the classes.
    """
    whole = [len(stride) == len(shape) for stride in strides]
    row_strides = [
        (*stride[:class_dim], *stride[class_dim + 1 :]) if has_classes else stride
        for stride, has_classes in zip(strides, whole, strict=True)
    ]
    steps = [stride[class_dim] if has_classes else 0 for stride, has_classes in zip(strides, whole, strict=True)]
    sizes, merged = merge_rows((*shape[:class_dim], *shape[class_dim + 1 :]), *row_strides)
    return Rows(shape[class_dim], sizes, tuple((*rows, step) for rows, step in zip(merged, steps, strict=True)))


def like(shape: tuple[int, ...], strides: Strides) -> Strides:
    """Return the strides of torch.empty_like for a tensor of this shape and these strides."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
