"""A linear layer and its cross-entropy as one function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors
from softmax_fused._dispatch import (
    LAYER,
    LayerCall,
    check_backend,
    get_backend,
    has_subclass,
    layer_dtype,
    loss_dtype,
    route,
)
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.functional import linear_operators
from softmax_fused.functional.chunked_linear import (
    Layer,
    LinearCrossEntropy,
    Plan,
    default_rows,
    product_dtype,
    reduce,
    run_chunks,
)
from softmax_fused.functional.loss import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Cross-entropy of a linear layer's logits, of which one chunk of rows exists at a time.

    .. math::
        z = x W^T + b, \qquad
        \ell_n = -\sum_c w_c \left((1-\epsilon)\, t_{nc} + \frac{\epsilon}{C}\right) \log \mathrm{softmax}(z_n)_c

    Loss and gradient are those of `cross_entropy(torch.nn.functional.linear(input, linear_weight, linear_bias), ...)`,
    up to rounding. The gradients of a mean or sum are computed along with it, chunk by chunk, and that of 16-bit
    weights is summed in float32; those of reduction "none" take the logits once more. What needs no gradient costs no
    matrix product: a frozen head or frozen features. A stand-in for `torch.nn.functional.linear_cross_entropy` on every
    torch.

    On the CPU, rows with an ignored class index take part in no matrix product. On a GPU they do: how many rows are
    left is known on the device alone, and to wait for it would stall the host. Whoever knows the number, or can wait,
    saves them by `input[kept]` and `target[kept]`.

    Args:
        input: Features (D,) or (N, D); float16, bfloat16, float32 or float64.
        linear_weight: Weight of the layer (C, D), or (C, d1, ..., dk, D) for N * d1 * ... * dk rows of logits.
        target: Class indices, int64 of shape (), (N,) or (N, d1, ..., dk), or class probabilities of the logits' shape
            (C,), (N, C) or (N, C, d1, ..., dk).
        linear_bias: Bias of the layer, of `linear_weight`'s shape without D.
        weight: Weight of each class (C,).
        reduction: "mean", "sum" or "none".
        ignore_index: Class index whose rows have no loss and no gradient; None is -100.
        label_smoothing: Share e of the target spread evenly over the classes, at most 1.
        chunk_rows: Rows of input whose logits exist at a time, at most; None for as many as let the chunk be as large
            as the input or the weight, whichever is larger, and not below 2**24 logits.
        backend: As in `cross_entropy`.

    All logits at once, through `torch.nn.functional.linear` and `cross_entropy`: under torch.func, forward-mode AD and
    tracing, for derivatives of higher order, tensor subclasses and gradients of class weights or probabilities, and,
    unless `chunk_rows` is given, for fewer than 2**20 logits on the CPU.

    Returns:
        A scalar, or with reduction "none" a tensor of the target's shape as class indices; of the dtype that
        `cross_entropy` returns.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU the row's loss is NaN, and so are gradients.
        ValueError: Unknown reduction or backend, batch sizes that differ, or chunk_rows below 1.
        RuntimeError: Shapes or dtypes that do not fit, label_smoothing above 1, kernels asked for where none can run.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> loss = linear_cross_entropy(x, weight, torch.tensor([2, 0]), chunk_rows=1)
        >>> loss
        tensor(0.4795, grad_fn=<...>)
        >>> loss.backward()
        >>> weight.grad
        tensor([[ 0.0450,  0.3020],
                [ 0.1224,  0.1388],
                [-0.1674, -0.4407]])

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024. Hsu et al., Liger Kernel: Efficient
        Triton Kernels for LLM Training, 2024 (loss and gradients chunk by chunk).
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    check_backend(backend)
    check_chunk(chunk_rows)
    ignore_index = -100 if ignore_index is None else ignore_index
    options = (reduction, ignore_index, label_smoothing)
    if has_torch_function_variadic(*tensors) and not has_subclass(tensors):
        loss: Tensor = handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, chunk_rows=chunk_rows,
            backend=backend,
        )  # fmt: skip
        return loss
    shape = logits_shape(input, linear_weight, linear_bias)
    loss_arguments = (target, weight, ignore_index, reduction, label_smoothing)
    call = LayerCall(input, linear_weight, linear_bias, shape, chunk_rows, loss_arguments)
    path = route(LAYER, backend, (call,))
    if path in ("small", "torch"):
        return unchunked(*tensors, *options, shape, backend)
    dtype, logits = layer_dtype(input), call.logits()
    spec = make_spec(logits, target, *options, loss_dtype(logits, target))
    single = input.ndim == 1
    rows = input.unsqueeze(0) if single else input
    layer = Layer(
        rows,
        linear_weight.reshape(-1, input.shape[-1]),
        None if linear_bias is None else linear_bias.reshape(-1),
        target.unsqueeze(0) if single else target,
        weight,
    )
    chunk = chunk_rows or default_rows(rows.shape[0], rows.shape[1], layer.linear_weight.shape[0])
    sizes = shape if single else shape[1:]
    if path == "operator":
        options_of_plan = (sizes, chunk, dtype, backend)
        loss = linear_operators.linear_cross_entropy(
            *layer, needs_grad(layer), reduction, ignore_index, float(label_smoothing), spec.dtype, *options_of_plan
        )[0]
    else:
        operations = get_backend(backend, input.device.type).cross_entropy
        loss = chunked(layer, Plan(spec, operations, sizes, chunk, dtype, product_dtype(dtype, input.device)))
    return loss.squeeze(0) if single and reduction == "none" else loss


def check_chunk(chunk_rows: Any) -> None:
    """Refuse what is no number of rows.

    Raises:
        ValueError: If it is neither a positive integer nor None.
    """
    if chunk_rows is not None and not (type(chunk_rows) is int and chunk_rows > 0):
        raise _errors.wrong_chunk(chunk_rows)


def logits_shape(input: Any, linear_weight: Any, linear_bias: Any) -> tuple[int, ...]:
    """Return the shape of a linear layer's logits.

    Raises:
        TypeError: If an argument is no tensor.
        RuntimeError: If the shapes do not fit one another.
    """
    named = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor) and not (name == "linear_bias" and value is None):
            raise _errors.not_a_tensor(name, value)
    if input.ndim not in (1, 2):
        raise _errors.wrong_features(input)
    if linear_weight.ndim < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise _errors.wrong_layer_weight(input, linear_weight)
    sizes = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and linear_bias.shape != sizes:
        raise _errors.wrong_layer_bias(linear_weight, linear_bias)
    if len(sizes) > 1 and input.ndim == 1:
        raise _errors.one_row_of_many(input, linear_weight)
    return (*input.shape[:-1], *sizes)


def needs_grad(layer: Layer) -> list[bool]:
    """Return which of x, W and b need a gradient."""
    tensors = (layer.input, layer.linear_weight, layer.linear_bias)  # torch 2.7 compiles no slice of a NamedTuple
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def chunked(layer: Layer, plan: Plan) -> Tensor:
    """Return the loss, differentiable where x, W or b needs a gradient."""
    if any(needs_grad(layer)):
        loss: Tensor = LinearCrossEntropy.apply(plan, *layer)
        return loss
    return reduce(run_chunks(layer, plan, (False, False, False))[0], layer, plan)[0]


def unchunked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    shape: tuple[int, ...],
    backend: str,
) -> Tensor:
    """Compute all logits at once, and their loss."""
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(-1, input.shape[-1]), bias).reshape(shape)
    return cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        backend=backend,
    )
