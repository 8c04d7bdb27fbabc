"""The outputs that a row of logits can have, in one table: what each is, and its arithmetic in torch operations.

Legend: x the logits after scale and cap (N, C, d1..dk), log_p the logarithm of their softmax, prediction the class of
the largest logit (N, 1, d1..dk), g an upstream gradient (N, 1, d1..dk).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class RowOutputs(NamedTuple):
    """What :func:`cross_entropy_rows` returns, each of the input's shape without C; None where it was not asked for."""

    loss: Tensor
    logsumexp: Tensor
    prediction: Tensor
    entropy: Tensor
    log_prob: Tensor
    rank: Tensor


class Output(NamedTuple):
    """One output of a row."""

    dtype: torch.dtype | None = None  # None: that of the loss
    differentiable: bool = True
    needs_log_p: bool = True
    needs_prediction: bool = False
    needs_label: bool = False  # a class index a row
    if_ignored: int | None = None
    """What it is in rows whose class index is ignored, whose logits need not be known then; None: as in any row."""
    value: Callable[[Tensor, Any, Any, torch.dtype], Tensor] | None = None
    """From x, log_p, prediction and the result's type, (N, d1..dk); log_p and prediction are None where not needed."""
    coefficients: Callable[[Tensor, Any], tuple[Any, Any]] | None = None
    """The gradient by x is p (c + d log p): c and d, or 0, from g and the entropy, which are (N, 1, d1..dk)."""

    @property
    def zero_if_ignored(self) -> bool:
        """Whether it is 0 in rows whose class index is ignored."""
        return self.if_ignored == 0


def logsumexp(x: Tensor, log_p: Tensor, prediction: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x - log p at the largest logit; the logit itself where it is infinite, where the difference is NaN.

    Where the result is of float64 it is the exact difference, whatever the type of the arithmetic.
    """
    top, log_p_top = x.gather(1, prediction), log_p.gather(1, prediction)
    if dtype is torch.float64:
        top = top.double()
    return torch.where(top.isinf(), top, top - log_p_top).squeeze(1)


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


def log_prob_of(log_p: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return log p of the target classes (N, d1..dk), 0 for ignored rows, in operations that autograd follows.

    Above p = 1/2 it is log1p(-q) with q the sum of the other classes' p, which keeps its digits where p is near 1.
    """
    found = 0 - F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none")
    valid = target != ignore_index
    label = target.long().masked_fill(~valid, 0).unsqueeze(1)
    others = log_p.scatter(1, label, -torch.inf).exp().sum(1)
    confident = valid & (found > -math.log(2))
    return torch.where(confident, torch.log1p(-others.masked_fill(~confident, 0)), found)


def rank_of(y: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return how many of the logits y are larger than the target class's, (N, d1..dk); -1 for ignored rows.

    NaN is larger than every number, and everything is larger than NaN.
    """
    y = y.detach()
    at_target = 0 - F.nll_loss(y, target, ignore_index=ignore_index, reduction="none")
    rank = y.shape[1] - (y <= at_target.unsqueeze(1)).sum(1)
    return rank.masked_fill(target == ignore_index, -1)


OUTPUTS: dict[str, Output] = {
    "loss": Output(if_ignored=0),  # depends on the target, too: a backend computes it as the loss
    "logsumexp": Output(needs_prediction=True, value=logsumexp, coefficients=lambda g, _entropy: (g, 0)),
    "prediction": Output(
        dtype=torch.int64,
        differentiable=False,
        needs_log_p=False,
        needs_prediction=True,
        value=lambda _x, _log_p, prediction, _dtype: prediction.squeeze(1),
    ),
    "entropy": Output(
        value=lambda _x, log_p, _prediction, _dtype: entropy_of(log_p),
        coefficients=lambda g, entropy: (-g * entropy, -g),
    ),
    "log_prob": Output(needs_label=True, if_ignored=0),  # minus the loss without class weights and smoothing
    "rank": Output(dtype=torch.int64, differentiable=False, needs_log_p=False, needs_label=True, if_ignored=-1),
}
"""By name, in the order of RowOutputs' fields and of the kernels' arguments."""

DEFAULT = ("loss", "logsumexp", "prediction", "entropy")
"""Those computed where a caller names none: they exist for every kind of target."""

DIFFERENTIABLE = tuple(name for name, output in OUTPUTS.items() if output.differentiable)
"""The outputs that have an upstream gradient, in the order in which backends get those."""
