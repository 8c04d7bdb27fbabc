"""The losses that a run can train with: each the mean over a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmax_fused import cross_entropy, cross_entropy_rows, linear_cross_entropy
from softmax_fused.training.data.datasets import Task

# Maps (outputs, target) to a scalar, or (features, weight, target, linear_bias=...) where it computes the last layer.
Loss = Callable[..., Tensor]

NATS = "mean cross-entropy (nats)"
HALF_SQUARED_ERROR = "half the mean squared error"


def class_logits(outputs: Tensor) -> Tensor:
    """Return outputs (N, C) as they are; for one output per example, (N,), logits (N, 2) whose first column is 0."""
    return outputs if outputs.dim() == 2 else torch.stack([torch.zeros_like(outputs), outputs], dim=1)


def scratch_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Return cross-entropy as the textbook writes it: softmax, then minus the log of the target class's probability.

    .. math::
        p = \frac{\exp(z - \max z)}{\sum \exp(z - \max z)}, \qquad \ell = -\log p_t

    Subtracting the maximum keeps exp from overflowing, but not p from underflowing: where the target class's logit is
    about 104 below the maximum, p is 0 in float32 and the loss is infinite. This loss exists to show that, and the cost
    of its five passes over the logits. The fused loss uses the logarithm of the sum and has no such limit.

    Args:
        logits: Shape (N, C).
        target: Class indices, shape (N,).

    Returns:
        The mean loss, a scalar.
    """
    return naive_cross_entropy(logits - logits.detach().amax(dim=1, keepdim=True), target)


def naive_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    r"""Return cross-entropy by its definition, with :math:`p = \exp z / \sum \exp z`; NaN from logits of 89 on.

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
    """Return the mean over rows and classes of (softmax(z) - t)^2, with t one-hot.

    Its gradient has a factor p (1 - p), so that a confident wrong prediction hardly changes.
    """
    return F.mse_loss(logits.softmax(dim=1), F.one_hot(target, logits.shape[1]).to(logits.dtype))


def softmax_twice(logits: Tensor, target: Tensor) -> Tensor:
    """Return ``nn.CrossEntropyLoss``, which expects logits, of probabilities: a common mistake.

    The second softmax gets numbers from 0 to 1. Its largest probability is e / (e + C - 1), 0.23 for 10 classes, and
    the loss stays above 1.46.
    """
    return F.cross_entropy(logits.softmax(dim=1), target)


def scratch_squared(values: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (y - t)^2 / 2, whose gradient is y - t."""
    return ((values - target) ** 2 / 2).mean()


def squared(values: Tensor, target: Tensor) -> Tensor:
    """Return half of torch's mean squared error."""
    return F.mse_loss(values, target) / 2


def logistic(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of log(1 + exp z) - t z; for z = <w, x> its gradient with respect to w is x (sigmoid(z) - t)."""
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def logistic_squared(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (s - t)^2 / 2 with s = sigmoid(z); for z = <w, x> its gradient is x (s - t) s (1 - s)."""
    return squared(torch.sigmoid(logits), target.to(logits.dtype))


class FusedLoss:
    """The fused loss, which can also return the predicted classes: on a GPU from the same pass over the logits."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss."""
        return cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    def with_predictions(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss, and for each row the class of the largest logit.

        On the CPU a mean computes its gradient along with the loss, which saves more than a second look at few classes.
        """
        if logits.is_cpu:
            return self(logits, target), logits.detach().argmax(dim=1)
        rows = cross_entropy_rows(logits, target, label_smoothing=self.label_smoothing, outputs=("loss", "prediction"))
        return rows.loss.mean(), rows.prediction


def fused_linear(label_smoothing: float = 0.0) -> Loss:
    """Return the fused loss of features, and of the weight and bias of the model's last layer."""
    return partial(linear_cross_entropy, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class LossEntry:
    """A loss that a run can choose.

    Attributes:
        build: Returns the loss; takes `label_smoothing` where `accepts_probabilities`.
        task: The kind of target.
        unit: Of the loss, for the axes of figures.
        accepts_probabilities: Whether targets may be class probabilities (N, C), and be smoothed.
        includes_last_layer: Whether it takes the input, weight and bias of the last layer instead of its outputs.
        advice: What to do about a loss that is not finite.
    """

    build: Callable[..., Loss]
    task: Task = Task.CLASSES
    unit: str = NATS
    accepts_probabilities: bool = False
    includes_last_layer: bool = False
    advice: str = "choose a smaller --lr"


OVERFLOW = "exp overflows in float32 from logits of 89 on; choose --loss fused, which subtracts the maximum"
UNDERFLOW = "choose a smaller --lr, or --loss fused, which takes no logarithm of a probability that has become 0"

LOSSES: dict[str, LossEntry] = {
    "fused": LossEntry(FusedLoss, accepts_probabilities=True),
    "torch": LossEntry(nn.CrossEntropyLoss, accepts_probabilities=True),
    "scratch": LossEntry(lambda: scratch_cross_entropy, advice=UNDERFLOW),
    "scratch-naive": LossEntry(lambda: naive_cross_entropy, advice=OVERFLOW),
    "fused-linear": LossEntry(fused_linear, accepts_probabilities=True, includes_last_layer=True),
    "mse": LossEntry(lambda: softmax_mse, unit="mean squared error of probabilities"),
    "softmax-twice": LossEntry(lambda: softmax_twice, unit="mean cross-entropy of a second softmax (nats)"),
    "logistic": LossEntry(lambda: logistic, Task.BINARY),
    "logistic-squared": LossEntry(lambda: logistic_squared, Task.BINARY, HALF_SQUARED_ERROR),
    "squared": LossEntry(lambda: squared, Task.REGRESSION, HALF_SQUARED_ERROR),
    "scratch-squared": LossEntry(lambda: scratch_squared, Task.REGRESSION, HALF_SQUARED_ERROR),
}


def build_loss(name: str, label_smoothing: float = 0.0) -> Loss:
    """Return the loss called `name`, one of `LOSSES`; smoothing needs one that accepts probabilities."""
    return LOSSES[name].build(**{"label_smoothing": label_smoothing} if label_smoothing else {})
