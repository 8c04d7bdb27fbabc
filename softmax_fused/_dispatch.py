"""Who computes a call: which backend serves a device, which transforms are active, what the fused path covers.

`route` is the one decision: every function of `functional` asks it once a call.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.compiler import is_compiling

from softmax_fused import _errors
from softmax_fused._errors import REDUCTIONS, TENSORS
from softmax_fused._spec import FLOATS, class_dim
from softmax_fused.backends import REGISTRY
from softmax_fused.backends.sparse import SparseRows
from softmax_fused.backends.torch import BACKEND as TORCH
from softmax_fused.backends.torch import SMALL_CPU_NUMEL
from softmax_fused.backends.torch.targets import kind_of, make_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from softmax_fused._spec import (
        Backend,
        CrossEntropyOperations,
        RowOutputsOperations,
        RowsKind,
        SliceRowsOperations,
        Spec,
        VocabParallelOperations,
    )

# Backends


def check_backend(name: str) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: If so.
    """
    if name != "auto" and name not in REGISTRY:
        raise _errors.unknown_backend(name, REGISTRY)


def explain_backend(device: torch.device) -> tuple[str, str]:
    """Return which backend serves tensors on `device` under backend="auto", and why.

    Example:
        >>> import torch
        >>> explain_backend(torch.device("meta"))
        ('torch', 'meta tensors are served by torch.nn.functional.cross_entropy')
    """
    reasons = []
    for name, registration in REGISTRY.items():
        suits, reason = registration.suits(device)
        if reason:
            reasons.append(reason)
        if suits:
            return name, reason if name != TORCH.name else "; ".join(reasons)
    raise AssertionError("the torch backend suits every device")


@functools.cache
def automatic(device_type: str) -> str:
    """Return the backend that "auto" stands for. It is decided once a process: TRITON_INTERPRET is read then."""
    return explain_backend(torch.device(device_type))[0]


@functools.cache
def get_backend(name: str, device_type: str) -> Backend:
    """Return a backend by its name, loaded at the first call.

    Raises:
        RuntimeError: If it cannot be had on this machine, or cannot serve such a device.
    """
    backend = REGISTRY[automatic(device_type) if name == "auto" else name].load()
    refusal = backend.refusal(device_type)
    if refusal:
        raise RuntimeError(refusal)
    return backend


@functools.cache
def least_numel() -> int:
    """Return how many logits on the CPU are at least not all left to torch's own operator under backend="auto"."""
    return get_backend("auto", "cpu").least_numel


def row_operations(backend: Backend, spec: Spec) -> RowOutputsOperations:
    """Return a backend's operations for outputs of rows, or those it falls back on, for the spec's kind of target."""
    operations = backend.row_outputs or TORCH.row_outputs
    return SparseRows(operations) if spec.target.sparse else operations


def slice_operations(backend: Backend) -> VocabParallelOperations:
    """Return a backend's operations for slices of the classes, or those it falls back on."""
    return backend.vocab_parallel or TORCH.vocab_parallel


def slice_row_operations(backend: Backend) -> SliceRowsOperations:
    """Return a backend's operations for outputs of rows of slices of the classes, or those it falls back on."""
    return backend.slice_rows or TORCH.slice_rows


# Transforms and types


functorch_is_active, dispatch_modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
tracing_state, any_autocast = torch._C._get_tracing_state, torch._C._is_any_autocast_enabled
forward_ad = torch.autograd.forward_ad


def under_transform() -> bool:
    """Whether torch.func, forward-mode AD, tracing or a dispatch mode (fake tensors among them) is active."""
    return (
        functorch_is_active() or forward_ad._current_level >= 0 or dispatch_modes() > 0 or tracing_state() is not None
    )


def can_read(tensor: Any) -> bool:
    """Whether its values can be looked at, without waiting for a device."""
    return type(tensor) in TENSORS and tensor.is_cpu and not is_compiling() and not under_transform()


def exporting() -> bool:
    """Whether torch.export is tracing this call."""
    from softmax_fused import _tracing

    return bool(_tracing.exporting())


def has_subclass(tensors: Iterable[Any]) -> bool:
    """Whether there is a tensor subclass among them, other than torch.nn.Parameter."""
    return any(isinstance(t, torch.Tensor) and type(t) not in TENSORS for t in tensors)


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; there is none before the module of DTensor has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and bool(isinstance(value, module.DTensor))


def loss_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """Return the type of torch's loss: promoted with that of class probabilities, at least float32 under autocast."""
    dtype = torch.promote_types(input.dtype, target.dtype) if target.ndim == input.ndim else input.dtype
    if dtype is not torch.float64 and torch.is_autocast_enabled("cpu" if input.is_cpu else input.device.type):
        return torch.float32
    return dtype


def layer_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which a linear layer uses a tensor: autocast's where it is on, or the tensor's own."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


# What the fused path covers


def supports_fused(
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether the fused path covers a loss's arguments; True only for what torch accepts too.

    With a `dtype` of the loss, what torch accepts once logits and weights have that type.
    """
    return (
        supports_logits(input)
        and supports_target(input, target, ignore_index)
        and (weight is None or supports_weight(input, target, weight, dtype))
        and reduction in REDUCTIONS
        and type(label_smoothing) in (float, int)
        and label_smoothing <= 1
    )


def supports_logits(input: Any) -> bool:
    """Whether `input` is an ordinary, non-empty tensor of logits on a CPU or GPU."""
    return (
        type(input) in TENSORS
        and input.layout is torch.strided
        and (input.is_cpu or input.is_cuda)
        and input.dtype in FLOATS
        and input.ndim > 0
        and input.numel() > 0
    )


def supports_target(input: Tensor, target: Any, ignore_index: Any) -> bool:
    """Whether `target` is an ordinary tensor beside `input`, and its kind takes it."""
    return (
        type(target) in TENSORS
        and ((target.is_cpu and input.is_cpu) or target.device == input.device)
        and type(ignore_index) is int
        and kind_of(input, target).supports(input, target, ignore_index)
    )


def supports_weight(input: Tensor, target: Tensor, weight: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether `weight` is one constant a class in the type of the logits or of the loss."""
    return (
        type(weight) in TENSORS
        and weight.shape == (input.shape[class_dim(input.ndim)],)
        and weight.device == input.device
        and weight.dtype in (input.dtype, dtype or loss_dtype(input, target))
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def supports_softmax(input: Any, dim: Any, dtype: Any) -> bool:
    """Whether the fused path covers the arguments of a softmax; True only for what torch accepts too."""
    return (
        supports_logits(input)
        and type(dim) is int
        and -input.ndim <= dim < input.ndim
        and (dtype is None or dtype in FLOATS)
    )


class LayerCall(NamedTuple):
    """A call of the linear layer's loss."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    shape: tuple[int, ...]  # of the logits
    chunk_rows: int | None
    loss: tuple[Any, ...]  # target, weight, ignore_index, reduction, label_smoothing
    dtype: torch.dtype | None  # asked of the loss

    def logits(self) -> Tensor:
        """Return a stand-in for the logits: their shape, type and device, one element of memory."""
        return self.input.new_empty(1, dtype=layer_dtype(self.input)).expand(self.shape)


def tensors_fit(input: Tensor, *others: Tensor | None) -> bool:
    """Whether the tensors of a linear layer go together: ordinary, of one device and type."""
    return all(
        supports_logits(tensor) and tensor.device == input.device and layer_dtype(tensor) == layer_dtype(input)
        for tensor in (input, *others)
        if tensor is not None
    )


def supports_layer(call: LayerCall) -> bool:
    """Whether the chunked path covers a linear layer and its loss."""
    fit = tensors_fit(call.input, call.linear_weight, call.linear_bias)
    return fit and supports_fused(*(call.logits(), *call.loss, call.dtype))


# For which arguments torch's own operators do better


def never(*_: Any) -> bool:
    """Return False: torch's own operator is not preferred for any size."""
    return False


def wants_gradient(input: Tensor) -> bool:
    """Whether autograd records what is computed from `input`, and will ask for its gradient."""
    return input.requires_grad and torch.is_grad_enabled()


def is_small(input: Tensor, *_: Any) -> bool:
    """Whether the backend that "auto" stands for leaves the loss of such CPU logits to torch's operator, as faster."""
    if type(input) is not torch.Tensor or not input.is_cpu:
        return False
    return get_backend("auto", "cpu").leaves_to_torch(input, wants_gradient(input))


def are_few_of_another_type(input: Tensor, *_: Any) -> bool:
    """Whether the same holds where torch's own operator would need a copy of the logits in the type of the loss."""
    return is_small(input) and input.numel() < SMALL_CPU_NUMEL


def is_small_in_place(input: Tensor, *_: Any) -> bool:
    """Whether the same holds where the gradient, if there is one, is written over the logits: chunks then save more."""
    return is_small(input) and (input.numel() < SMALL_CPU_NUMEL or not wants_gradient(input))


def are_small_rows(kind: RowsKind) -> Callable[..., bool]:
    """Return whether the same holds for outputs of rows of this kind."""

    def are_small(input: Tensor, target: Any, *_: Any) -> bool:
        if type(input) is not torch.Tensor or not input.is_cpu or type(target) is not torch.Tensor:
            return False
        chosen = get_backend("auto", "cpu")
        by = chosen if chosen.row_outputs else TORCH
        return by.leaves_rows_to_torch(input, wants_gradient(input), kind)

    return are_small


def is_small_layer(call: LayerCall) -> bool:
    """Whether the logits are on the CPU and so few that chunks save neither time nor much memory."""
    leaves = is_compiling() or least_numel() > 0  # torch.compile warns of caches, and need not ask
    return call.chunk_rows is None and call.input.is_cpu and leaves and math.prod(call.shape) < SMALL_CPU_NUMEL


def is_small_softmax(input: Any, dim: Any, dtype: Any) -> bool:
    """Whether the backend that "auto" stands for leaves the softmax of such CPU tensors to torch's, as faster."""
    if not (isinstance(input, torch.Tensor) and input.is_cpu and supports_softmax(input, dim, dtype)):
        return False
    return get_backend("auto", "cpu").leaves_softmax_to_torch(input, dim)


def inductor_is_better(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> bool:
    """Whether Inductor does better with torch's operations: for class indices on the CPU, without weights."""
    return input.device.type == "cpu" and target.ndim < input.ndim and weight is None


# What is known of earlier calls


class Call(NamedTuple):
    """A call of the loss that a backend computes, as its signature decides it."""

    spec: Spec
    operations: CrossEntropyOperations
    gradient_with_loss: bool  # also unasked
    left_to_torch: tuple[bool, bool]  # under backend="auto": without a gradient, and with


CALLS: dict[tuple[Any, ...], Call] = {}
"""By signature: the backend, what tensors are but for their numbers, and the options."""

MOST_CALLS = 1024


def make_call(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
    dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Call:
    """Return what computes a call that the fused path covers, whose loss is of `dtype`."""
    chosen = get_backend(backend, input.device.type)
    spec = make_spec(input, target, reduction, ignore_index, label_smoothing, dtype, batch_invariant)
    with_loss = input.device.type in chosen.gradient_with_loss and reduction != "none"
    left = False, False
    if backend == "auto" and input.is_cpu and not batch_invariant:
        left = chosen.leaves_to_torch(input, False), chosen.leaves_to_torch(input, True)
    return Call(spec, chosen.cross_entropy, with_loss, left)


def known_call(
    input: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    backend: str,
    dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Call | None:
    """Return the decision for a call, kept from an earlier call of the same signature or made now.

    None where the signature does not decide: tensor subclasses, transforms, gradients of the target or the weights. It
    must not be called while torch.compile traces.
    """
    if (
        type(input) not in TENSORS
        or type(target) is not torch.Tensor
        or type(reduction) is not str
        or type(ignore_index) is not int
        or type(label_smoothing) is not float  # 0 and False are equal to it, and not the same
        or target.requires_grad
        or (weight is not None and (type(weight) not in TENSORS or weight.requires_grad))
        or under_transform()
    ):
        return None
    signature = (
        input.dtype, input.shape, input.device, input.layout, target.dtype, target.shape, target.device, target.layout,
        weight is not None and (weight.dtype, weight.shape, weight.device), ignore_index, reduction, label_smoothing,
        backend, any_autocast() and torch.is_autocast_enabled(input.device.type), dtype, batch_invariant,
    )  # fmt: skip
    call = CALLS.get(signature)
    if call is None and supports_fused(input, target, weight, ignore_index, reduction, label_smoothing, dtype):
        result = dtype or loss_dtype(input, target)
        call = make_call(input, target, ignore_index, reduction, label_smoothing, backend, result, batch_invariant)
        if len(CALLS) >= MOST_CALLS:
            CALLS.clear()
        CALLS[signature] = call
    return call


# One decision a call

Path = Literal["backend", "operator", "small", "torch"]
"""Who computes: a backend; our custom operator, in a graph of torch.compile; torch's own operator, because it is faster
for few numbers; torch's own operator, because the fused path does not cover the call."""


class Operation(NamedTuple):
    """What `route` asks of the arguments of a function."""

    supported: Callable[..., bool]  # Are they covered by the fused path?
    small: Callable[..., bool]  # Is torch's own operator faster?
    small_in_graph: Callable[..., bool] | None = None  # The same in a graph. None: there is no custom operator.


LOSS = Operation(supports_fused, is_small, inductor_is_better)
LOSS_IN_PLACE = LOSS._replace(small=is_small_in_place)
LOSS_OF_ANOTHER_TYPE = LOSS._replace(small=are_few_of_another_type)
LOSS_OF_ROWS = Operation(supports_fused, are_small_rows("loss"))
ROWS = Operation(supports_fused, are_small_rows("several"))
SPARSE = Operation(supports_fused, are_small_rows("sparse"))
ROWS_WITHOUT_LOSS = Operation(supports_fused, never)
SOFTMAX = Operation(supports_softmax, is_small_softmax)
LAYER = Operation(supports_layer, is_small_layer, is_small_layer)


def route(operation: Operation, backend: str, arguments: tuple[Any, ...], batch_invariant: bool = False) -> Path:
    """Return who computes a call; where it is to be `batch_invariant`, not its size."""
    if is_compiling():
        if (
            operation.small_in_graph is None
            or (backend == "auto" and not batch_invariant and operation.small_in_graph(*arguments))
            or torch._C._are_functorch_transforms_active()
            or exporting()
            or not operation.supported(*arguments)
        ):
            return "torch"
        return "operator"
    if backend == "auto" and not batch_invariant and operation.small(*arguments):
        return "small"
    if under_transform() or not operation.supported(*arguments):
        return "torch"
    return "backend"
