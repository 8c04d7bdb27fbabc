"""Torch's own operator for what the fused path does not cover, with our messages where it refuses the arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn import _reduction as _Reduction

from softmax_fused import _errors

if TYPE_CHECKING:
    from torch import Tensor

torch_function = F.cross_entropy
"""Torch's own function, also while `patch` has its name lead to ours."""

REDUCTION_CODES = {"none": 0, "mean": 1, "sum": 2}
"""The reductions as the operator takes them. Torch's `get_enum` also knows a deprecated name, but is a call more."""


def torch_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """Let torch compute the loss, or refuse it with its own type of error and a clearer message.

    Calls the ATen operator directly: the checks of F.cross_entropy have already been made.
    """
    code = REDUCTION_CODES.get(reduction) if type(reduction) is str else None
    try:
        loss: Tensor = torch._C._nn.cross_entropy_loss(
            input,
            target,
            weight,
            _Reduction.get_enum(reduction) if code is None else code,  # type: ignore[arg-type]  # torch's stub says str
            ignore_index,
            label_smoothing,
        )
        return loss
    except _errors.REFUSALS as error:
        explained = _errors.explain(error, input, target, weight, ignore_index, reduction, label_smoothing)
        if explained is error:
            raise
        raise explained from error


def validate(
    input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any, values: bool
) -> None:
    """Raise what torch raises for a loss's arguments, without computing the loss where nothing looks wrong.

    Whether a suspect is refused, and by which type of error, is torch's to say: then its operator is called. `values`
    says whether class indices may be looked at.

    Raises:
        Exception: Torch's, with our message.
    """
    arguments = (input, target, weight, ignore_index, reduction, label_smoothing)
    try:
        suspect = _errors.explain_call(*arguments, values) is not None or any(
            it is not None and it.device != input.device for it in (target, weight)
        )
    except Exception:  # tensor subclasses, nested tensors and transforms may raise at any question asked of them
        suspect = True
    if suspect:
        torch_cross_entropy(*arguments)
