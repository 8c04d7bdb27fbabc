"""A kernel run by several threads: those of torch's own pool where it is GNU OpenMP's, else threads of Python.

Torch's threads wait for work, spinning, for a moment after each of its operations; threads beside them would wait for a
core. A forked process has none of its parent's threads, and GNU OpenMP would wait for them for ever: it has Python's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from softmax_fused.backends.numba.compilation import Kernel


@functools.cache
def openmp() -> Any:
    """Return the function by which compiled code starts a parallel region of torch's OpenMP, None if there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        start = torch_cpu.GOMP_parallel  # of the library that torch is linked with, as dlsym looks there first
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return start


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return threads of Python."""
    return ThreadPoolExecutor(threads, "softmax_fused")


def available() -> int:
    """Return how many threads a kernel may have."""
    return torch.get_num_threads()


forked = threading.Event()


def forget_threads() -> None:
    """Do without the threads of the process that this one is a copy of."""
    forked.set()
    pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_threads)


def run(kernel: Kernel, address: int, threads: int) -> None:
    """Run a kernel on the call at `address`, by several threads that divide its rows among themselves."""
    start = None if forked.is_set() else openmp()
    if start is not None:
        start(kernel.address, address, threads, 0)
        return
    others = [pool(threads - 1).submit(kernel.run, address) for _ in range(threads - 1)]
    kernel.run(address)
    for other in others:
        other.result()
