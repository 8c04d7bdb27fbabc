"""The loss as a function: decide who computes it, and hand over."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors as _check
from softmax_fused.backends.torch import cross_entropy as _torch_path
from softmax_fused.functional import operators as _ops
from softmax_fused.functional.autograd import CrossEntropy, Operations, make_spec

if TYPE_CHECKING:
    from torch import Tensor

torch_function = F.cross_entropy
"""Torch's own, also while `patch` has its name lead to ours."""

HAND_OVER = 2**20
"""On the CPU, fewer logits than this go to torch's own operator: its buffers come without page faults, and no time is
left to save: (60000, 10) took 1.0 to 1.5 times as long on the chunked path."""

HAND_OVER_FORWARD = 2**25
"""The same in bytes of logits, for the loss alone, as torch allocates one buffer of that size: (4096, 1000) took 1.2
times as long in float32, (512, 32000) in bfloat16. From 32 MiB on, glibc returns a freed buffer to the system. With the
gradient, too, for 16-bit logits: converting chunks to float32 and back takes what one buffer instead of three saves."""


@functools.cache
def triton_problem() -> str | None:
    """Return why the kernels cannot be had on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux; on Windows triton-windows)"
    return None


def explain_backend(device: torch.device) -> tuple[str, str]:
    """Return which backend serves tensors on `device` under backend="auto", and why.

    Example:
        >>> import torch
        >>> explain_backend(torch.device("meta"))
        ('torch', 'meta tensors are served by torch.nn.functional.cross_entropy')
    """
    problem = triton_problem()
    if device.type == "cuda":
        if problem:
            return "torch", problem
        return "triton", f"{'ROCm' if torch.version.hip else 'CUDA'} device and Triton are present"
    if device.type != "cpu":
        return "torch", f"{device.type} tensors are served by torch.nn.functional.cross_entropy"
    if os.environ.get("TRITON_INTERPRET") == "1" and not problem:
        return "triton", "TRITON_INTERPRET=1: Triton's interpreter runs the kernels on CPU tensors (slow, for tests)"
    return "torch", "Triton kernels need a GPU (or TRITON_INTERPRET=1); CPU tensors take the pure-torch path"


@functools.cache
def automatic(device_type: str) -> str:
    """Return the backend that "auto" stands for; decided once a process."""
    return explain_backend(torch.device(device_type))[0]


def operations(backend: str, device: torch.device) -> Operations:
    """Return the module that computes.

    Raises:
        RuntimeError: If kernels are asked for where they cannot run.
    """
    if backend == "torch" or (backend == "auto" and automatic(device.type) == "torch"):
        return _torch_path
    problem = triton_problem()
    if problem:
        raise RuntimeError(f"backend='triton' is not available. {problem}")
    # together, so that all kernels are interpreted, or none
    from softmax_fused.backends.triton import launch as _launch
    from softmax_fused.backends.triton import row_outputs as _launch_row_outputs  # noqa: F401
    from softmax_fused.backends.triton import softmax as _launch_softmax  # noqa: F401
    from softmax_fused.backends.triton import vocab_parallel as _launch_slices  # noqa: F401

    if device.type == "cpu" and not _launch.INTERPRETED:
        raise RuntimeError(
            "backend='triton' needs tensors on a GPU; got CPU tensors. Move them with .to('cuda'), use backend='auto', "
            "or set TRITON_INTERPRET=1 before the first call to run the kernels in Triton's interpreter"
        )
    return _launch


def small_on_cpu(input: Tensor) -> bool:
    """Whether there are so few logits, on the CPU, that torch's own operator is the fastest."""
    if type(input) is not torch.Tensor or not input.is_cpu or automatic("cpu") != "torch":
        return False
    size = input.numel()
    if size < HAND_OVER:
        return True
    return size * input.itemsize < HAND_OVER_FORWARD and not (input.requires_grad and torch.is_grad_enabled())


def handed_over(input: Tensor, inplace_backward: bool) -> bool:
    """Whether torch's own operator computes the loss under backend="auto"."""
    if small_on_cpu(input):
        return True
    sixteen_bits = type(input) is torch.Tensor and input.is_cpu and input.itemsize == 2 and not inplace_backward
    return sixteen_bits and input.numel() * 2 < HAND_OVER_FORWARD and automatic("cpu") == "torch"


def zero_times_infinity(loss: Tensor) -> bool:
    """Whether torch's loss on the CPU may be NaN where a weight or probability of 0 met a log-probability of -inf."""
    return type(loss) is torch.Tensor and not transformed() and bool(loss.isnan().any())


def transformed() -> bool:
    """Whether something beyond plain autograd is watching: torch.func, forward mode, tracing, fake tensors."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    backend: str = "auto",
    grad_in_forward: bool = False,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Cross-entropy between logits and class indices or class probabilities, softmax included.

    .. math::
        \ell_n = -\sum_c w_c \Big((1-\epsilon)\, t_{nc} + \frac{\epsilon}{C}\Big) \log \mathrm{softmax}(z_n)_c

    with t the one-hot row of a class index or the given probabilities. `mean` divides by the number of rows or, for
    class indices, by the weights of the true classes; ignored rows count nowhere. A drop-in for
    `torch.nn.functional.cross_entropy`: what the fused path does not cover is handed over to it.

    Args:
        input: Logits (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64, any strides.
        target: Class indices, int64 of the input's shape without C, or class probabilities of the input's shape.
        weight: Weight of each class (C,), of the input's dtype.
        size_average: Deprecated by torch in favour of `reduction`.
        ignore_index: Class index whose rows have no loss and no gradient.
        reduce: Deprecated by torch in favour of `reduction`.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share e of the target spread evenly over the classes, at most 1.
        backend: "triton" for the kernels, "torch" for pure torch operations, "auto" for what suits the device.
        grad_in_forward: Compute the gradient with the loss, in one launch that reads the logits from memory once; right
            for every upstream gradient, fastest for 1. Holds a logits-sized buffer between forward and backward. On
            the CPU a mean or sum does so anyway.
        inplace_backward: Write the gradient over the logits: no further logits-sized buffer. The logits are lost with
            the backward pass, and autograd refuses operations that still need them.

    A DTensor stays one: logits divided by class take the path of `softmax_fused.distributed.cross_entropy`, logits
    divided by rows are computed where they are; a mean or sum is whole on every rank, and "none" divided as the rows.

    Both options are for training large classifiers; they change nothing where torch's own operator computes or under
    torch.compile, and do not combine.

    Returns:
        A scalar, or with reduction "none" a tensor of the input's shape without C; of the input's dtype (promoted with
        that of class probabilities, float32 under autocast).

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss and gradient are NaN.
        ValueError: Unknown reduction or backend, batch sizes that differ, or both gradient options at once.
        RuntimeError: Shapes or dtypes that do not fit, label_smoothing above 1, kernels asked for where none can run,
            inplace_backward for a leaf that requires grad or for logits that overlap in memory.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0, 2]))
        >>> loss
        tensor(0.8607, grad_fn=<...>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.0781,  0.0571,  0.0210],
                [ 0.1060,  0.2881, -0.3940]])

    References:
        Zhang et al., Dive into Deep Learning, section 4.1 (softmax regression). Szegedy et al., Rethinking the
        Inception Architecture, 2016 (label smoothing). Milakov and Gimelshein, Online normalizer calculation for
        softmax, 2018 (one pass for maximum and sum).
    """
    if has_torch_function_variadic(input, target, weight):
        options = {"backend": backend, "grad_in_forward": grad_in_forward, "inplace_backward": inplace_backward}
        return overridden(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, options
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if backend != "auto":
        _check.backend(backend)
    if grad_in_forward and inplace_backward:
        raise ValueError("grad_in_forward and inplace_backward exclude each other; got True for both")
    if torch.compiler.is_compiling():
        return compiled(input, target, weight, ignore_index, reduction, label_smoothing, backend)
    if backend == "auto" and handed_over(input, inplace_backward):
        loss = torch_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        if (weight is None and target.ndim < input.ndim) or not zero_times_infinity(loss):
            return loss
    if transformed() or not _check.plain(input, target, weight, ignore_index, reduction, label_smoothing):
        arguments = (input, target, weight, ignore_index, reduction, label_smoothing)
        placed: Tensor | None = None
        if _check.is_dtensor(input) and not transformed():
            from softmax_fused.distributed import dtensor as _dtensor

            placed = _dtensor.cross_entropy(input, *arguments[1:], backend)
        return torch_cross_entropy(*arguments) if placed is None else placed
    compute = operations(backend, input.device)
    spec = make_spec(input, target, reduction, ignore_index, label_smoothing, _check.loss_dtype(input, target))
    if input.requires_grad and torch.is_grad_enabled():
        if inplace_backward:
            _check.writable(input)
        # on the CPU the gradient of a mean or sum comes with the loss and is scaled: an exponential a logit saved
        together = grad_in_forward or (compute is _torch_path and input.is_cpu and reduction != "none")
        when = "in place" if inplace_backward else "forward" if together else "backward"
        differentiable: Tensor = CrossEntropy.apply(input, target, weight, spec, compute, when)
        return differentiable
    return compute.loss(input, target, weight, spec, save=False)[0]


def compiled(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    """Leave an operator of ours in the graph, or torch's where Inductor does better: plain indices on the CPU.

    Also torch's in an exported program, which is to be loaded without this library.
    """
    from softmax_fused.distributed import untraced as _untraced

    if (
        (backend == "auto" and input.device.type == "cpu" and target.ndim < input.ndim and weight is None)
        or torch._C._are_functorch_transforms_active()
        or _untraced.exporting()
        or not _check.plain(input, target, weight, ignore_index, reduction, label_smoothing)
    ):
        return torch_function(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    dtype = _check.loss_dtype(input, target)
    loss: Tensor = _ops.cross_entropy(
        input, target, weight, reduction, ignore_index, float(label_smoothing), dtype, backend
    )[0]
    return loss


def torch_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """Let torch compute it, or refuse it with its own type of error and a clearer message.

    It is the call in which torch's function ends: what that looks at before, has been looked at here.
    """
    try:
        loss: Tensor = torch._C._nn.cross_entropy_loss(
            input,
            target,
            weight,
            _Reduction.get_enum(reduction),  # type: ignore[arg-type]  # torch's stub says str
            ignore_index,
            label_smoothing,
        )
        return loss
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        explained = _check.explain(error, input, target, weight, ignore_index, reduction, label_smoothing)
        if explained is error:
            raise
        raise explained from error


def overridden(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    options: dict[str, Any],
) -> Tensor:
    """Serve __torch_function__: tensor subclasses see torch's function, which they know; modes see ours."""
    tensors = (input, target, weight)
    if _check.subclasses(tensors):
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    loss: Tensor = handle_torch_function(
        cross_entropy,
        tensors,
        input,
        target,
        weight,
        size_average,
        ignore_index,
        reduce,
        reduction,
        label_smoothing,
        **options,
    )
    return loss
