"""A linear layer whose classes are divided among ranks, and its loss or other outputs of rows, as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from softmax_fused import _errors
from softmax_fused._dispatch import LayerCall, layer_dtype, loss_dtype
from softmax_fused._errors import REFUSALS
from softmax_fused.distributed.exchange import Arguments, layer_fits, validation_error
from softmax_fused.distributed.row_autograd import mean_over, slice_of_layer
from softmax_fused.distributed.rows import finished, options_error, row_options
from softmax_fused.distributed.vocab_parallel import agreed_sizes, backend_error, members
from softmax_fused.functional.linear import check_chunk, logits_shape

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowSpec


class LinearArguments(NamedTuple):
    """A call's arguments on one rank, beside those that say who takes part."""

    input: Tensor
    local_weight: Tensor
    target: Tensor
    local_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    logit_scale: float
    softcap: float | None
    outputs: Any
    dtype: torch.dtype | None
    chunk_rows: int | None
    backend: str


def linear_cross_entropy_rows(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    *,
    outputs: Collection[str] = ("loss",),
    local_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> RowOutputs:
    r"""Outputs of each row of a linear layer's logits, where every rank holds the weight of a slice of the classes.

    .. math::
        z_r = x W_r^T + b_r, \quad
        \frac{\partial \ell}{\partial W_r} = G_r^T x, \quad
        \frac{\partial \ell}{\partial x} = \sum_r G_r W_r, \quad G_r = \frac{\partial \ell}{\partial z_r}

    They are those of :func:`softmax_fused.linear_cross_entropy_rows` with the whole weight, up to rounding, and the
    same on every rank to the bit. On a rank the logits of one chunk of rows and its own classes exist at a time. The
    input must be the same on every rank, and its gradient is, too: backward sums the parts of the ranks. The gradients
    of weight and bias are those of the rank's slice.

    Communication: forward that of :func:`cross_entropy_rows`, the all-gather and two all-reduces, three with the
    prediction, independent of C. Backward one all-reduce of the input's gradient, N D numbers, and none where the input
    needs no gradient. All ranks must call both, and ask for the gradient of the input on all of them or on none. A step
    takes four matrix products on a rank, as backward computes the logits once more.

    Args:
        input: Features (D,) or (N, D), the same on every rank; float16, bfloat16, float32 or float64.
        local_weight: Weight of the layer for this rank's classes (C_r, D), or (C_r, d1, ..., dk, D).
        target: Class indices among all classes, int64 of shape (), (N,) or (N, d1, ..., dk), the same on every rank; or
            this rank's slice of the class probabilities, (C_r,), (N, C_r) or (N, C_r, d1, ..., dk).
        outputs: Names of the outputs wanted, of those of :func:`cross_entropy_rows`.
        local_bias: Bias of the layer for this rank's classes, on every rank or on none.
        weight: Weight of each class of the slice (C_r,), on every rank or on none.
        ignore_index: Class index whose rows have no loss.
        label_smoothing: Share of the target spread evenly over all classes, at most 1.
        logit_scale: What the logits are multiplied by.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        dtype: Type of the outputs other than the prediction, as in :func:`softmax_fused.linear_cross_entropy_rows`.
        chunk_rows: Rows of input whose logits exist at a time, at most; None as in `linear_cross_entropy`.
        group: The ranks; None for all.
        sizes: Number of classes on each rank, where known: no all-gather, and nothing waits for the device.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.

    Returns:
        A :class:`softmax_fused.RowOutputs` of tensors of the target's shape as class indices, None for what `outputs`
        does not name. Not differentiable twice.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss, log_prob and gradient are
            NaN.
        ValueError: Unknown output or backend, arguments that differ between ranks, `sizes` that do not fit, chunk_rows
            below 1, an output that needs a target class where there are class probabilities.
        RuntimeError: Shapes or dtypes that do not fit, class probabilities or weights that require a gradient,
            label_smoothing above 1, kernels asked for where none can run, another rank's error.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
        >>> local_weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # the only slice
        >>> rows = linear_cross_entropy_rows(x, local_weight, torch.tensor([2, 0]), outputs=("loss", "prediction"))
        >>> rows.loss
        tensor([0.4076, 0.5514])
        >>> rows.prediction
        tensor([2, 0])
        >>> dist.destroy_process_group()

    References:
        Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019.
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
    """
    named = outputs if isinstance(outputs, str) else tuple(outputs)
    given = LinearArguments(
        input, local_weight, target, local_bias, weight, ignore_index, "none", label_smoothing, logit_scale, softcap,
        named, dtype, chunk_rows, backend,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        from softmax_fused.distributed import untraced

        rows: RowOutputs = untraced.compute_linear_rows(given, group, sizes)
        return rows
    return compute_rows(given, group, sizes)


def linear_cross_entropy(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor,
    *,
    local_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Cross-entropy of a linear layer's logits, where every rank holds the weight of a slice of the classes.

    .. math::
        z_r = x W_r^T + b_r, \quad
        \frac{\partial \ell}{\partial W_r} = G_r^T x, \quad
        \frac{\partial \ell}{\partial x} = \sum_r G_r W_r, \quad G_r = \frac{\partial \ell}{\partial z_r}

    The loss is that of :func:`softmax_fused.linear_cross_entropy` with the whole weight, up to rounding, and the same
    on every rank to the bit. :func:`linear_cross_entropy_rows` says what the ranks hold, what they send each other, and
    which gradients they get.

    Args:
        input: Features (D,) or (N, D), the same on every rank; float16, bfloat16, float32 or float64.
        local_weight: Weight of the layer for this rank's classes (C_r, D), or (C_r, d1, ..., dk, D).
        target: Class indices among all classes, int64 of shape (), (N,) or (N, d1, ..., dk), the same on every rank; or
            this rank's slice of the class probabilities, (C_r,), (N, C_r) or (N, C_r, d1, ..., dk).
        local_bias: Bias of the layer for this rank's classes, on every rank or on none.
        weight: Weight of each class of the slice (C_r,), on every rank or on none.
        reduction: "mean", "sum" or "none".
        ignore_index: Class index whose rows have no loss and no gradient.
        label_smoothing: Share e of the target spread evenly over all classes, at most 1.
        logit_scale: What the logits are multiplied by.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        dtype: Type of the loss, which class weights may have, too; None for that of `cross_entropy`.
        chunk_rows: Rows of input whose logits exist at a time, at most; None as in `linear_cross_entropy`.
        group: The ranks; None for all.
        sizes: Number of classes on each rank, where known: no all-gather, and nothing waits for the device.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.

    Returns:
        A scalar, or with reduction "none" a tensor of the target's shape as class indices. Not differentiable twice.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU the row's loss is NaN, and so are gradients.
        ValueError: Unknown reduction or backend, arguments that differ between ranks, `sizes` that do not fit,
            chunk_rows below 1.
        RuntimeError: Shapes or dtypes that do not fit, class probabilities or weights that require a gradient,
            label_smoothing above 1, kernels asked for where none can run, another rank's error.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
        >>> local_weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # the only slice
        >>> loss = linear_cross_entropy(x, local_weight, torch.tensor([2, 0]))
        >>> loss
        tensor(0.4795, grad_fn=<...>)
        >>> loss.backward()
        >>> x.grad
        tensor([[-0.1224, -0.0450],
                [-0.1060,  0.2119]])
        >>> dist.destroy_process_group()

    References:
        Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019.
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
    """
    given = LinearArguments(
        input, local_weight, target, local_bias, weight, ignore_index, reduction, label_smoothing, logit_scale, softcap,
        ("loss",), dtype, chunk_rows, backend,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        from softmax_fused.distributed import untraced

        loss: Tensor = untraced.compute_linear(given, group, sizes)
        return loss
    return compute(given, group, sizes)


def compute_rows(it: LinearArguments, group: dist.ProcessGroup | None, sizes: Sequence[int] | None) -> RowOutputs:
    """Check that the ranks' arguments agree, and compute the outputs."""
    arguments, options, others = agreed(it, group, sizes)
    found, _ = slice_of_layer(layer_call(it), options, others, it.backend)
    return finished(found, result_shape(it), it.dtype or loss_dtype(arguments.logits, it.target))


def compute(it: LinearArguments, group: dist.ProcessGroup | None, sizes: Sequence[int] | None) -> Tensor:
    """Check that the ranks' arguments agree, and compute the loss."""
    arguments, options, others = agreed(it, group, sizes)
    (losses, *_), label_weight = slice_of_layer(layer_call(it), options, others, it.backend)
    assert losses is not None
    dtype = it.dtype or loss_dtype(arguments.logits, it.target)
    if it.reduction == "none":
        return losses.view(result_shape(it)).to(dtype)
    total = losses.sum(dtype=torch.float64)
    if it.reduction == "mean":
        count = mean_over(arguments, label_weight)
        total = total / count.masked_fill(count == 0, torch.nan)
    return total.to(dtype)


def layer_call(it: LinearArguments) -> LayerCall:
    """Return the slice of the layer as a layer."""
    loss = (it.target, it.weight, it.ignore_index, "none", it.label_smoothing)
    shape = logits_shape(it.input, it.local_weight, it.local_bias)
    return LayerCall(it.input, it.local_weight, it.local_bias, shape, it.chunk_rows, loss, it.dtype)


def result_shape(it: LinearArguments) -> tuple[int, ...]:
    """Return the shape of the outputs of rows."""
    return (*it.input.shape[:-1], *it.local_weight.shape[1:-1])


def layer_error(it: LinearArguments) -> Exception | None:
    """Return what is wrong with the tensors of the layer, or None."""
    try:
        check_chunk(it.chunk_rows)
        logits_shape(it.input, it.local_weight, it.local_bias)
    except REFUSALS as error:
        return error
    if layer_fits(it.input, it.local_weight, it.local_bias):
        return None
    return _errors.unsupported_slice_of_layer(it.input, it.local_weight, it.local_bias)


def agreed(
    it: LinearArguments, group: dist.ProcessGroup | None, sizes: Sequence[int] | None
) -> tuple[Arguments, RowSpec, Any]:
    """Check the arguments, on every rank; return them with a stand-in for the logits, what is asked for, and the group.

    The stand-in has the logits' shape, type and device, and one element of memory. A lone slice has no group.
    """
    ranks, rank = members(group)
    problem = layer_error(it)
    logits = it.input
    if problem is None:
        shape = logits_shape(it.input, it.local_weight, it.local_bias)
        logits = it.input.new_empty(1, dtype=layer_dtype(it.input)).expand(shape)
    same = (
        it.logit_scale, it.softcap, it.outputs, it.input.shape[-1:], it.local_bias is None,
        it.input.requires_grad and torch.is_grad_enabled(),
    ) if problem is None else ()  # fmt: skip
    arguments = Arguments(
        logits, it.target, it.weight, it.ignore_index, it.reduction, it.label_smoothing, it.dtype, same
    )
    problem = problem or validation_error(arguments) or backend_error(logits, it.backend)
    problem = problem or options_error(
        it.logit_scale, it.softcap, it.outputs, it.dtype, it.target.ndim < logits.ndim, it.target
    )
    sizes = agreed_sizes(arguments, problem, sizes, ranks, rank)
    options = row_options(arguments, it.logit_scale, it.softcap, it.outputs, sizes, rank)
    return arguments, options, ranks if len(sizes) > 1 else None
