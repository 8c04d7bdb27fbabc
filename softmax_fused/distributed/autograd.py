"""The loss of rows whose classes are divided among ranks: two all-reduces merge the statistics of the slices.

m = max over slices,  s = sum of the slices' s * exp(m_slice - m),  A and <a, z - m> likewise
loss = A * log s - <a, z - m>,  gradient of a slice = g * (A * exp(z - m - log s) - a)

The target class is added to s last, as in the kernels, so that confident rows keep all digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from softmax_fused import _errors

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import Spec, VocabParallelOperations


def all_reduce(tensor: Tensor, operation: str, group: Any) -> Tensor:
    """Reduce in place over the ranks; a lone slice (no group) and no rows need no reduction."""
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=group)
    return tensor


class SliceCrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers a row; backward communicates nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        spec: Spec,
        group: Any,
        operations: VocabParallelOperations,
    ) -> Tensor:
        """Compute the loss."""
        target = operations.prepare(logits, target, spec)
        parts = operations.statistics(logits, target, weight, spec)
        m = all_reduce(parts[0].clone(), "MAX", group)
        sums = all_reduce(operations.terms(parts, m, logits, target, weight, spec), "SUM", group)
        loss, saved = operations.finalize(sums, m, logits, target, weight, spec)
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.spec, ctx.operations = spec, operations
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of this rank's logits.

        Raises:
            RuntimeError: If it is to be differentiated: its derivative would need the other ranks.
        """
        if torch.is_grad_enabled():
            raise _errors.no_second_derivative()
        logits, target, weight, *saved = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if grad.numel():
            ctx.operations.gradient(upstream, logits, target, weight, saved, ctx.spec, grad)
        return grad, None, None, None, None, None


def slice_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, group: Any, operations: VocabParallelOperations
) -> Tensor:
    """Compute the loss from one slice of the logits; every rank of the group must call it. A lone slice has no group.

    The spec says where the slice begins and how many classes all slices have.
    """
    loss: Tensor = SliceCrossEntropy.apply(logits, target, weight, spec, group, operations)
    return loss
