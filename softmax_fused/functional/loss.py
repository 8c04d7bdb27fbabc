"""The loss as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _dispatch, _errors
from softmax_fused._dispatch import (
    LOSS,
    LOSS_IN_PLACE,
    LOSS_OF_ANOTHER_TYPE,
    known_call,
    least_numel,
    loss_dtype,
    make_call,
    route,
    under_transform,
    wants_gradient,
)
from softmax_fused._fallback import torch_cross_entropy, torch_function
from softmax_fused._spec import FLOATS
from softmax_fused.backends import REGISTRY
from softmax_fused.functional import operators, sparse
from softmax_fused.functional.autograd import CrossEntropy

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor | sparse.SparseTarget,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    grad_in_forward: bool = False,
    inplace_backward: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    r"""Cross-entropy between logits and class indices or class probabilities, softmax included.

    .. math::
        \ell_n = -\sum_c w_c \left((1-\epsilon)\, t_{nc} + \frac{\epsilon}{C}\right) \log \mathrm{softmax}(z_n)_c

    with t the one-hot row of a class index or the given probabilities. `mean` divides by the number of rows or, for
    class indices, by the weights of the true classes; ignored rows count nowhere. A drop-in for
    `torch.nn.functional.cross_entropy`: what the fused path does not cover is handed over to it.

    Args:
        input: Logits (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64, any strides.
        target: Class indices, int64 of the input's shape without C, class probabilities of the input's shape, or a
            :func:`sparse_target`.
        weight: Weight of each class (C,), of the input's dtype or of `dtype`.
        size_average: Deprecated by torch in favour of `reduction`.
        ignore_index: Class index whose rows have no loss and no gradient.
        reduce: Deprecated by torch in favour of `reduction`.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share e of the target spread evenly over the classes, at most 1.
        dtype: Type of the loss; None for torch's. float32 keeps the digits that 16-bit logits would cut off, as
            autocast does. The gradient has the logits' type, and the fused path copies no logits.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.
        grad_in_forward: Compute the gradient with the loss, in one launch that reads the logits from memory once; right
            for every upstream gradient, fastest for 1. Holds a logits-sized buffer between forward and backward. On
            the CPU a mean or sum does so anyway.
        inplace_backward: Write the gradient over the logits: no further logits-sized buffer. The logits are lost with
            the backward pass, and autograd refuses operations that still need them.
        batch_invariant: A row's loss with reduction "none", and its gradient for the same upstream gradient, are the
            same bits whatever other rows there are and wherever the row stands, as long as its classes stay adjacent
            or stay apart in memory. Few long rows take longer then, and so do small batches on the CPU.

    A DTensor stays one: logits divided by class take the path of `softmax_fused.distributed.cross_entropy`, logits
    divided by rows are computed where they are; a mean or sum is whole on every rank, and "none" divided as the rows.

    `grad_in_forward` and `inplace_backward` are for training large classifiers; they change nothing where torch's own
    operator computes or under torch.compile, and do not combine. `batch_invariant` holds under torch.compile, but not
    where torch's own operator computes: under torch.func, forward-mode AD, tracing and torch.export, for tensor
    subclasses and gradients of class weights or probabilities, nor for derivatives of higher order.

    Returns:
        A scalar, or with reduction "none" a tensor of the input's shape without C; of type `dtype` or, for None, of the
        input's (promoted with that of class probabilities, float32 under autocast).

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss and gradient are NaN.
        ValueError: Unknown reduction or backend, a dtype that is not floating point, batch sizes that differ, or both
            gradient options at once.
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
        options = {
            "dtype": dtype,
            "backend": backend,
            "grad_in_forward": grad_in_forward,
            "inplace_backward": inplace_backward,
            "batch_invariant": batch_invariant,
        }
        return overridden(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, options
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if backend != "auto" and backend not in REGISTRY:
        raise _errors.unknown_backend(backend, REGISTRY)
    if grad_in_forward and inplace_backward:
        raise _errors.both_gradient_options()
    if dtype is not None and dtype not in FLOATS:
        raise _errors.wrong_dtype(dtype)
    compiling = is_compiling()
    small = (
        backend == "auto"
        and type(input) is torch.Tensor
        and input.is_cpu
        and not compiling
        and not batch_invariant
        and input.numel() < least_numel()
    )
    arguments = (input, target, weight, ignore_index, reduction, label_smoothing)
    call = None if compiling or small else known_call(*arguments, backend, dtype, batch_invariant)
    gradient = call is not None and wants_gradient(input)
    small = small or (call is not None and call.left_to_torch[gradient])
    if (
        small
        and weight is None
        and dtype is None
        and not inplace_backward
        and type(target) is torch.Tensor
        and target.ndim < input.ndim
    ):
        return torch_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    if call is None or small:
        if isinstance(target, sparse.SparseTarget):
            return sparse.cross_entropy(
                input, target, weight, ignore_index, reduction, label_smoothing, dtype, backend, batch_invariant
            )  # fmt: skip
        operation = LOSS_IN_PLACE if inplace_backward else LOSS
        operation = operation if dtype is None else LOSS_OF_ANOTHER_TYPE
        path = route(operation, backend, (*arguments, dtype), batch_invariant)
        if path == "small":
            loss = of_type(torch_cross_entropy(*in_type(arguments, dtype)), dtype)
            if (weight is None and target.ndim < input.ndim) or not zero_times_infinity(loss):
                return loss
            path = "backend" if _dispatch.supports_fused(*arguments, dtype) else "torch"
        if path == "torch":
            logits, labels, weights = in_type((input, target, weight), dtype)
            loss = unfused(logits, labels, weights, ignore_index, reduction, label_smoothing, backend)
            return of_type(loss, dtype)
        dtype = dtype or loss_dtype(input, target)
        if path == "operator":
            options_of_spec = (reduction, ignore_index, float(label_smoothing), dtype, batch_invariant)
            in_graph: Tensor = operators.cross_entropy(
                input, target, weight, *options_of_spec, backend, operators.LAYOUT
            )[0]
            return in_graph
        call = make_call(input, target, ignore_index, reduction, label_smoothing, backend, dtype, batch_invariant)
        gradient = wants_gradient(input)
    spec, operations, with_loss, _ = call
    if not gradient:
        return operations.loss(input, target, weight, spec, save=False)[0]  # type: ignore[arg-type]  # it is a tensor
    if inplace_backward:
        check_writable(input)
    gradient_mode = "in place" if inplace_backward else "forward" if grad_in_forward or with_loss else "backward"
    differentiable: Tensor = CrossEntropy.apply(input, target, weight, spec, operations, gradient_mode)
    return differentiable


def in_type(arguments: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Return arguments for torch's operator: floating point tensors at least of the type that the loss shall have."""
    if dtype is None:
        return arguments
    return tuple(
        it.to(torch.promote_types(it.dtype, dtype)) if isinstance(it, torch.Tensor) and it.is_floating_point() else it
        for it in arguments
    )


def of_type(loss: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a loss of torch's operator in the type that it shall have."""
    return loss if dtype is None else loss.to(dtype)


def zero_times_infinity(loss: Tensor) -> bool:
    """Whether torch's loss is NaN, as it is where a weight or probability of 0 meets a log-probability of -inf."""
    return type(loss) is torch.Tensor and not under_transform() and bool(loss.isnan().any())


def check_writable(input: Tensor) -> None:
    """Refuse logits that no gradient may be written over.

    Raises:
        RuntimeError: If they are a leaf that requires grad, or several of their elements share memory.
    """
    owner = input if input._base is None else input._base
    if owner.is_leaf and owner.requires_grad:
        raise _errors.leaf_overwritten()
    if torch._debug_has_internal_overlap(input) == 1:
        raise _errors.shared_memory(input)


def unfused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    """Compute what the fused path does not cover, by torch's operator; a DTensor's loss from its local parts."""
    if is_compiling():
        return torch_function(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if _dispatch.is_dtensor(input) and not under_transform():
        from softmax_fused.distributed import dtensor

        loss = dtensor.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, backend)
        if loss is not None:
            return loss
    return torch_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def overridden(
    input: Tensor,
    target: Tensor | sparse.SparseTarget,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    options: dict[str, Any],
) -> Tensor:
    """Follow __torch_function__: tensor subclasses are handed torch's function, which they know, modes ours."""
    tensors = (input, target, weight)
    if _dispatch.has_subclass(tensors):
        dtype = options["dtype"]
        if isinstance(target, sparse.SparseTarget):
            of_path = options["backend"], options["batch_invariant"]
            return sparse.cross_entropy(
                input, target, weight, ignore_index, reduction, label_smoothing, dtype, *of_path
            )  # fmt: skip
        logits, labels, weights = in_type(tensors, dtype)
        loss = F.cross_entropy(logits, labels, weights, size_average, ignore_index, reduce, reduction, label_smoothing)
        return of_type(loss, dtype)
    result: Tensor = handle_torch_function(
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
    return result
