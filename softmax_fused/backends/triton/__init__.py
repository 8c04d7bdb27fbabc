"""The operations by Triton kernels. Only `load` imports Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors

if TYPE_CHECKING:
    from softmax_fused._spec import Backend


@functools.cache
def problem() -> str | None:
    """Return why the kernels cannot be had on this machine, or None."""
    return _errors.NO_TRITON if importlib.util.find_spec("triton") is None else None


def suits(device: torch.device) -> tuple[bool, str]:
    """Return whether the kernels serve `device` unasked: GPUs, and the CPU where the interpreter is switched on."""
    if device.type == "cuda":
        return not problem(), problem() or f"{'ROCm' if torch.version.hip else 'CUDA'} device and Triton are present"
    if device.type != "cpu":
        return False, ""
    if os.environ.get("TRITON_INTERPRET") == "1" and not problem():
        return True, "TRITON_INTERPRET=1: Triton's interpreter runs the kernels on CPU tensors (slow, for tests)"
    return False, "Triton kernels need a GPU (or TRITON_INTERPRET=1)"


def load() -> Backend:
    """Import all kernels at once, so that all are interpreted, or none.

    Raises:
        RuntimeError: If Triton is not installed.
    """
    missing = problem()
    if missing:
        raise _errors.unavailable_backend("triton", missing)
    from softmax_fused.backends.triton.backend import BACKEND

    return BACKEND
