"""The torch.autograd.Function behind the loss, and what its two implementations are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from softmax_fused import _torch_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Spec(NamedTuple):
    """What a call asks for, beside its tensors."""

    indices: bool  # class indices, not class probabilities
    reduction: str
    ignore_index: int
    label_smoothing: float
    dtype: torch.dtype  # of the loss
    acc: torch.dtype  # arithmetic: float32, or float64 where a tensor is float64


class Operations(Protocol):
    """What a backend provides; the modules `_launch` and `_torch_path` do."""

    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the loss and, with `save`, what `gradient` needs."""

    def gradient(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        spec: Spec,
    ) -> Tensor:
        """Compute the gradient of the logits."""


class CrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers a row; the softmax is computed again in backward, never stored."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, operations: Operations
    ) -> Tensor:
        """Compute the loss."""
        loss, saved = operations.loss(logits, target, weight, spec, save=True)
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.spec, ctx.operations = spec, operations
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; under create_graph=True one that can be differentiated again."""
        logits, target, weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = _torch_path.differentiable_gradient(upstream, logits, target, weight, ctx.spec)
        else:
            grad = ctx.operations.gradient(upstream, logits, target, weight, saved, ctx.spec)
        return grad, None, None, None, None
