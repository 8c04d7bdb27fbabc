"""A linear layer and its cross-entropy as one function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors
from softmax_fused._dispatch import (
    LAYER,
    LayerCall,
    Path,
    check_backend,
    has_subclass,
    is_dtensor,
    layer_dtype,
    loss_dtype,
    route,
    supports_fused,
    under_transform,
)
from softmax_fused._fallback import validate
from softmax_fused._spec import RowSpec
from softmax_fused.backends.torch.row_outputs import effective
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.functional import linear_operators, sparse
from softmax_fused.functional.chunked_linear import (
    Layer,
    LinearCrossEntropy,
    Plan,
    default_rows,
    make_plan,
    reduce,
    run_chunks,
)
from softmax_fused.functional.linear_operators import LOSS
from softmax_fused.functional.loss import cross_entropy
from softmax_fused.functional.rows import check_options, known_options

if TYPE_CHECKING:
    from torch import Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | sparse.SparseTarget,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:
    r"""Cross-entropy of a linear layer's logits, of which one chunk of rows exists at a time.

    .. math::
        z = \mathrm{softcap} \cdot \tanh(\mathrm{logit\_scale} \cdot (x W^T + b) / \mathrm{softcap}), \qquad
        \ell_n = -\sum_c w_c \left((1-\epsilon)\, t_{nc} + \frac{\epsilon}{C}\right) \log \mathrm{softmax}(z_n)_c

    Loss and gradient are those of `cross_entropy(torch.nn.functional.linear(input, linear_weight, linear_bias), ...)`,
    of logits that are scaled and capped where that is asked for, up to rounding. The gradients of a mean or sum are
    computed along with it, chunk by chunk, and that of 16-bit weights is summed in float32; those of reduction "none"
    take the logits once more. What needs no gradient costs no matrix product: a frozen head or frozen features. A
    stand-in for `torch.nn.functional.linear_cross_entropy` on every torch.

    On the CPU, rows with an ignored class index take part in no matrix product. On a GPU they do: how many rows are
    left is known on the device alone, and to wait for it would stall the host. Whoever knows the number, or can wait,
    saves them by `input[kept]` and `target[kept]`.

    Args:
        input: Features (D,) or (N, D); float16, bfloat16, float32 or float64.
        linear_weight: Weight of the layer (C, D), or (C, d1, ..., dk, D) for N * d1 * ... * dk rows of logits.
        target: Class indices, int64 of shape (), (N,) or (N, d1, ..., dk), or class probabilities of the logits' shape
            (C,), (N, C) or (N, C, d1, ..., dk), or a :func:`sparse_target` of K classes a row.
        linear_bias: Bias of the layer, of `linear_weight`'s shape without D.
        weight: Weight of each class (C,).
        reduction: "mean", "sum" or "none".
        ignore_index: Class index whose rows have no loss and no gradient; None is -100.
        label_smoothing: Share e of the target spread evenly over the classes, at most 1.
        logit_scale: What the logits are multiplied by, as by `cross_entropy_rows`.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        dtype: Type of the loss, which class weights may have, too; None for that of `cross_entropy`. float32 keeps the
            digits that a loss of 16 bits would cut off.
        chunk_rows: Rows of input whose logits exist at a time, at most; None for as many as let the chunk be as large
            as the input or the weight, whichever is larger, and not below 2**24 logits.
        backend: As in `cross_entropy`.
        batch_invariant: As in `cross_entropy`, for the loss as a function of the logits. The matrix products are
            torch's, whose bits depend on the number of rows in a chunk.

    All logits at once, through `torch.nn.functional.linear` and `cross_entropy`: under torch.func, forward-mode AD and
    tracing, for derivatives of higher order, tensor subclasses and gradients of class weights or probabilities, and,
    unless `chunk_rows` is given, for fewer than 2**20 logits on the CPU. DTensors of a weight (C, D) that a mesh
    divides by class along one dimension, with rows divided along others alone, are computed from their local parts.

    Returns:
        A scalar, or with reduction "none" a tensor of the target's shape as class indices; of `dtype` or, where that is
        None, of the type that `cross_entropy` returns.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU the row's loss is NaN, and so are gradients.
        ValueError: Unknown reduction or backend, batch sizes that differ, chunk_rows below 1, a scale that is not
            finite or a cap that is not positive.
        RuntimeError: Shapes or dtypes that do not fit, label_smoothing above 1, kernels asked for where none can run, a
            divided DTensor weight beside a plain input.
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
    (check_options if is_compiling() else known_options)(logit_scale, softcap, LOSS, dtype)
    options = (reduction, ignore_index, label_smoothing, logit_scale, softcap)
    if has_torch_function_variadic(*tensors) and not has_subclass(tensors):
        loss: Tensor = handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, logit_scale=logit_scale,
            softcap=softcap, dtype=dtype, chunk_rows=chunk_rows, backend=backend, batch_invariant=batch_invariant,
        )  # fmt: skip
        return loss
    shape = logits_shape(input, linear_weight, linear_bias)
    loss_arguments = (target, weight, ignore_index, reduction, label_smoothing)
    call = LayerCall(input, linear_weight, linear_bias, shape, chunk_rows, loss_arguments, dtype)
    path, call = choose_path(call, backend, batch_invariant)
    if path in ("small", "torch"):
        if takes_local_parts(linear_weight):
            from softmax_fused.distributed import dtensor_linear

            of_parts = dtensor_linear.loss(call, logit_scale, softcap, backend)
            if of_parts is not None:
                return of_parts
        return unchunked(*tensors, *options, dtype, shape, backend, batch_invariant)
    layer, options_of_plan = prepare(call, logit_scale, softcap, backend, batch_invariant)
    if path == "operator":
        loss = linear_operators.linear_cross_entropy(*layer, needs_grad(layer), *options_of_plan)[0]
    else:
        loss = chunked(layer, make_plan(layer, LOSS, *options_of_plan))
    return loss.squeeze(0) if input.ndim == 1 and reduction == "none" else loss


def choose_path(call: LayerCall, backend: str, batch_invariant: bool) -> tuple[Path, LayerCall]:
    """Return who computes a call, and the call with its target as backends take it."""
    target = call.loss[0]
    if not isinstance(target, sparse.SparseTarget):
        return route(LAYER, backend, (call,), batch_invariant), call
    dtype = call.dtype or loss_dtype(call.logits(), target.probabilities)
    routed = with_target(call, sparse.stand_in(call.logits(), target), dtype)
    path = route(LAYER, backend, (routed,), batch_invariant)
    if path in ("operator", "backend") and not sparse.can_pack(target):
        path = "torch"
    return path, with_target(call, target if path in ("small", "torch") else sparse.pack(target), dtype)


def with_target(call: LayerCall, target: Any, dtype: torch.dtype) -> LayerCall:
    """Return a call with another target and the type of its loss; torch 2.7 does not compile a tuple's `_replace`."""
    loss = (target, *call.loss[1:])
    return LayerCall(call.input, call.linear_weight, call.linear_bias, call.shape, call.chunk_rows, loss, dtype)


def prepare(
    call: LayerCall, logit_scale: float, softcap: float | None, backend: str, batch_invariant: bool = False
) -> tuple[Layer, tuple[Any, ...]]:
    """Return the tensors of a call as rows and matrices, and the options of `make_plan`."""
    x, w, b = call.input, call.linear_weight, call.linear_bias
    target, weight, ignore_index, reduction, label_smoothing = call.loss
    if x.ndim == 1:
        x, target, sizes = x.unsqueeze(0), target.unsqueeze(0), call.shape
    else:
        sizes = call.shape[1:]
    layer = Layer(x, w.reshape(-1, x.shape[1]), None if b is None else b.reshape(-1), target, weight)
    chunk = call.chunk_rows or default_rows(x.shape[0], x.shape[1], layer.linear_weight.shape[0])
    dtype = call.dtype or loss_dtype(call.logits(), call.loss[0])
    transform = (float(logit_scale), None if softcap is None else float(softcap))
    options = (
        reduction,
        ignore_index,
        float(label_smoothing),
        *transform,
        dtype,
        sizes,
        chunk,
        layer_dtype(x),
        backend,
        batch_invariant,
    )
    return layer, options


def takes_local_parts(linear_weight: Tensor) -> bool:
    """Whether the weight is a DTensor, of whose local parts the outputs may be computed."""
    return is_dtensor(linear_weight) and not is_compiling() and not under_transform()


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
    target: Tensor | sparse.SparseTarget,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype | None,
    shape: tuple[int, ...],
    backend: str,
    batch_invariant: bool = False,
) -> Tensor:
    """Compute all logits at once, and their loss."""
    logits = all_logits(input, linear_weight, linear_bias, shape)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    options |= {"backend": backend, "batch_invariant": batch_invariant}
    if logit_scale == 1 and softcap is None:
        return cross_entropy(logits, target, weight, **options, dtype=dtype)
    given = sparse.stand_in(logits, target) if isinstance(target, sparse.SparseTarget) else target
    arguments = (logits, given, weight, ignore_index, reduction, label_smoothing)
    if not supports_fused(*arguments, dtype):
        validate(*arguments, values=not is_compiling())
    dtype = dtype or loss_dtype(logits, given)
    spec = make_spec(logits, given, reduction, ignore_index, label_smoothing, dtype)
    x, _ = effective(logits, RowSpec(spec, float(logit_scale), softcap, LOSS))
    weight = None if weight is None else weight.to(x.dtype)
    return cross_entropy(x, target, weight, **options).to(dtype)


def all_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Compute the logits."""
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    return F.linear(input, linear_weight.reshape(-1, input.shape[-1]), bias).reshape(shape)
