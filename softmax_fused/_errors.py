"""Every message a user sees.

An error that the library raises itself is made by a function here and raised where it is found. An error that torch
raises keeps its type: `explain` replaces the message by one that says what was expected and what came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torch import Tensor

REFUSALS = (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""The types of the errors with which torch refuses a loss's arguments."""

REDUCTIONS = ("mean", "sum", "none")
TENSORS = (torch.Tensor, torch.nn.Parameter)


def describe(value: Any) -> str:
    """Say what came."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, the last two joined by "or"."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


# Backends and the options of the loss


def unknown_backend(name: str, known: Iterable[str]) -> ValueError:
    """No backend has this name."""
    return ValueError(f"backend must be {listed(('auto', *known))}; got {name!r}")


def unavailable_backend(name: str, problem: str) -> RuntimeError:
    """The backend cannot be loaded on this machine."""
    return RuntimeError(f"backend={name!r} is not available. {problem}")


NO_TRITON = "Triton is not installed: pip install triton (Linux; on Windows triton-windows)"

NO_NUMBA = "Numba is not installed: pip install 'softmax-fused[cpu]'"

NUMBA_IS_OFF = "SOFTMAX_FUSED_NUMBA=0 has Numba compile nothing unasked"

NUMBA_IS_UNTRIED = "SOFTMAX_FUSED_NUMBA=1 has Numba compile for this CPU, which is tried on 64-bit Linux on x86 alone"

OTHER_TENSORS_FOR_NUMBA = "backend='numba' needs CPU tensors. Move them with .to('cpu'), or use backend='auto'"

CPU_TENSORS_FOR_KERNELS = (
    "backend='triton' needs tensors on a GPU; got CPU tensors. Move them with .to('cuda'), use backend='auto', "
    "or set TRITON_INTERPRET=1 before the first call to run the kernels in Triton's interpreter"
)


def both_gradient_options() -> ValueError:
    """Both options that say where the gradient is computed are on."""
    return ValueError("grad_in_forward and inplace_backward exclude each other; got True for both")


def leaf_overwritten() -> RuntimeError:
    """The gradient would be written over a leaf of the graph."""
    return RuntimeError(
        "inplace_backward must not overwrite a leaf tensor that requires grad, nor a view of one; got logits that "
        "no operation made"
    )


def shared_memory(input: Tensor) -> RuntimeError:
    """Several elements of the logits, over which the gradient would be written, are one in memory."""
    return RuntimeError(
        "inplace_backward needs logits whose elements do not share memory; "
        f"got strides {input.stride()} for shape {tuple(input.shape)}: call .contiguous() first"
    )


# Arguments of the loss that torch refuses


def target_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of class indices and of class probabilities for an input's shape."""
    return (*shape[:1], *shape[2:]) if len(shape) > 1 else (), shape


def out_of_range(classes: int, ignore_index: Any, label: int) -> IndexError:
    """A class index does not exist."""
    return IndexError(unknown_class(classes, ignore_index, label))


def unknown_class(classes: int, ignore_index: Any, label: int) -> str:
    """Say which class index does not exist."""
    return f"target must hold class indices from 0 to {classes - 1} or ignore_index ({ignore_index}); got {label}"


def explain_input(input: Any) -> str | None:
    """Say what is wrong with the logits."""
    if not isinstance(input, torch.Tensor) or input.ndim == 0 or not input.dtype.is_floating_point:
        return (
            f"input must be a floating point tensor of shape (C,), (N, C) or (N, C, d1, ..., dk); got {describe(input)}"
        )
    return None


def explain_target(input: Tensor, target: Any, ignore_index: Any, values: bool = True) -> str | None:
    """Say what is wrong with the target, with `values` also with the class indices that it holds."""
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
    elif values and is_readable(target) and target.numel():
        classes = input.shape[min(input.ndim - 1, 1)]
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if wrong.numel():
            return unknown_class(classes, ignore_index, int(wrong[0]))
    return None


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: not those of a fake tensor, of a DTensor or under torch.func.vmap."""
    return type(tensor) in TENSORS and tensor.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


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


def explain_call(
    input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any, values: bool = True
) -> str | None:
    """Say what is wrong with a loss's arguments, None where nothing is found."""
    return (
        explain_options(ignore_index, reduction, label_smoothing)
        or explain_input(input)
        or explain_target(input, target, ignore_index, values)
        or explain_weight(input, weight)
    )


def explain(
    error: Exception, input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> Exception:
    """Return torch's error, of the same type, with a message that names what was expected and what came.

    It is torch's error itself where nothing is found, or where the arguments refuse to be looked at.
    """
    try:
        message = explain_call(input, target, weight, ignore_index, reduction, label_smoothing)
        return error if message is None else type(error)(message)
    except Exception:  # tensor subclasses, nested tensors and transforms may raise at any question asked of them
        return error


# Options of cross_entropy_rows


def not_a_number(name: str, value: Any) -> TypeError:
    """A scale or a cap is something else than a number."""
    return TypeError(f"{name} must be a number; got {describe(value)}: multiply the logits by a tensor")


def wrong_row_scale(scale: Tensor, input: Tensor) -> ValueError:
    """The scales of rows are not one a row."""
    shape, _ = target_shapes(tuple(input.shape))
    return ValueError(
        f"logit_scale must be a number, or a floating point tensor on {input.device} that broadcasts to shape {shape}, "
        f"one number a row, for logits of shape {tuple(input.shape)}; got {describe(scale)} on {scale.device}"
    )


def row_scale_with_gradient() -> RuntimeError:
    """The scales of rows require a gradient, which there is none for."""
    return RuntimeError(
        "logit_scale must not require a gradient: pass logit_scale.detach(), or multiply the logits by it"
    )


def infinite_scale(value: float) -> ValueError:
    """A scale is infinite or NaN."""
    return ValueError(f"logit_scale must be finite; got {value!r}")


def wrong_cap(value: float) -> ValueError:
    """A cap bounds nothing."""
    return ValueError(f"softcap must be a positive number or None; got {value!r}")


def unknown_outputs(names: Any, known: Iterable[str]) -> ValueError:
    """No output of rows has such a name, or none is named."""
    return ValueError(f"outputs must name some of {', '.join(known)}; got {names!r}")


def no_target_class(names: Iterable[str], target: Tensor) -> ValueError:
    """An output is that of a row's target class, and the target is probabilities."""
    return ValueError(f"{listed(names)} in outputs needs class indices as the target; got {describe(target)}")


def wrong_classes(logits: Any, classes: Any) -> ValueError:
    """The classes are not class indices, one or several a row."""
    if not isinstance(logits, torch.Tensor) or logits.ndim == 0:
        return ValueError(
            f"logits must be a tensor of shape (C,), (N, C) or (N, C, d1, ..., dk); got {describe(logits)}"
        )
    one, shape = target_shapes(tuple(logits.shape))
    dim = min(logits.ndim - 1, 1)
    several = ", ".join("K" if i == dim else str(size) for i, size in enumerate(shape))
    return ValueError(
        f"classes must be an int64 tensor of shape {one} or ({several}{',' * (len(shape) == 1)}) for logits of shape "
        f"{shape}; got {describe(classes)}"
    )


def wrong_sparse_target(classes: Tensor, probabilities: Tensor) -> ValueError:
    """The two tensors of a sparse target do not fit each other."""
    return ValueError(
        "a sparse target must have int64 classes and floating point probabilities of one shape; got "
        f"{describe(classes)} and {describe(probabilities)}"
    )


def unfit_sparse_target(shape: tuple[int, ...], classes: Tensor, device: torch.device) -> ValueError:
    """A sparse target does not fit the logits."""
    dim = min(len(shape) - 1, 1)
    several = ", ".join("K" if i == dim else str(size) for i, size in enumerate(shape))
    return ValueError(
        f"a sparse target must have shape ({several}{',' * (len(shape) == 1)}) on {device} for logits of shape "
        f"{shape}; got {describe(classes)} on {classes.device}"
    )


def wrong_dtype(dtype: Any) -> ValueError:
    """The outputs' type is none of floating point."""
    return ValueError(f"dtype must be a floating point type or None; got {dtype!r}")


# A linear layer and its loss


def not_a_tensor(name: str, value: Any) -> TypeError:
    """A tensor of the layer is something else."""
    return TypeError(f"{name} must be a tensor; got {describe(value)}")


def wrong_features(input: Tensor) -> RuntimeError:
    """The layer's input has more dimensions than rows and features."""
    return RuntimeError(f"input must have shape (D,) or (N, D): flatten other dimensions; got {describe(input)}")


def wrong_layer_weight(input: Tensor, linear_weight: Tensor) -> RuntimeError:
    """The layer's weight does not fit its input."""
    return RuntimeError(
        f"linear_weight must have shape (C, D) or (C, d1, ..., dk, D) with D = {input.shape[-1]} for input of "
        f"shape {tuple(input.shape)}; got {describe(linear_weight)}"
    )


def wrong_layer_bias(linear_weight: Tensor, linear_bias: Tensor) -> RuntimeError:
    """The layer's bias does not fit its weight."""
    return RuntimeError(
        f"linear_bias must have shape {tuple(linear_weight.shape[:-1])} for linear_weight of shape "
        f"{tuple(linear_weight.shape)}; got {describe(linear_bias)}"
    )


def one_row_of_many(input: Tensor, linear_weight: Tensor) -> RuntimeError:
    """A row without a batch dimension meets a weight whose rows of logits have several dimensions."""
    return RuntimeError(
        f"input must have shape (N, {input.shape[-1]}) for linear_weight of shape {tuple(linear_weight.shape)}; "
        f"got {describe(input)}"
    )


def wrong_chunk(value: Any) -> ValueError:
    """A chunk has no such number of rows."""
    return ValueError(f"chunk_rows must be a positive integer or None; got {value!r}")


def module_weight(classes: int, weight: Tensor) -> RuntimeError:
    """The module's class weights are not one a class."""
    return RuntimeError(f"weight must have shape ({classes},); got {tuple(weight.shape)}")


def module_smoothing(label_smoothing: float) -> RuntimeError:
    """The module's smoothing is no share."""
    return RuntimeError(f"label_smoothing must be from 0 to 1; got {label_smoothing!r}")


# Logits divided among ranks

AGREED = {
    "rows": "the logits' shape beside the classes",
    "dtypes": "dtypes and whether there is a weight",
    "options": "ignore_index, reduction, label_smoothing and the other options",
    "target": "the class indices",
}
"""What must be the same on every rank, by its name in `distributed.exchange.CallSummary`."""


def no_process_group() -> RuntimeError:
    """There are no ranks."""
    return RuntimeError("logits divided among ranks need torch.distributed.init_process_group(...) first")


def not_in_group() -> RuntimeError:
    """The process is none of the group's ranks."""
    return RuntimeError("group must contain the calling rank; got a group without it")


def wrong_sizes(sizes: Sequence[int], world: int, rank: int, own: int) -> ValueError:
    """The sizes given are not those of the ranks' slices."""
    return ValueError(
        f"sizes must hold the number of classes of {world} ranks, {own} for rank {rank}; got {tuple(sizes)}"
    )


def unsupported_slice(logits: Any, target: Any, weight: Any) -> RuntimeError:
    """Torch takes the arguments, but the loss of a slice of the classes does not."""
    return RuntimeError(
        "logits divided among ranks must be floating point tensors on a CPU or GPU; class probabilities and weights "
        f"must not require a gradient; got {describe(logits)}, {describe(target)} and weight {describe(weight)}"
    )


def refused_elsewhere(ranks: Iterable[int]) -> RuntimeError:
    """Other ranks' arguments are wrong."""
    return RuntimeError(f"the arguments were refused on rank {', '.join(map(str, ranks))}: the error is raised there")


def ranks_disagree(name: str, rank: int) -> ValueError:
    """A rank's arguments do not fit those of the first; `name` is a key of AGREED."""
    return ValueError(f"{AGREED[name]} must be the same on every rank; rank {rank} differs from rank 0")


def no_classes() -> RuntimeError:
    """All slices are empty."""
    return RuntimeError("the ranks must hold at least one class together; got 0")


def no_second_derivative() -> RuntimeError:
    """The derivative of the gradient would need the other ranks."""
    return RuntimeError("create_graph=True is not supported where logits are divided among ranks")


def unknown_outputs_of_slices(names: Iterable[str], known: Iterable[str]) -> ValueError:
    """An output is not computed of logits that are divided among ranks."""
    return ValueError(
        f"outputs of logits divided among ranks must name some of {', '.join(known)}; got {listed(names)}, which would "
        "need the label's logit before the others are counted"
    )


def unsupported_slice_of_layer(input: Tensor, local_weight: Tensor, local_bias: Tensor | None) -> RuntimeError:
    """The tensors of a linear layer whose classes are divided among ranks do not go together."""
    return RuntimeError(
        "input, local_weight and local_bias must be floating point tensors of one type on one CPU or GPU; got "
        f"{describe(input)}, {describe(local_weight)} and bias {describe(local_bias)}"
    )


def divided_weight(linear_weight: Any) -> RuntimeError:
    """A weight is divided among ranks, and the input is a plain tensor: an FSDP2 weight that has not been gathered."""
    return RuntimeError(
        f"linear_weight is a DTensor placed as {tuple(linear_weight.placements)} beside a plain input, as a weight "
        "under fully_shard is where it has not been gathered: compute the loss in the module's forward, where it is, "
        "or call module.unshard() before, or pass linear_weight.full_tensor(). For a vocabulary that is divided among "
        "ranks, pass linear_weight.to_local() to softmax_fused.distributed.linear_cross_entropy, or a DTensor as input"
    )


def plain_target(placements: Sequence[Any]) -> ValueError:
    """A target without placements may be whole, or a part already."""
    return ValueError(
        f"target must be a DTensor, placed as {tuple(placements)}, for logits whose rows are divided among ranks "
        "and for class probabilities; got a plain tensor, which may be whole or a part"
    )


def uneven_shards(sizes: Sequence[int], rank: int, own: int) -> RuntimeError:
    """A DTensor's classes are divided otherwise than Shard divides them."""
    return RuntimeError(
        f"a DTensor's ranks must hold {sizes} classes, as Shard divides them; rank {rank} has "
        f"{own}: use softmax_fused.distributed.cross_entropy"
    )


# The patch of torch's name


def undone() -> RuntimeError:
    """The patch is over."""
    return RuntimeError("this patch has been undone; call softmax_fused.patch() anew")


def replaced(current: Any) -> str:
    """Say that another library has taken torch's name."""
    return f"torch.nn.functional.cross_entropy has been replaced by {current!r} since softmax_fused.patch(); "


def replaced_before(current: Any) -> RuntimeError:
    """Another library has taken torch's name, which is to be patched again."""
    return RuntimeError(f"{replaced(current)}undo that first")


def replaced_since(current: Any) -> str:
    """Warn that torch's name is not put back."""
    return f"{replaced(current)}it is left as it is"


# Information theory


def unknown_unit(unit: Any) -> ValueError:
    """Information has no such unit."""
    return ValueError(f"unit must be 'nats' or 'bits'; got {unit!r}")


def no_distribution(name: str, value: Any, with_axis: bool) -> RuntimeError:
    """The argument is no tensor of probabilities or logits."""
    shape = " with an axis of outcomes" if with_axis else ""
    return RuntimeError(f"{name} must be a floating point tensor{shape}; got {describe(value)}")


def different_outcomes(names: Collection[str], shapes: Iterable[Sequence[int]], dim: int) -> RuntimeError:
    """Two distributions are not over the same outcomes."""
    return RuntimeError(
        f"{' and '.join(names)} must have shapes that broadcast, with as many outcomes along dim {dim}; "
        f"got {' and '.join(str(tuple(shape)) for shape in shapes)}"
    )


def no_such_axis(shape: Sequence[int], dim: int) -> IndexError:
    """The distributions do not lie along such an axis."""
    return IndexError(f"dim must be from {-len(shape)} to {len(shape) - 1} for shape {tuple(shape)}; got {dim}")


# The loss of causal language models


def logits_or_hidden_states() -> ValueError:
    """Neither logits nor what they are computed from, or more than one of them."""
    return ValueError("give either logits, or hidden_states and lm_head_weight with logits=None")


def no_labels() -> ValueError:
    """Nothing to compare the logits with."""
    return ValueError("labels must be a tensor where shift_labels is None; got None")
