"""What goes to the fused path, and what users are told when torch refuses their arguments.

Errors are torch's own: a call that is not plainly right goes to `torch.nn.functional.cross_entropy`, which computes it
or raises; `explain` then replaces the message by one that says what was expected and what came, never the type.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

TENSORS = (torch.Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "triton", "torch")
REDUCTIONS = ("mean", "sum", "none")


def target_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of class indices and of class probabilities for an input's shape."""
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else (), shape


def loss_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """Return the type torch gives the loss: promoted with class probabilities, float32 for less under autocast."""
    dtype = torch.promote_types(input.dtype, target.dtype) if target.ndim == input.ndim else input.dtype
    if dtype is not torch.float64 and torch.is_autocast_enabled(input.device.type):
        return torch.float32
    return dtype


def plain(input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any) -> bool:
    """Whether the fused path covers these arguments; True only for what torch accepts too."""
    return (
        plain_logits(input)
        and plain_target(input, target, ignore_index)
        and plain_weight(input, target, weight)
        and reduction in REDUCTIONS
        and type(label_smoothing) in (float, int)
        and label_smoothing <= 1
    )


def plain_logits(input: Any) -> bool:
    """Whether `input` is an ordinary, non-empty tensor of logits on a CPU or GPU."""
    return (
        type(input) in TENSORS
        and input.layout is torch.strided
        and input.device.type in ("cuda", "cpu")
        and input.dtype in FLOATS
        and input.ndim > 0
        and input.numel() > 0
    )


def plain_target(input: Tensor, target: Any, ignore_index: Any) -> bool:
    """Whether `target` holds class indices, or class probabilities that need no gradient, for `input`."""
    if type(target) not in TENSORS or target.device != input.device or type(ignore_index) is not int:
        return False
    indices, probabilities = target_shapes(input.shape)
    if target.shape == probabilities:
        return target.dtype in FLOATS and ignore_index < 0 and not target.requires_grad
    right_type = target.dtype is torch.int64 or (target.dtype is torch.uint8 and input.ndim <= 2)
    return right_type and target.shape == indices and -(2**63) <= ignore_index < 2**63


def plain_weight(input: Tensor, target: Tensor, weight: Any) -> bool:
    """Whether `weight` is absent, or one constant a class in the type of the logits or of the loss."""
    if weight is None:
        return True
    return (
        type(weight) in TENSORS
        and weight.shape == (input.shape[min(input.ndim - 1, 1)],)
        and weight.device == input.device
        and weight.dtype in (input.dtype, loss_dtype(input, target))
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def backend(name: str) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: If so.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch'; got {name!r}")


def writable(input: Tensor) -> None:
    """Refuse logits that no gradient may be written over.

    Raises:
        RuntimeError: If they are a leaf that requires grad, or several of their elements share memory.
    """
    owner = input if input._base is None else input._base
    if owner.is_leaf and owner.requires_grad:
        raise RuntimeError(
            "inplace_backward must not overwrite a leaf tensor that requires grad, nor a view of one; got logits that "
            "no operation made"
        )
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            "inplace_backward needs logits whose elements do not share memory; "
            f"got strides {input.stride()} for shape {tuple(input.shape)}: call .contiguous() first"
        )


def subclasses(tensors: Iterable[Any]) -> bool:
    """Whether there is a tensor among them that is more than a tensor."""
    return any(isinstance(t, torch.Tensor) and type(t) not in TENSORS for t in tensors)


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor, of which there is none before somebody imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def layer_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type that a linear layer takes a tensor in: that of autocast where it is on."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def plain_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> bool:
    """Whether the chunked path covers a linear layer's tensors."""
    tensors = [tensor for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    return all(
        plain_logits(tensor) and tensor.device == input.device and layer_dtype(tensor) == layer_dtype(input)
        for tensor in tensors
    )


def logits_shape(input: Any, linear_weight: Any, linear_bias: Any) -> tuple[int, ...]:
    """Return the shape of a linear layer's logits.

    Raises:
        TypeError: If an argument is no tensor.
        RuntimeError: If the shapes do not fit one another.
    """
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor) and not (name == "linear_bias" and value is None):
            raise TypeError(f"{name} must be a tensor; got {describe(value)}")
    if input.ndim not in (1, 2):
        raise RuntimeError(f"input must have shape (D,) or (N, D): flatten other dimensions; got {describe(input)}")
    if linear_weight.ndim < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"linear_weight must have shape (C, D) or (C, d1, ..., dk, D) with D = {input.shape[-1]} for input of "
            f"shape {tuple(input.shape)}; got {describe(linear_weight)}"
        )
    sizes = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and linear_bias.shape != sizes:
        raise RuntimeError(
            f"linear_bias must have shape {sizes} for linear_weight of shape {tuple(linear_weight.shape)}; got "
            f"{describe(linear_bias)}"
        )
    if len(sizes) > 1 and input.ndim == 1:
        raise RuntimeError(
            f"input must have shape (N, {input.shape[-1]}) for linear_weight of shape {tuple(linear_weight.shape)}; "
            f"got {describe(input)}"
        )
    return (*input.shape[:-1], *sizes)


def chunk_rows(value: Any) -> None:
    """Refuse what is no number of rows.

    Raises:
        ValueError: If it is neither a positive integer nor None.
    """
    if value is not None and not (type(value) is int and value > 0):
        raise ValueError(f"chunk_rows must be a positive integer or None; got {value!r}")


def describe(value: Any) -> str:
    """Say what came."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def explain_input(input: Any) -> str | None:
    """Say what is wrong with the logits."""
    if not isinstance(input, torch.Tensor) or input.ndim == 0 or not input.dtype.is_floating_point:
        return (
            f"input must be a floating point tensor of shape (C,), (N, C) or (N, C, d1, ..., dk); got {describe(input)}"
        )
    return None


def explain_target(input: Tensor, target: Any, ignore_index: Any) -> str | None:
    """Say what is wrong with the target."""
    indices, probabilities = target_shapes(tuple(input.shape))
    expected = (
        f"target must have shape {indices} (class indices, int64) or {probabilities} (class probabilities, floating "
        f"point) for logits of shape {probabilities}"
    )
    if not isinstance(target, torch.Tensor) or target.shape not in (indices, probabilities):
        return f"{expected}; got {describe(target)}"
    if target.shape == probabilities:
        if not target.dtype.is_floating_point:
            return f"{expected}; got {describe(target)}: class probabilities must be floating point"
        if isinstance(ignore_index, int) and ignore_index >= 0:
            return f"ignore_index must be negative with class probabilities, which ignore nothing; got {ignore_index}"
    elif target.dtype is not torch.int64:
        return f"{expected}; got {describe(target)}: convert class indices with target.long()"
    elif readable(target) and target.numel():
        classes = input.shape[min(input.ndim - 1, 1)]
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            return out_of_range(classes, ignore_index, int(wrong[0]))
    return None


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: not those of a fake tensor, of a DTensor or under torch.func.vmap."""
    return type(tensor) in TENSORS and tensor.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


def out_of_range(classes: int, ignore_index: Any, label: int) -> str:
    """Say which class index does not exist."""
    return f"target must hold class indices from 0 to {classes - 1} or ignore_index ({ignore_index}); got {label}"


def explain_weight(input: Tensor, weight: Any) -> str | None:
    """Say what is wrong with the class weights."""
    if weight is None:
        return None
    classes = input.shape[min(input.ndim - 1, 1)]
    if not isinstance(weight, torch.Tensor) or weight.shape != (classes,) or weight.dtype != input.dtype:
        kind = str(input.dtype).removeprefix("torch.")
        return f"weight must be a {kind} tensor of shape ({classes},), one value a class; got {describe(weight)}"
    if weight.requires_grad:
        return "weight must not require a gradient with class indices; pass weight.detach()"
    return None


def explain_options(ignore_index: Any, reduction: Any, label_smoothing: Any) -> str | None:
    """Say what is wrong with the other arguments."""
    if reduction not in REDUCTIONS:
        return f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}"
    if type(label_smoothing) not in (int, float) or label_smoothing > 1:
        return f"label_smoothing must be a number of at most 1; got {label_smoothing!r}"
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return f"ignore_index must be an integer of 64 bits; got {ignore_index!r}"
    return None


def explain(
    error: Exception, input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> Exception:
    """Return torch's error, of the same type, with a message that names what was expected and what came.

    It is torch's error itself where nothing is found, or where the arguments refuse to be looked at.
    """
    try:
        message = (
            explain_options(ignore_index, reduction, label_smoothing)
            or explain_input(input)
            or explain_target(input, target, ignore_index)
            or explain_weight(input, weight)
        )
        return error if message is None else type(error)(message)
    except Exception:  # tensor subclasses, nested tensors and transforms may raise at any question asked of them
        return error
