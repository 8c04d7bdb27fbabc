"""Softmax and its logarithm along a dimension, as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from softmax_fused._dispatch import SOFTMAX, check_backend, get_backend, route
from softmax_fused._errors import TENSORS
from softmax_fused.functional.autograd import Softmax

if TYPE_CHECKING:
    from torch import Tensor


def compute(input: Tensor, dim: int | None, dtype: torch.dtype | None, backend: str, log: bool) -> Tensor:
    """Compute the softmax, or its logarithm, by a backend that offers it or by torch's function."""
    function, torch_function = (log_softmax, F.log_softmax) if log else (softmax, F.softmax)
    if has_torch_function_unary(input):
        if isinstance(input, torch.Tensor) and type(input) in TENSORS:  # a mode is active
            overridden: Tensor = handle_torch_function(function, (input,), input, dim, dtype, backend=backend)
            return overridden
        return torch_function(input, dim, dtype=dtype)
    check_backend(backend)
    path = route(SOFTMAX, backend, (input, dim, dtype))
    operations = get_backend(backend, input.device.type).softmax if path == "backend" else None
    if operations is None:
        return torch_function(input, dim, 4, dtype=dtype)
    assert dim is not None
    if dtype is None:
        # torch casts to float32 under a GPU's autocast, but not under the CPU's
        autocast = input.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        dtype = torch.float32 if autocast and input.dtype is not torch.float64 else input.dtype
    if input.requires_grad and torch.is_grad_enabled():
        differentiable: Tensor = Softmax.apply(input, dim % input.ndim, dtype, log, operations)
        return differentiable
    return operations.forward(input, dim % input.ndim, dtype, log)


def softmax(
    input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, *, backend: str = "auto"
) -> Tensor:
    r"""Softmax along a dimension: positive numbers that sum to 1.

    .. math::
        \mathrm{softmax}(z)_c = \frac{\exp(z_c - \max z)}{\sum_k \exp(z_k - \max z)}

    A drop-in for `torch.nn.functional.softmax`: one launch forward that reads the input once and writes the output
    once, and one backward, from the output. CPU tensors, except where Numba's compiled code is faster, and what no
    kernel covers, are torch's; under torch.compile Inductor fuses torch's with its neighbours.

    Args:
        input: Logits of any shape and strides; float16, bfloat16, float32 or float64.
        dim: Dimension that sums to 1; None, as torch's, guesses with a warning.
        dtype: Type of the result, to which the input is cast first; None for the input's, or float32 under a GPU's
            autocast.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for torch's own operator,
            "auto" for what suits the device.

    Returns:
        A tensor of the input's shape. A row that is -inf throughout is NaN, as torch's.

    Raises:
        IndexError: No such dimension.
        ValueError: Unknown backend.
        RuntimeError: Kernels asked for where none can run.

    Example:
        >>> import torch
        >>> softmax(torch.tensor([[2.0, 0.0, -1.0]]), dim=1)
        tensor([[0.8438, 0.1142, 0.0420]])

    References:
        Zhang et al., Dive into Deep Learning, section 4.1 (softmax regression). Milakov and Gimelshein, Online
        normalizer calculation for softmax, 2018 (one pass for maximum and sum).
    """
    return compute(input, dim, dtype, backend, log=False)


def log_softmax(
    input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, *, backend: str = "auto"
) -> Tensor:
    r"""Logarithm of the softmax along a dimension, without a logarithm of numbers that round to 0.

    .. math::
        \log \mathrm{softmax}(z)_c = (z_c - \max z) - \log \sum_k \exp(z_k - \max z)

    A drop-in for `torch.nn.functional.log_softmax`; see :func:`softmax` for who computes it.

    Args:
        input: Logits of any shape and strides; float16, bfloat16, float32 or float64.
        dim: Dimension along which the exponentials sum to 1; None, as torch's, guesses with a warning.
        dtype: Type of the result, to which the input is cast first; None for the input's, or float32 under a GPU's
            autocast.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for torch's own operator,
            "auto" for what suits the device.

    Returns:
        A tensor of the input's shape. A row that is -inf throughout is NaN, as torch's.

    Raises:
        IndexError: No such dimension.
        ValueError: Unknown backend.
        RuntimeError: Kernels asked for where none can run.

    Example:
        >>> import torch
        >>> log_softmax(torch.tensor([[2.0, 0.0, -1.0]]), dim=1)
        tensor([[-0.1698, -2.1698, -3.1698]])

    References:
        Zhang et al., Dive into Deep Learning, section 4.5 (softmax and cross-entropy in one, LogSumExp).
    """
    return compute(input, dim, dtype, backend, log=True)
