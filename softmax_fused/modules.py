"""The loss and the softmax as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from softmax_fused.activation import log_softmax, softmax
from softmax_fused.functional import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy between logits and class indices or class probabilities, computed by :func:`cross_entropy`.

    It is a `torch.nn.CrossEntropyLoss`: the same arguments, buffers and behaviour; see :func:`cross_entropy` for the
    formula, shapes and errors.

    Args:
        weight: Weight of each class (C,).
        size_average: Deprecated by torch in favour of `reduction`.
        ignore_index: Class index whose rows have no loss and no gradient.
        reduce: Deprecated by torch in favour of `reduction`.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share of the target spread evenly over the classes, at most 1.
        backend: "triton" for the kernels, "torch" for pure torch operations, "auto" for what suits the device.
        grad_in_forward: Compute the gradient with the loss, in one launch.
        inplace_backward: Write the gradient over the logits.

    Example:
        >>> import torch
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.3365)
    """

    backend: str
    grad_in_forward: bool = False
    inplace_backward: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        backend: str = "auto",
        grad_in_forward: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.backend = backend
        self.grad_in_forward = grad_in_forward
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of logits `input` against `target`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
            grad_in_forward=self.grad_in_forward,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        """Show what differs from torch's module."""
        shown = {
            "backend": self.backend,
            "grad_in_forward": self.grad_in_forward,
            "inplace_backward": self.inplace_backward,
        }
        usual = ("auto", False)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value not in usual)


class Softmax(nn.Softmax):
    """Softmax along a dimension, computed by :func:`softmax`: a `torch.nn.Softmax` otherwise.

    Args:
        dim: Dimension that sums to 1; None, as torch's, guesses with a warning.

    Example:
        >>> import torch
        >>> Softmax(dim=1)(torch.tensor([[2.0, 0.0, -1.0]]))
        tensor([[0.8438, 0.1142, 0.0420]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute the softmax of `input`."""
        return softmax(input, self.dim)


class LogSoftmax(nn.LogSoftmax):
    """Logarithm of the softmax along a dimension, computed by :func:`log_softmax`: a `torch.nn.LogSoftmax` otherwise.

    Args:
        dim: Dimension along which the exponentials sum to 1; None, as torch's, guesses with a warning.

    Example:
        >>> import torch
        >>> LogSoftmax(dim=1)(torch.tensor([[2.0, 0.0, -1.0]]))
        tensor([[-0.1698, -2.1698, -3.1698]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logarithm of the softmax of `input`."""
        return log_softmax(input, self.dim)
