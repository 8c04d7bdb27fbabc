"""The outputs that a row of logits can have, in one table: what each is, and its arithmetic in torch operations.

Legend: x the logits after scale and cap (N, C, d1..dk), log_p the logarithm of their softmax, prediction the class of
the largest logit (N, 1, d1..dk), g an upstream gradient (N, 1, d1..dk).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class RowOutputs(NamedTuple):
    """What :func:`cross_entropy_rows` returns, each of the input's shape without C; None where it was not asked for."""

    loss: Tensor
    logsumexp: Tensor
    prediction: Tensor
    entropy: Tensor


class Output(NamedTuple):
    """One output of a row."""

    dtype: torch.dtype | None = None  # None: that of the loss
    differentiable: bool = True
    needs_log_p: bool = True
    needs_prediction: bool = False
    zero_if_ignored: bool = False
    """Whether it is 0 in rows whose class index is ignored, so that their logits need not be known for it."""
    value: Callable[[Tensor, Any, Any], Tensor] | None = None
    """From x, log_p and prediction, (N, d1..dk); the last two are None where no output needs them."""
    add_gradient: Callable[[Tensor | None, Tensor, Tensor], Tensor] | None = None
    """The gradient by x with this output's part, from what there is so far (None: nothing), log_p and g."""


def logsumexp(x: Tensor, log_p: Tensor, prediction: Tensor) -> Tensor:
    """Return x - log p at the largest logit; the logit itself where it is infinite, where the difference is NaN."""
    top = x.gather(1, prediction)
    return torch.where(top.isinf(), top, top - log_p.gather(1, prediction)).squeeze(1)


def add_logsumexp_gradient(grad: Tensor | None, log_p: Tensor, g: Tensor) -> Tensor:
    """Add p g."""
    return log_p.exp() * g if grad is None else grad + log_p.exp() * g


LEAST_LOG = -1e4
"""Below the logarithm of every positive number of every type."""


def finite_log(log_p: Tensor) -> Tensor:
    """Return log p, finite where p is 0, for a factor beside p: there p log p is 0, and so is its derivative.

    Masking the product instead would be right in value only: autograd multiplies the mask's 0 by -inf, which is NaN.
    """
    return log_p.clamp(min=LEAST_LOG)


def entropy_of(log_p: Tensor) -> Tensor:
    """Return H = -sum p log p, where 0 log 0 = 0."""
    return -(log_p.exp() * finite_log(log_p)).sum(1)


def add_entropy_gradient(grad: Tensor | None, log_p: Tensor, g: Tensor) -> Tensor:
    """Subtract p g (log p + H)."""
    p, finite = log_p.exp(), finite_log(log_p)
    entropy = -(p * finite).sum(1, keepdim=True)
    part = p * ((finite + entropy) * -g)
    return part if grad is None else grad + part


OUTPUTS: dict[str, Output] = {
    "loss": Output(zero_if_ignored=True),  # depends on the target, too: a backend computes it as the loss
    "logsumexp": Output(needs_prediction=True, value=logsumexp, add_gradient=add_logsumexp_gradient),
    "prediction": Output(
        dtype=torch.int64,
        differentiable=False,
        needs_log_p=False,
        needs_prediction=True,
        value=lambda _x, _log_p, prediction: prediction.squeeze(1),
    ),
    "entropy": Output(value=lambda _x, log_p, _prediction: entropy_of(log_p), add_gradient=add_entropy_gradient),
}
"""By name, in the order of RowOutputs' fields and of the kernels' arguments."""

DIFFERENTIABLE = tuple(name for name, output in OUTPUTS.items() if output.differentiable)
"""The outputs that have an upstream gradient, in the order in which backends get those."""
