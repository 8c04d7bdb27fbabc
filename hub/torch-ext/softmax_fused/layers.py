"""Layers whose `forward` the `kernels` package puts in the place of another layer's.

It demands that a layer has no constructor and no members but `has_backward` and `can_torch_compile`, and that its
forward takes the arguments of the one that it replaces. There `self` is the layer replaced, whose attributes are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from softmax_fused import functional

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropyLoss(nn.Module):
    """In the place of `torch.nn.CrossEntropyLoss`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of logits `input` against `target`."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_index,  # type: ignore[arg-type]
            reduction=self.reduction,  # type: ignore[arg-type]
            label_smoothing=self.label_smoothing,  # type: ignore[arg-type]
        )


class ForCausalLMLoss(nn.Module):
    """In the place of transformers' `ForCausalLMLoss`, which is a function: `kernels` makes a layer of it."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: Tensor | None,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss of `logits`, or of `hidden_states` and `lm_head_weight`, against the next token."""
        return functional.causal_lm_loss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )


class Softmax(nn.Module):
    """In the place of `torch.nn.Softmax`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        """Compute the softmax of `input`."""
        return functional.softmax(input, self.dim)  # type: ignore[arg-type]


class LogSoftmax(nn.Module):
    """In the place of `torch.nn.LogSoftmax`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logarithm of the softmax of `input`."""
        return functional.log_softmax(input, self.dim)  # type: ignore[arg-type]
