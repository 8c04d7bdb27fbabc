"""The losses that a run can train with: each the mean over a batch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmax_fused.training.tasks import Task

Loss = Callable[..., Tensor]  # of outputs and target, or of features, weight, target and linear_bias

LARGE = 1e5  # a mean loss from here on says no more than that training has gone wrong
NATS = "mean cross-entropy (nats)"


def as_decimal(value: float, digits: int) -> str:
    """Return a loss or a weight with so many decimals, or in exponent form where they would say nothing."""
    return f"{value:.{digits}f}" if abs(value) < LARGE else f"{value:.2e}"


def class_scores(outputs: Tensor) -> Tensor:
    """Return logits (N, C); for logits (N,) of the second of two classes (N, 2), the first being 0."""
    return outputs if outputs.dim() == 2 else torch.stack([torch.zeros_like(outputs), outputs], dim=1)


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
    return naive_cross_entropy(logits - logits.detach().amax(dim=1, keepdim=True), target)


def naive_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Return cross-entropy by the definition alone, :math:`p = \exp z / \sum \exp z`: NaN from logits of 89 on.

    Args:
        logits: Shape (N, C).
        target: Class indices, shape (N,).

    Returns:
        The mean loss, a scalar.
    """
    exp = logits.exp()
    probabilities = exp / exp.sum(dim=1, keepdim=True)
    return -probabilities.gather(1, target.unsqueeze(1)).log().mean()


def softmax_mse(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows and classes of (softmax(z) - t)^2, t being one-hot.

    Its gradient has a factor p (1 - p), so that a row that is wrong and sure of it hardly learns.
    """
    return F.mse_loss(logits.softmax(dim=1), F.one_hot(target, logits.shape[1]).to(logits.dtype))


def softmax_twice(logits: Tensor, target: Tensor) -> Tensor:
    """Return the trap: ``nn.CrossEntropyLoss``, which takes logits, given probabilities.

    The second softmax sees numbers from 0 to 1, so its largest probability is e / (e + C - 1): 0.23 for 10 classes,
    and the loss stays above 1.46.
    """
    return F.cross_entropy(logits.softmax(dim=1), target)


def scratch_squared(values: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (y - t)^2 / 2, whose gradient is y - t."""
    return ((values - target) ** 2 / 2).mean()


def squared(values: Tensor, target: Tensor) -> Tensor:
    """Return half of torch's mean squared error."""
    return F.mse_loss(values, target) / 2


def logistic(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of log(1 + exp z) - t z; its gradient by the weights of z = <w, x> is x (sigmoid(z) - t)."""
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def logistic_squared(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (s - t)^2 / 2, s = sigmoid(z); its gradient by the weights is x (s - t) s (1 - s)."""
    return squared(torch.sigmoid(logits), target.to(logits.dtype))


class Fused:
    """The fused loss, which can find the predicted classes in the same pass over the logits."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss."""
        from softmax_fused import cross_entropy

        return cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    def with_predictions(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss, and each row's class of the largest logit."""
        from softmax_fused import cross_entropy_rows

        rows = cross_entropy_rows(logits, target, label_smoothing=self.label_smoothing, outputs=("loss", "prediction"))
        return rows.loss.mean(), rows.prediction


def _fused_linear(label_smoothing: float = 0.0) -> Loss:
    from softmax_fused import linear_cross_entropy

    return functools.partial(linear_cross_entropy, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class LossEntry:
    """A loss: `soft` ones take probabilities (N, C) too, and label smoothing; `advice` is for a loss gone wrong.

    Where it is of a `layer`, it takes the last layer's input, weight and bias in place of its outputs.
    """

    build: Callable[..., Loss]
    task: Task = Task.CLASSES
    unit: str = NATS
    soft: bool = False
    layer: bool = False
    advice: str = "choose a smaller --lr"


def _always(loss: Loss) -> Callable[[], Loss]:
    return lambda: loss


NAIVE = "exp overflows in float32 from logits of 89 on; choose --loss fused, which subtracts the maximum"
UNDERFLOW = "choose a smaller --lr, or --loss fused, which takes no logarithm of a probability that has become 0"

LOSSES: dict[str, LossEntry] = {
    "fused": LossEntry(Fused, soft=True),
    "torch": LossEntry(nn.CrossEntropyLoss, soft=True),
    "scratch": LossEntry(_always(scratch_cross_entropy), advice=UNDERFLOW),
    "scratch-naive": LossEntry(_always(naive_cross_entropy), advice=NAIVE),
    "fused-linear": LossEntry(_fused_linear, soft=True, layer=True),
    "mse": LossEntry(_always(softmax_mse), unit="mean squared error of probabilities"),
    "softmax-twice": LossEntry(_always(softmax_twice), unit="mean cross-entropy of a second softmax (nats)"),
    "logistic": LossEntry(_always(logistic), Task.BINARY),
    "logistic-squared": LossEntry(_always(logistic_squared), Task.BINARY, "half the mean squared error"),
    "squared": LossEntry(_always(squared), Task.REGRESSION, "half the mean squared error"),
    "scratch-squared": LossEntry(_always(scratch_squared), Task.REGRESSION, "half the mean squared error"),
}


def build_loss(name: str, label_smoothing: float = 0.0) -> Loss:
    """Return the loss called `name`; only soft ones may be smoothed."""
    return LOSSES[name].build(**{"label_smoothing": label_smoothing} if label_smoothing else {})
