"""Softmax, its logarithm, and their gradients by compiled kernels."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from softmax_fused.backends.numba import threads
from softmax_fused.backends.numba.call import (
    GRADIENT_OF_LOG_SOFTMAX,
    GRADIENT_OF_SOFTMAX,
    LOG_SOFTMAX,
    SOFTMAX,
    WRITTEN_BY_KERNEL,
)
from softmax_fused.backends.numba.cross_entropy import SCRATCH
from softmax_fused.backends.numba.pages import empty_like
from softmax_fused.backends.numba.plan import NO_STRIDES, Plan, make_softmax_plan

if TYPE_CHECKING:
    from torch import Tensor


def forward(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the softmax or, with `log`, its logarithm."""
    out = compute(LOG_SOFTMAX if log else SOFTMAX, input.to(dtype), None, dim)
    return (torch.log_softmax if log else torch.softmax)(input, dim, dtype=dtype) if out is None else out


def backward(upstream: Tensor, out: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    """Compute the gradient of the input, of `dtype`, from the output."""
    if upstream.stride() != out.stride():
        upstream = torch.empty_like(out).copy_(upstream)
    grad = compute(GRADIENT_OF_LOG_SOFTMAX if log else GRADIENT_OF_SOFTMAX, out, upstream, dim)
    if grad is None:
        backward_of_torch = torch._log_softmax_backward_data if log else torch._softmax_backward_data
        grad = backward_of_torch(upstream, out, dim, out.dtype)
    return grad.to(dtype)


def compute(name: str, read: Tensor, upstream: Tensor | None, dim: int) -> Tensor | None:
    """Compute one of OF_SOFTMAX, the gradients from an upstream gradient of the same strides; None without a kernel."""
    acc = torch.float64 if read.dtype is torch.float64 else torch.float32
    written = empty_like(read)
    plan = make_softmax_plan(
        name, dim, read.shape, read.stride(), None if upstream is None else upstream.stride(), written.stride(),
        read.dtype, acc, threads.available(),
    )  # fmt: skip
    if plan is NO_STRIDES:
        return compute(name, read.contiguous(), None if upstream is None else upstream.contiguous(), dim)
    if not isinstance(plan, Plan):
        return None
    scratch = SCRATCH.take(plan.scratch, acc)
    given = 0 if upstream is None else upstream.data_ptr()
    places = (read.data_ptr(), given, 0, 0, written.data_ptr(), 0, 0, scratch.data_ptr())
    call = plan.call + array("q", (*places, *WRITTEN_BY_KERNEL))
    where, _ = call.buffer_info()
    if plan.team > 1:
        threads.run(plan.kernel, where, plan.team)
    else:
        plan.kernel.run(where)
    return written
