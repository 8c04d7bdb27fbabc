"""The operations compiled for the CPU by Numba. Only `load` imports LLVM, and only compilation imports Numba."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import sys
from typing import TYPE_CHECKING

from softmax_fused import _errors

if TYPE_CHECKING:
    import torch

    from softmax_fused._spec import Backend


@functools.cache
def installed() -> bool:
    """Whether Numba is on this machine; a folder of that name without code is not Numba."""
    spec = importlib.util.find_spec("numba")
    return spec is not None and spec.origin is not None


def tried() -> bool:
    """Whether the compiled code has been tried and measured on such a system: Linux on x86 alone."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def suits(device: torch.device) -> tuple[bool, str]:
    """Return whether it serves `device` unasked, and why: the CPU, where Numba is, unless it is switched off."""
    if device.type != "cpu":
        return False, ""
    switch = os.environ.get("SOFTMAX_FUSED_NUMBA")
    if switch == "0":
        return False, _errors.NUMBA_IS_OFF
    if not installed():
        return False, _errors.NO_NUMBA
    if switch == "1":
        return True, "SOFTMAX_FUSED_NUMBA=1: Numba compiles for this CPU"
    if not tried():
        return False, _errors.NUMBA_IS_UNTRIED
    return True, "Numba compiles for this CPU (SOFTMAX_FUSED_NUMBA=0 turns it off)"


def load() -> Backend:
    """Import what calls the compiled code.

    Raises:
        RuntimeError: If Numba is not installed.
    """
    if not installed():
        raise _errors.unavailable_backend("numba", _errors.NO_NUMBA)
    from softmax_fused.backends.numba.backend import BACKEND

    return BACKEND
