"""The losses that a run can train with: mean over the batch, from logits (N, C) and class indices (N,)."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def scratch_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Return cross-entropy as the textbook writes it: softmax, then minus the log of the true class's probability.

    .. math::
        p = \frac{\exp(z - \max z)}{\sum \exp(z - \max z)}, \qquad \ell = -\log p_t

    Subtracting the maximum keeps exp from overflowing. It does not keep p from underflowing: where the true class is
    some 104 below the maximum, p is 0 in float32 and the loss is infinite. The fused losses take the log of the sum
    instead and have no such limit; that difference, and the five passes over the logits, are what this one is for.

    Args:
        logits: Shape (N, C).
        target: Class indices, shape (N,).

    Returns:
        The mean loss, a scalar.
    """
    exp = (logits - logits.detach().amax(dim=1, keepdim=True)).exp()
    probabilities = exp / exp.sum(dim=1, keepdim=True)
    return -probabilities.gather(1, target.unsqueeze(1)).log().mean()


def _fused() -> Loss:
    from softmax_fused import CrossEntropyLoss

    return cast("Loss", CrossEntropyLoss())


LOSSES: dict[str, Callable[[], Loss]] = {
    "fused": _fused,
    "torch": nn.CrossEntropyLoss,
    "scratch": lambda: scratch_cross_entropy,
}
