"""The torch.autograd.Function behind the loss, and what its two implementations are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from softmax_fused.backends.torch import cross_entropy as _torch_path

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
    classes: int = 0  # of all slices, where the logits are a slice of the classes
    first: int = 0  # class of the slice


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
        grad: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the logits, into `grad` where given, which may be the logits themselves."""

    def loss_and_gradient(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Compute the loss, what `gradient` needs, and the gradient for an upstream gradient of 1, if that pays.

        It is written to `grad` where given, which may be the logits themselves.
        """

    def unless_one(
        self,
        upstream: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        spec: Spec,
        grad: Tensor,
    ) -> Tensor:
        """Bring `grad`, the gradient for an upstream gradient of 1, to another, without asking the device."""


BATCHED = tuple(torch._C._dispatch_key_parse(name) for name in ("Batched", "FuncTorchBatched"))


def batched(tensor: Tensor) -> bool:
    """Whether vmap is at work: torch.func.vmap, or torch.autograd.grad(..., is_grads_batched=True)."""
    keys = torch._C._dispatch_keys(tensor)
    return any(keys.has(key) for key in BATCHED)


class CrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers a row; the softmax is computed again in backward, never stored.

    `when` says where the gradient comes from: "backward" computes it into a new tensor, "in place" over the logits, and
    "forward" with the loss, for an upstream gradient of 1; backward then only corrects it where it is not 1.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, operations: Operations, when: str
    ) -> Tensor:
        """Compute the loss."""
        ctx.ready = None
        if when == "forward":
            loss, saved, ctx.ready = operations.loss_and_gradient(logits, target, weight, spec)
        else:
            loss, saved = operations.loss(logits, target, weight, spec, save=True)
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.spec, ctx.operations, ctx.when = spec, operations, when
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; where it will be differentiated or is batched, in torch operations."""
        logits, target, weight, *saved = ctx.saved_tensors
        arguments = (upstream, logits, target, weight, saved, ctx.spec)
        if torch.is_grad_enabled() or batched(upstream):
            grad = _torch_path.differentiable_gradient(upstream, logits, target, weight, ctx.spec)
        elif ctx.when == "in place":
            grad = ctx.operations.gradient(*arguments, grad=logits.detach())
            torch.autograd.graph.increment_version(logits)  # whoever still wants the logits gets autograd's error
        elif ctx.ready is not None:
            grad, ctx.ready = ctx.ready, None  # given away once: a second backward computes its own
            grad = ctx.operations.unless_one(*arguments, grad)
        else:
            grad = ctx.operations.gradient(*arguments)
        return grad, None, None, None, None, None
