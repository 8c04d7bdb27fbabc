"""Vocabulary-parallel cross-entropy as a function: every rank holds a contiguous slice of the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from softmax_fused import _errors
from softmax_fused._dispatch import check_backend, get_backend, loss_dtype, slice_operations
from softmax_fused._errors import REFUSALS
from softmax_fused._spec import class_dim
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.distributed.autograd import slice_cross_entropy
from softmax_fused.distributed.exchange import Arguments, exchange, validation_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["cross_entropy"]


def cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Cross-entropy of logits whose classes are divided among the ranks of a process group.

    .. math::
        m = \max_r m_r, \quad s = \sum_r s_r e^{m_r - m}, \quad
        \ell = A \log s - \langle a, z - m \rangle, \quad
        \frac{\partial \ell}{\partial z_r} = A\, e^{z_r - m - \log s} - a_r

    with `a` and A as in :func:`softmax_fused.cross_entropy`. Rank r of the group holds the classes that follow those of
    rank r - 1, any number of them, none included. The loss is that of the whole logits, the same on every rank to the
    bit; the gradient is that of the rank's slice. All ranks must call it.

    Communication for N rows, in numbers of float32 (float64 for float64): forward two all-reduces, one of the N row
    maxima and one of the packed sums and true-class terms, 2 N for plain class indices, N more with weights, 2 N more
    with smoothing, 3 N for class probabilities; backward none; all independent of C. Before them, unless `sizes` is
    given, one all-gather of 64 bytes a rank: the slices' sizes, and what shows whether the ranks' arguments are right
    and fit together. It waits for the device. Arguments that one rank refuses then raise on every rank. With `sizes`
    they raise there alone, and the other ranks wait until the group's timeout. Under torch.compile it runs
    untraced, between two graphs.

    Args:
        local_logits: This rank's slice of the logits, (C_r,), (N, C_r) or (N, C_r, d1, ..., dk); any strides.
        target: Class indices among all classes, int64 of the logits' shape without C_r, the same on every rank; or this
            rank's slice of the class probabilities, of the logits' shape.
        weight: Weight of each class of the slice (C_r,), on every rank or on none.
        ignore_index: Class index whose rows have no loss and no gradient.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share e of the target spread evenly over all classes, at most 1.
        group: The ranks; None for all.
        sizes: Number of classes on each rank, where known: no all-gather, and nothing waits for the device.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.

    Returns:
        A scalar, or with reduction "none" a tensor of the logits' shape without C_r; of the dtype that
        :func:`softmax_fused.cross_entropy` returns. Not differentiable twice.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss and gradient are NaN.
        ValueError: Unknown reduction or backend, arguments that differ between ranks, `sizes` that do not fit.
        RuntimeError: Shapes or dtypes that do not fit, class probabilities or weights that require a gradient,
            label_smoothing above 1, kernels asked for where none can run, another rank's error.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> local_logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> loss = cross_entropy(local_logits, torch.tensor([0, 2]))  # the only slice
        >>> loss
        tensor(0.8607, grad_fn=<...>)
        >>> loss.backward()
        >>> local_logits.grad
        tensor([[-0.0781,  0.0571,  0.0210],
                [ 0.1060,  0.2881, -0.3940]])
        >>> dist.destroy_process_group()

    References:
        Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019.
    """
    given = Arguments(local_logits, target, weight, ignore_index, reduction, label_smoothing)
    if torch.compiler.is_compiling():
        from softmax_fused.distributed import untraced

        loss: Tensor = untraced.compute(given, group, sizes, backend)
        return loss
    return compute(given, group, sizes, backend)


def compute(it: Arguments, group: dist.ProcessGroup | None, sizes: Sequence[int] | None, backend: str) -> Tensor:
    """Check that the ranks' arguments agree, and compute the loss."""
    ranks, rank = members(group)
    problem = validation_error(it) or backend_error(it.logits, backend)
    sizes = agreed_sizes(it, problem, sizes, ranks, rank)
    dtype = loss_dtype(it.logits, it.target)
    spec = make_spec(it.logits, it.target, it.reduction, it.ignore_index, it.label_smoothing, dtype)
    spec = spec._replace(classes=sum(sizes), first=sum(sizes[:rank]))
    others = ranks if len(sizes) > 1 else None
    operations = slice_operations(get_backend(backend, it.logits.device.type))
    return slice_cross_entropy(it.logits, it.target, it.weight, spec, others, operations)


def agreed_sizes(
    it: Arguments, problem: Exception | None, sizes: Sequence[int] | None, ranks: Any, rank: int
) -> Sequence[int]:
    """Return the number of classes on every rank: those given, or what an all-gather says.

    Raises:
        Exception: If the arguments are wrong; without sizes given, on every rank, also where they differ.
    """
    if sizes is None:
        return exchange(it, problem, ranks)
    if problem is not None:
        raise problem
    check_sizes(sizes, it.logits, dist.get_world_size(ranks), rank)
    return sizes


def members(group: dist.ProcessGroup | None) -> tuple[Any, int]:
    """Return the group, and this process's rank in it.

    Raises:
        RuntimeError: If there is no group, or the process is not in it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise _errors.no_process_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise _errors.not_in_group()
    return (dist.group.WORLD if group is None else group), rank


def backend_error(logits: Tensor, backend: str) -> Exception | None:
    """Return the error for a backend that does not exist or cannot serve the logits."""
    try:
        check_backend(backend)
        get_backend(backend, logits.device.type)
    except REFUSALS as error:
        return error
    return None


def check_sizes(sizes: Sequence[int], logits: Tensor, world: int, rank: int) -> None:
    """Refuse sizes that are not those of the ranks' slices.

    Raises:
        ValueError: If so.
    """
    own = logits.shape[class_dim(logits.ndim)]
    if len(sizes) != world or min(sizes) < 0 or sizes[rank] != own:
        raise _errors.wrong_sizes(sizes, world, rank, own)
