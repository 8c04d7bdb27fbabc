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


def make_spec(
    input: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float, dtype: torch.dtype
) -> Spec:
    """Tell class indices from probabilities by their rank; a negative or NaN smoothing is none, as in torch."""
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    return Spec(target.ndim < input.ndim, reduction, ignore_index, max(0.0, label_smoothing), dtype, acc)


class Operations(Protocol):
    """What a backend provides; the modules `_launch` and `_torch_path` do."""

    def loss(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the loss and, with `save`, what `gradient` needs."""

    def saved_shapes(self, logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
        """Return the shapes of what `loss` saves."""

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


BATCHED = tuple(torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched"))


def batched(tensor: Tensor) -> bool:
    """Whether vmap is at work: torch.func.vmap, or torch.autograd.grad(..., is_grads_batched=True)."""
    keys = torch._C._dispatch_keys(tensor)
    return any(keys.has(key) for key in BATCHED)


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
        """Compute the gradient of the logits; where it will be differentiated or is batched, in torch operations."""
        logits, target, weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or batched(upstream):
            grad = _torch_path.differentiable_gradient(upstream, logits, target, weight, ctx.spec)
        else:
            grad = ctx.operations.gradient(upstream, logits, target, weight, saved, ctx.spec)
        return grad, None, None, None, None
