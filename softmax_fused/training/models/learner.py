"""A model together with what trains it: loss, optimiser, device, precision, and the ranks that average gradients."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softmax_fused.training.errors import LabError
from softmax_fused.training.models.architectures import Model, split_head
from softmax_fused.training.models.losses import FusedLoss, Loss, LossEntry, class_logits
from softmax_fused.training.models.scratch import ScratchSGD
from softmax_fused.training.ranks.group import Ranks

Optimizer = torch.optim.Optimizer | ScratchSGD

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "scratch-sgd": ScratchSGD,
}


@dataclass(frozen=True)
class Learner:
    """A model with its loss and its optimiser.

    Attributes:
        model: The model, on `device`.
        loss: The mean loss of a batch.
        optimizer: Of the model's parameters.
        device: Where everything is computed.
        scaler: Scales the loss under float16, and does nothing otherwise.
        amp_dtype: The type of mixed precision, None for full precision.
        forward: Computes the logits, or with `head` the input of the last layer; compiled if the run asks for that.
        logit_scale: A factor of the logits.
        advice: What to do about a loss that is not finite.
        head: The last layer, where the loss computes that too.
        ddp: Computes loss and predictions where several ranks train, and averages their gradients.
    """

    model: Model
    loss: Loss
    optimizer: Optimizer
    device: torch.device
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype | None
    forward: Callable[[Tensor], Tensor]
    logit_scale: float = 1.0
    advice: str = LossEntry.advice
    head: nn.Linear | None = None
    ddp: DistributedDataParallel | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context of mixed precision, if the run asks for it."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def logits(self, images: Tensor) -> Tensor:
        """Return outputs (N, C) or (N,) in float32: autocast computes torch's loss so, and all losses get the same."""
        with self.autocast():
            outputs = self.forward(images)
            outputs = (self.head(outputs) if self.head else outputs).float()
        return outputs if self.logit_scale == 1 else outputs * self.logit_scale

    def loss_and_predictions(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and each row's predicted class, None for a regression."""
        if self.ddp is not None:
            result: tuple[Tensor, Tensor | None] = self.ddp(images, target)
            return result
        if isinstance(self.loss, FusedLoss):
            return self.loss.with_predictions(self.logits(images), target)
        outputs, loss = self.outputs_and_loss(images, target)
        regression = target.is_floating_point() and target.dim() == 1
        return loss, None if regression else class_logits(outputs).argmax(dim=1)

    def outputs_and_loss(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, detached, and the loss, to differentiate."""
        if self.head is None:
            outputs = self.logits(images)
            return outputs.detach(), self.loss(outputs, target)
        with self.autocast():
            features = self.forward(images)
            weight, bias = self.head.weight * self.logit_scale, self.head.bias * self.logit_scale
            loss = self.loss(features, weight, target, linear_bias=bias)
            return F.linear(features.detach(), weight.detach(), bias.detach()).float(), loss

    def update(self, loss: Tensor) -> None:
        """Backpropagate and take a step of the optimiser."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]  # without float16 it only calls the optimiser's step
        self.scaler.update()

    def for_evaluation(self) -> "Learner":
        """Return this learner on one rank and without torch.compile, which would compile again for no_grad."""
        body = self.model if self.head is None else split_head(self.model)[0]
        return replace(self, forward=body, ddp=None)

    def on_ranks(self, ranks: Ranks) -> "Learner":
        """Return this learner with its gradients averaged over ranks; for a single process, as it is."""
        if ranks.size == 1:
            return self
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return replace(self, ddp=DistributedDataParallel(ModelAndLoss(self), device_ids=device_ids))


class ModelAndLoss(nn.Module):
    """The model and the loss of a learner in one module.

    DistributedDataParallel averages the gradients of parameters that are used inside its module. A loss that includes
    the last layer uses parameters too.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.model, self.compute = learner.model, learner.loss_and_predictions

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `Learner.loss_and_predictions` does."""
        return self.compute(images, target)


def build_learner(
    model: Model,
    loss: Loss,
    *,
    optimizer: str = "sgd",
    lr: float = 0.1,
    device: torch.device,
    amp: bool = False,
    compile: bool = False,
    input_shape: tuple[int, ...] = (28, 28),
    logit_scale: float = 1.0,
    advice: str = LossEntry.advice,
    includes_last_layer: bool = False,
) -> Learner:
    """Move a model to the device and combine it with its loss and an optimiser.

    Args:
        model: The model.
        loss: The mean loss of a batch.
        optimizer: One of `OPTIMIZERS`.
        lr: The learning rate.
        device: Where to train.
        amp: Whether to train in mixed precision: bfloat16, or float16 with a gradient scaler on GPUs without it.
        compile: Whether to compile the model; it is compiled here, so that no epoch's time includes that.
        input_shape: Of one example, for `compile`.
        logit_scale: A factor of the logits.
        advice: What to do about a loss that is not finite.
        includes_last_layer: Whether `loss` computes the model's last layer too.

    Raises:
        LabError: if torch.compile fails.
        UsageError: if the loss includes the last layer and that is not linear.
    """
    model = model.to(device)
    amp_dtype = _amp_dtype(device) if amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    body, head = split_head(model) if includes_last_layer else (model, None)
    forward = torch.compile(body, dynamic=True) if compile else body  # dynamic because the last batch is smaller
    steps = OPTIMIZERS[optimizer](model.parameters(), lr)
    learner = Learner(model, loss, steps, device, scaler, amp_dtype, forward, logit_scale, advice, head)
    if compile:
        _compile_now(learner, input_shape)
    return learner


def _amp_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float16 on GPUs without bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _compile_now(learner: Learner, input_shape: tuple[int, ...]) -> None:
    """Compile forward and backward on two blank inputs, so that a missing compiler is reported before training."""
    images = torch.zeros(2, *input_shape, device=learner.device)
    try:
        learner.logits(images).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise LabError(f"expected torch.compile to work here, got: {reason}; train without --compile") from error
    learner.optimizer.zero_grad()
