"""Memory: huge pages for gradients, where Linux leaves that to programs, and scratch memory.

Above 32 MiB glibc takes fresh memory from the system for every tensor, and the system clears it page by page as it is
written: on two cores more than half of the time of loss and gradient. Pages of 2 MiB instead of 4 KiB halve all of it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

KEPT_NUMEL = 2**16
"""Scratch memory of up to so many numbers is kept."""

FRESH_BYTES = 2**25
"""From this size on memory comes from the system each time."""


@functools.cache
def advise() -> Any:
    """Return the system's madvise, None where it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def empty_like(logits: Tensor) -> Tensor:
    """Return memory like `torch.empty_like`; the advice is only that, and may be refused."""
    tensor = torch.empty_like(logits)
    if tensor.nbytes >= FRESH_BYTES and advise() is not None:
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        advise()(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor


class Scratch(threading.local):
    """Memory that a call needs while it lasts, kept by each thread for its next call where it is little."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return memory for at least `numel` numbers."""
        tensor = self.kept.get(dtype)
        if tensor is None or tensor.numel() < numel:
            tensor = torch.empty(numel, dtype=dtype)
            if numel <= KEPT_NUMEL:
                self.kept[dtype] = tensor
        return tensor
