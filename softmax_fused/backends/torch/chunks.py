"""Softmax of a batch in pure torch, chunk by chunk: what fits the cache, and how classes lie.

Times are of two cores of an AMD EPYC under AVX2. What costs on a CPU is, in this order: page faults on new memory, as
much time as three passes over it; parallel regions, each of which waits until every core has had its turn; exp.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 2**23
"""Elements in a chunk: 32 MiB of float32.

Beside a busy process a core, an operation on a chunk waits for a time slice, so chunks are large: half the size took
1.6 times as long there. On an idle machine it takes as long in float32, and 0.9 times as long in bfloat16. Twice the
size takes 1.3 times as long in bfloat16 there, and twice as long for the loss alone in float32.
"""


def pieces(size: int, elements: int, limit: int) -> list[slice]:
    """Slice a dimension, each index of which has so many elements, into equal pieces of at most `limit` elements."""
    step = math.ceil(size / min(size, math.ceil(size * elements / limit)))
    return [slice(i, i + step) for i in range(0, size, step)]


def row_chunks(z: Tensor, limit: int) -> list[tuple[slice, ...]]:
    """Slice the rows of (N, C, d1..dk): along the batch and, where one sample is too large, its longest dimension."""
    sample = z.numel() // z.shape[0]
    batch = pieces(z.shape[0], sample, limit)
    if z.ndim == 2:
        return [(n,) for n in batch]
    longest = max(range(2, z.ndim), key=lambda dim: z.shape[dim])
    before = [slice(None)] * (longest - 2)
    return [(n, *before, d) for n in batch for d in pieces(z.shape[longest], sample // z.shape[longest], limit)]


def with_classes(part: tuple[slice, ...]) -> tuple[slice, ...]:
    """Turn the slices of rows (N, d1..dk) into slices of (N, C, d1..dk)."""
    return (part[0], slice(None), *part[1:])


class Workspace:
    """The chunks, and memory to work on one in the accumulation type: the result where its layout serves, or scratch.

    One scratch serves every chunk: new memory for each would be page faults for each.
    """

    def __init__(self, z: Tensor, result: Tensor | None, dtype: torch.dtype) -> None:
        self.parts, self.result, self.scratch = row_chunks(z, CHUNK), result, None
        if result is None or not self.suits(result[with_classes(self.parts[0])], dtype):
            self.scratch = z.new_empty(z[with_classes(self.parts[0])].numel(), dtype=dtype)

    def suits(self, result: Tensor, dtype: torch.dtype) -> bool:
        """Whether the work can be done right in the result."""
        return result.dtype == dtype and result.is_contiguous()

    def chunk(self, z: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return memory of the shape of `z`, which is the chunk `at`."""
        if self.scratch is None:
            assert self.result is not None
            return self.result[at]
        return self.scratch[: z.numel()].view(z.shape)


def readable(z: Tensor, work: Tensor) -> Tensor:
    """Return the chunk `z` as torch's kernels take it as it is: itself, or copied to `work`."""
    return z if z.dtype == work.dtype and z.is_contiguous() else work.copy_(z)


def log_softmax(z: Tensor, work: Tensor) -> None:
    """Fill `work` with the logarithm of the softmax."""
    torch.log_softmax(readable(z, work), 1, out=work)
