"""The loss of rows whose classes are divided among ranks: statistics of the slices, brought together by all-reduces.

m = max over slices,  s = sum of the slices' s * exp(m_slice - m),  A and <a, z - m> likewise
loss = A * log s - <a, z - m>,  gradient of a slice = g * (A * exp(z - m - log s) - a)

The true class stays out of s until the end, as in the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from softmax_fused.backends.torch import cross_entropy as _torch_path
from softmax_fused.backends.torch import vocab_parallel as _torch_slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused.functional.autograd import Operations, Spec


class SliceOperations(Protocol):
    """What a backend provides; the modules `_launch_slices` and `_torch_slices` do. Rows are numbered flat."""

    def prepare(self, logits: Tensor, target: Tensor, spec: Spec) -> Tensor:
        """Return the target in the form that the others take."""

    def statistics(self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec) -> Tensor:
        """Return m, s and, where a is more than the true class's, its sum and <a, z - m> of each row of the slice."""

    def terms(
        self, parts: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
    ) -> Tensor:
        """Return what is summed over ranks, from the slice's statistics and the m of all slices."""

    def close(
        self, sums: Tensor, m: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and what `gradient` needs, from the sums over ranks: the same on every rank."""

    def gradient(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        spec: Spec,
        grad: Tensor,
    ) -> object:
        """Fill `grad` with the gradient of the slice."""


def slice_operations(operations: Operations) -> SliceOperations:
    """Return the module that computes for slices."""
    if operations is _torch_path:
        return _torch_slices
    from softmax_fused.backends.triton import vocab_parallel as _launch_slices

    return _launch_slices


def all_reduce(tensor: Tensor, operation: str, group: Any) -> Tensor:
    """Reduce in place over the ranks; nothing to do in a world of one or without rows."""
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=group)
    return tensor


class SliceCrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers a row; backward communicates nothing."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, group: Any, module: SliceOperations
    ) -> Tensor:
        """Compute the loss."""
        target = module.prepare(logits, target, spec)
        parts = module.statistics(logits, target, weight, spec)
        m = all_reduce(parts[0].clone(), "MAX", group)
        sums = all_reduce(module.terms(parts, m, logits, target, weight, spec), "SUM", group)
        loss, saved = module.close(sums, m, logits, target, weight, spec)
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.spec, ctx.module = spec, module
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of this rank's logits.

        Raises:
            RuntimeError: If it is to be differentiated: its derivative would need the other ranks.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported where logits are divided among ranks")
        logits, target, weight, *saved = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if grad.numel():
            ctx.module.gradient(upstream, logits, target, weight, saved, ctx.spec, grad)
        return grad, None, None, None, None, None


def slice_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, group: Any, operations: Operations
) -> Tensor:
    """Compute the loss of the logits of one slice; every rank of the group must call it, None is for a lone slice.

    The spec says where the slice begins and how many classes there are.
    """
    loss: Tensor = SliceCrossEntropy.apply(logits, target, weight, spec, group, slice_operations(operations))
    return loss
