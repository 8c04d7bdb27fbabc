"""The outputs of each row of a linear layer's logits, as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused._dispatch import LayerCall, check_backend, has_subclass
from softmax_fused._row_outputs import OUTPUTS, RowOutputs
from softmax_fused.functional import linear_row_operators
from softmax_fused.functional.chunked_linear import Layer, Plan, make_plan
from softmax_fused.functional.chunked_linear_rows import LinearCrossEntropyRows, forward
from softmax_fused.functional.linear import (
    all_logits,
    check_chunk,
    choose_path,
    logits_shape,
    needs_grad,
    prepare,
    takes_local_parts,
)
from softmax_fused.functional.rows import check_options, check_target_class, cross_entropy_rows, known_options

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from softmax_fused.functional.sparse import SparseTarget


def linear_cross_entropy_rows(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseTarget,
    *,
    outputs: Collection[str] = ("loss",),
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> RowOutputs:
    r"""Outputs of each row of a linear layer's logits, of which one chunk of rows exists at a time.

    .. math::
        z = x W^T + b, \quad
        u = \mathrm{softcap} \cdot \tanh(\mathrm{logit\_scale} \cdot z / \mathrm{softcap}), \quad
        \mathrm{logsumexp}_n = \log \sum_c \exp u_{nc}, \quad
        H_n = -\sum_c p_{nc} \log p_{nc}, \quad \mathrm{log\_prob}_n = \log p_{n y_n}, \quad
        p_n = \mathrm{softmax}(u_n)

    These are the :class:`RowOutputs` of
    `cross_entropy_rows(torch.nn.functional.linear(input, linear_weight, linear_bias), ...)`, up to rounding. Those that
    can be differentiated may be so together, by input, weight and bias; the gradient of 16-bit weights is summed in
    float32. Forward takes one matrix product a chunk. Backward computes the chunk's logits once more, then the products
    for those gradients that are needed: where a mean or sum of the losses is all that is wanted, `linear_cross_entropy`
    is cheaper by that product.

    On the CPU, rows without an upstream gradient are left out of backward's products, and rows with an ignored class
    index out of forward's where nothing but loss, log_prob and rank is asked for, which are 0, 0 and -1 there: the
    other outputs are those of any row. On a GPU no row is left out, as in `linear_cross_entropy`.

    Args:
        input: Features (D,) or (N, D); float16, bfloat16, float32 or float64.
        linear_weight: Weight of the layer (C, D), or (C, d1, ..., dk, D) for N * d1 * ... * dk rows of logits.
        target: Class indices, int64 of shape (), (N,) or (N, d1, ..., dk), or class probabilities of the logits' shape
            (C,), (N, C) or (N, C, d1, ..., dk), or a :func:`sparse_target` of K classes a row.
        outputs: Names of the outputs wanted, of those of `cross_entropy_rows`, log_prob and rank included.
        linear_bias: Bias of the layer, of `linear_weight`'s shape without D.
        weight: Weight of each class (C,).
        ignore_index: Class index whose rows have no loss; None is -100.
        label_smoothing: Share of the target spread evenly over the classes, at most 1.
        logit_scale: What the logits are multiplied by: a number, the same for all rows.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        dtype: Type of the outputs other than prediction and rank, as in `cross_entropy_rows`.
        chunk_rows: Rows of input whose logits exist at a time, at most; None as in `linear_cross_entropy`.
        backend: As in `cross_entropy`.
        batch_invariant: As in `cross_entropy`, for the loss as a function of the logits. The matrix products are
            torch's, whose bits depend on the number of rows in a chunk.

    All logits at once, through `torch.nn.functional.linear` and `cross_entropy_rows`, as in `linear_cross_entropy`:
    under torch.func, forward-mode AD and tracing, for derivatives of higher order, tensor subclasses and gradients of
    class weights or probabilities, and, unless `chunk_rows` is given, for fewer than 2**20 logits on the CPU. DTensors
    that `linear_cross_entropy` computes from their local parts are so here, unless the rank is asked for.

    Returns:
        A :class:`RowOutputs` of tensors of the target's shape as class indices, None for what `outputs` does not name.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss, log_prob and
            gradient are NaN, its rank is -1.
        ValueError: Unknown output or backend, a cap that is not positive, batch sizes that differ, chunk_rows below 1,
            an output that needs a target class where there are class probabilities.
        RuntimeError: Shapes or dtypes that do not fit, label_smoothing above 1, kernels asked for where none can run, a
            divided DTensor weight beside a plain input.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> rows = linear_cross_entropy_rows(x, weight, torch.tensor([2, 0]), outputs=("loss", "prediction"))
        >>> rows.prediction
        tensor([2, 0])
        >>> rows.loss
        tensor([0.4076, 0.5514], grad_fn=<...>)

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024. Hsu et al., Liger Kernel: Efficient
        Triton Kernels for LLM Training, 2024.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    named = outputs if isinstance(outputs, (str, tuple)) else tuple(outputs)
    wanted = (check_options if is_compiling() else known_options)(logit_scale, softcap, named, dtype)
    check_backend(backend)
    check_chunk(chunk_rows)
    ignore_index = -100 if ignore_index is None else ignore_index
    if has_torch_function_variadic(*tensors) and not has_subclass(tensors):
        overridden: RowOutputs = handle_torch_function(
            linear_cross_entropy_rows, tensors, input, linear_weight, target, outputs=outputs, linear_bias=linear_bias,
            weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, logit_scale=logit_scale,
            softcap=softcap, dtype=dtype, chunk_rows=chunk_rows, backend=backend, batch_invariant=batch_invariant,
        )  # fmt: skip
        return overridden
    shape = logits_shape(input, linear_weight, linear_bias)
    loss_arguments = (target, weight, ignore_index, "none", label_smoothing)
    call = LayerCall(input, linear_weight, linear_bias, shape, chunk_rows, loss_arguments, dtype)
    path, call = choose_path(call, backend, batch_invariant)
    if path in ("small", "torch"):
        if takes_local_parts(linear_weight) and isinstance(target, torch.Tensor) and "rank" not in wanted:
            from softmax_fused.distributed import dtensor_linear

            of_parts = dtensor_linear.rows(call, logit_scale, softcap, wanted, backend)
            if of_parts is not None:
                return of_parts
        logits = all_logits(input, linear_weight, linear_bias, shape)
        return cross_entropy_rows(
            logits, target, weight, ignore_index, label_smoothing, logit_scale=logit_scale, softcap=softcap,
            outputs=wanted, dtype=call.dtype, backend=backend, batch_invariant=batch_invariant,
        )  # fmt: skip
    check_target_class(wanted, isinstance(target, torch.Tensor) and target.ndim < len(shape), call.loss[0])
    layer, options = prepare(call, logit_scale, softcap, backend, batch_invariant)
    if path == "operator":
        found = by_operator(layer, wanted, options)
    else:
        found = chunked(layer, make_plan(layer, wanted, *options))
    if input.ndim == 1:
        found = RowOutputs(*(None if it is None else it.squeeze(0) for it in found))
    return found


def chunked(layer: Layer, plan: Plan) -> RowOutputs:
    """Return the outputs, differentiable where x, W or b needs a gradient."""
    if any(needs_grad(layer)):
        return RowOutputs(*LinearCrossEntropyRows.apply(plan, *layer))
    return forward(layer, plan, save=False)[0]


def by_operator(layer: Layer, outputs: tuple[str, ...], options: tuple[Any, ...]) -> RowOutputs:
    """Compute the outputs by the operator, None for those that are not asked for."""
    found = linear_row_operators.linear_cross_entropy_rows(*layer, ",".join(outputs), needs_grad(layer), *options)
    values = [found[place] if name in outputs else None for place, name in enumerate(OUTPUTS)]
    return RowOutputs(*values)  # type: ignore[arg-type]  # None as the caller asked
