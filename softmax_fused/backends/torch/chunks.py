"""How a batch is divided into chunks, and the memory that a chunk is worked on in.

Times were measured on two cores of an AMD EPYC with AVX2. The costs on a CPU are, the largest first: page faults on new
memory, which take as long as three passes over it; parallel regions, which wait for the last core; exponentials.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import Spec

CHUNK = 2**23
"""Elements in a chunk: 32 MiB of float32.

Where other processes keep every core busy, each operation on a chunk waits for a time slice, so few large chunks are
best: half the size took 1.6 times as long. On an idle machine half the size took as long in float32 and 0.9 times as
long in bfloat16; twice the size took 1.3 times as long in bfloat16, and twice as long for the loss alone in float32.
"""


def pieces(size: int, elements: int, limit: int) -> list[slice]:
    """Slice a dimension into equal pieces of at most `limit` elements, where each of its indices has `elements`."""
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
    """The chunks, and memory of the accumulation type for one: part of the result where its layout allows, or scratch.

    All chunks share one scratch: new memory would cost page faults for each.
    """

    def __init__(self, z: Tensor, result: Tensor | None, dtype: torch.dtype) -> None:
        self.parts, self.result, self.scratch = row_chunks(z, CHUNK), result, None
        if result is None or not self.suits(result[with_classes(self.parts[0])], dtype):
            self.scratch = z.new_empty(z[with_classes(self.parts[0])].numel(), dtype=dtype)

    def suits(self, result: Tensor, dtype: torch.dtype) -> bool:
        """Whether a chunk of the result has the type and layout of scratch."""
        return result.dtype == dtype and result.is_contiguous()

    def chunk(self, z: Tensor, at: tuple[slice, ...]) -> Tensor:
        """Return memory for the chunk `z`, which lies at `at` in the batch."""
        if self.scratch is None:
            assert self.result is not None
            return self.result[at]
        return self.scratch[: z.numel()].view(z.shape)


def contiguous(z: Tensor, work: Tensor) -> Tensor:
    """Return the chunk `z` in the type and layout that torch's kernel needs no copy of: itself, or copied to `work`."""
    return z if z.dtype == work.dtype and z.is_contiguous() else work.copy_(z)


def sum_classes(x: Tensor, spec: Spec) -> Tensor:
    """Return the sums of (N, C, d1..dk) over the classes, (N, 1, d1..dk).

    Torch chooses the order of a sum by shape, strides and the number of threads. Where a batch must not show in a row's
    bits, one half of the classes is added to the other, and so on: an order that depends on C alone.
    """
    if not spec.batch_invariant:
        return x.sum(1, keepdim=True)
    size, total = x.shape[1], x
    while size > 1:
        kept = (size + 1) // 2
        if total is x:
            total = torch.empty_like(x[:, :kept])
            total.copy_(x[:, :kept])
            total[:, : size - kept] += x[:, kept:]
        else:
            total[:, : size - kept] += total[:, kept:size]
        size = kept
    return total[:, :1]


def log_softmax(z: Tensor, work: Tensor, spec: Spec) -> Tensor:
    """Fill `work` with the logarithm of the softmax, and return it."""
    if not spec.batch_invariant:
        return torch.log_softmax(contiguous(z, work), 1, out=work)
    x = z if z.dtype == work.dtype else work.copy_(z)
    torch.sub(x, x.amax(1, keepdim=True), out=work)
    return work.sub_(sum_classes(work.exp(), spec).log_())
