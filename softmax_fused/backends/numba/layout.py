"""Where rows and classes lie: rows as outer x inner, each tensor by its strides, as no kernel knows dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

Strides = tuple[int, int, int]
"""Of outer, inner and classes; the last is 0 where a row has one number."""

NOWHERE = (0, 0, 0)
"""The strides of a tensor that is absent."""


class Rows(NamedTuple):
    """How many rows and classes there are."""

    outer: int
    inner: int
    classes: int


def merge(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride of several dimensions as one, None where one stride does not lead through them."""
    stride, reached = 1, 0
    for size, step in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if not reached:
            stride = step
        elif step != reached:
            return None
        reached = step * size
    return stride


def class_strides(shape: Sequence[int], strides: Sequence[int]) -> Strides | None:
    """Return the strides of (C,), (N, C) or (N, C, d1..dk), None where d1..dk have no common one."""
    if len(strides) == 2:
        return 0, strides[0], strides[1]
    if len(strides) == 1:
        return 0, 0, strides[0]
    inner = merge(shape[2:], strides[2:])
    return None if inner is None else (strides[0], inner, strides[1])


def row_strides(shape: Sequence[int], strides: Sequence[int]) -> Strides | None:
    """Return the strides of a number a row, for logits of that shape: (), (N,) or (N, d1..dk); or a scalar for all."""
    if not strides:
        return NOWHERE
    if len(shape) == 2:
        return 0, strides[0], 0
    inner = merge(shape[2:], strides[1:])
    return None if inner is None else (strides[0], inner, 0)


def strides_along(dim: int, shape: Sequence[int], strides: Sequence[int]) -> Strides | None:
    """Return the strides of the dimensions before `dim`, behind it, and its own; None where some have no common one."""
    outer, inner = merge(shape[:dim], strides[:dim]), merge(shape[dim + 1 :], strides[dim + 1 :])
    return None if outer is None or inner is None else (outer, inner, strides[dim])


def count_rows(shape: Sequence[int]) -> Rows:
    """Return the sizes of (C,), (N, C) or (N, C, d1..dk)."""
    if len(shape) == 2:
        return Rows(1, *shape)
    if len(shape) == 1:
        return Rows(1, 1, *shape)
    inner = 1
    for size in shape[2:]:
        inner *= size
    return Rows(shape[0], inner, shape[1])


def flatten(rows: Rows, strides: list[Strides]) -> tuple[Rows, list[Strides]]:
    """Make all rows inner ones where one stride leads through them, as where classes lie side by side."""
    if rows.inner == 1:
        return Rows(1, rows.outer, rows.classes), [(0, outer, by_class) for outer, _, by_class in strides]
    if all(outer == rows.inner * inner for outer, inner, _ in strides):
        return Rows(1, rows.outer * rows.inner, rows.classes), [(0, inner, by_class) for _, inner, by_class in strides]
    return rows, strides
