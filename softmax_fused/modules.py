"""The losses and softmax as modules.

Options have defaults in the class, so that modules made before an option existed, and torch's modules whose `__class__`
is set to one of these, have it. torch.jit.script takes the modules as it takes torch's: a scripted module calls torch's
operator. It reads the annotations of the class, which must be types and not strings.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from softmax_fused import _errors
from softmax_fused._fallback import torch_function
from softmax_fused.functional import cross_entropy, linear_cross_entropy, log_softmax, softmax

is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]  # public, but torch's stubs do not say so


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
        dtype: Type of the loss; None for torch's. A scripted module has torch's.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.
        grad_in_forward: Compute the gradient with the loss, in one launch.
        inplace_backward: Write the gradient over the logits.
        batch_invariant: Give a row the same bits in every batch.

    Example:
        >>> import torch
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor(0.3365)
    """

    dtype: Optional[torch.dtype] = None  # noqa: UP045 - torch.jit.script reads it
    backend: str = "auto"
    grad_in_forward: bool = False
    inplace_backward: bool = False
    batch_invariant: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        grad_in_forward: bool = False,
        inplace_backward: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.dtype = dtype
        self.backend = backend
        self.grad_in_forward = grad_in_forward
        self.inplace_backward = inplace_backward
        self.batch_invariant = batch_invariant

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of logits `input` against `target`."""
        if not is_scripting():
            return cross_entropy(
                input,
                target,
                self.weight,
                None,
                self.ignore_index,
                None,
                self.reduction,
                self.label_smoothing,
                dtype=self.dtype,
                backend=self.backend,
                grad_in_forward=self.grad_in_forward,
                inplace_backward=self.inplace_backward,
                batch_invariant=self.batch_invariant,
            )
        return torch_function(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Show what differs from torch's module."""
        shown = {
            "dtype": self.dtype,
            "backend": self.backend,
            "grad_in_forward": self.grad_in_forward,
            "inplace_backward": self.inplace_backward,
            "batch_invariant": self.batch_invariant,
        }
        usual = ("auto", False, None)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value not in usual)


class LinearCrossEntropyLoss(_WeightedLoss):
    """A linear layer, which the module owns, and its cross-entropy, computed by :func:`linear_cross_entropy`.

    The arguments, parameters and state of torch's module of that name, on every torch; `chunk_rows` takes the place of
    its `options`. See :func:`linear_cross_entropy` for the formula, shapes and errors.

    Args:
        in_features: Features D of a row.
        num_classes: Classes C.
        out_features: Further dimensions (d1, ..., dk) of the logits.
        bias: Whether the layer has one.
        device: Of the layer's parameters.
        dtype: Of the layer's parameters.
        reduction: "mean", "sum" or "none".
        weight: Weight of each class (C,).
        ignore_index: Class index whose rows have no loss and no gradient; None is -100.
        label_smoothing: Share of the target spread evenly over the classes, from 0 to 1.
        logit_scale: What the logits are multiplied by.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        loss_dtype: Type of the loss; None for torch's. A scripted module has torch's.
        chunk_rows: Rows of input whose logits exist at a time, at most.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.
        batch_invariant: Give a row of logits the same bits of loss and gradient in every batch.

    Raises:
        RuntimeError: If `weight` is not of shape (C,), or label_smoothing not from 0 to 1.

    Example:
        >>> import torch
        >>> criterion = LinearCrossEntropyLoss(5, 10, out_features=(4, 3), bias=True)
        >>> criterion(torch.randn(2, 5), torch.randint(10, (2, 4, 3))).shape
        torch.Size([])
        >>> [(name, tuple(value.shape)) for name, value in criterion.state_dict().items()]
        [('linear.weight', (120, 5)), ('linear.bias', (120,))]
    """

    __constants__ = [  # noqa: RUF012
        "ignore_index", "label_smoothing", "logit_scale", "num_classes", "out_features", "reduction", "softcap",
    ]  # fmt: skip

    out_features: tuple[int, ...] = ()
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: Optional[float] = None  # noqa: UP045 - torch.jit.script reads it
    loss_dtype: Optional[torch.dtype] = None  # noqa: UP045
    chunk_rows: int | None = None
    backend: str = "auto"
    batch_invariant: bool = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        loss_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        backend: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise _errors.module_weight(num_classes, weight)
        if not 0 <= label_smoothing <= 1:
            raise _errors.module_smoothing(label_smoothing)
        super().__init__(weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.logit_scale, self.softcap, self.loss_dtype = logit_scale, softcap, loss_dtype
        self.chunk_rows, self.backend, self.batch_invariant = chunk_rows, backend, batch_invariant
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of the layer's logits of `input` against `target`."""
        if not is_scripting():
            return self._loss(input, target)
        sizes = [self.num_classes]
        for size in self.out_features:
            sizes.append(size)  # noqa: PERF402 - TorchScript makes no list of a tuple
        logits = self.linear(input).unflatten(-1, sizes) * self.logit_scale
        cap = self.softcap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return torch_function(
            logits,
            target,
            weight=self.weight,
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _loss(self, input: Tensor, target: Tensor) -> Tensor:
        sizes = (self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*sizes, self.linear.in_features),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.view(sizes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            dtype=self.loss_dtype,
            chunk_rows=self.chunk_rows,
            backend=self.backend,
            batch_invariant=self.batch_invariant,
        )


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
        if not is_scripting():
            return softmax(input, self.dim)
        return F.softmax(input, self.dim)


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
        if not is_scripting():
            return log_softmax(input, self.dim)
        return F.log_softmax(input, self.dim)
