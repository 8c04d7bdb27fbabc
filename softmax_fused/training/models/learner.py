"""A model with what it takes to train it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softmax_fused.training.errors import LabError
from softmax_fused.training.models.architectures import MODELS, Model, build_model, split_head
from softmax_fused.training.models.losses import LOSSES, Fused, Loss, LossEntry, build_loss, class_scores
from softmax_fused.training.models.scratch import ScratchSGD

if TYPE_CHECKING:
    from softmax_fused.training.config import TrainConfig

Optimizer = torch.optim.Optimizer | ScratchSGD

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor], float], Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "scratch-sgd": ScratchSGD,
}


@dataclass(frozen=True)
class Learner:
    """A model, its loss and its optimiser; `forward` is the model, compiled or not, `scale` a factor of its logits.

    `head` is the last layer where the loss computes that too; then `forward` is the model before it. `advice` is what
    to do about a loss that is not finite. `parallel` computes the loss where other ranks do so too.
    """

    model: Model
    loss: Loss
    optimizer: Optimizer
    device: torch.device
    scaler: torch.amp.GradScaler
    half: torch.dtype | None
    forward: Callable[[Tensor], Tensor]
    scale: float = 1.0
    advice: str = LossEntry.advice
    head: nn.Linear | None = None
    parallel: DistributedDataParallel | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context of mixed precision, if the run asks for it."""
        if self.half is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)

    def logits(self, images: Tensor) -> Tensor:
        """Return outputs (N, C) or (N,) in float32, in which autocast computes torch's loss; so all losses get it."""
        with self.autocast():
            outputs = self.forward(images)
            outputs = (self.head(outputs) if self.head else outputs).float()
        return outputs if self.scale == 1 else outputs * self.scale

    def loss_and_predictions(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss and each row's predicted class, None for a regression."""
        if self.parallel is not None:
            result: tuple[Tensor, Tensor | None] = self.parallel(images, target)
            return result
        if isinstance(self.loss, Fused):
            return self.loss.with_predictions(self.logits(images), target)
        outputs, loss = self.outputs_and_loss(images, target)
        regression = target.is_floating_point() and target.dim() == 1
        return loss, None if regression else class_scores(outputs).argmax(dim=1)

    def outputs_and_loss(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs, to be looked at, and the loss, to be differentiated."""
        if self.head is None:
            outputs = self.logits(images)
            return outputs.detach(), self.loss(outputs, target)
        with self.autocast():
            features = self.forward(images)
            weight, bias = self.head.weight * self.scale, self.head.bias * self.scale
            loss = self.loss(features, weight, target, linear_bias=bias)
            return F.linear(features.detach(), weight.detach(), bias.detach()).float(), loss

    def uncompiled(self) -> "Learner":
        """Return this learner for evaluation: torch.compile would compile anew where no gradients are wanted."""
        body = self.model if self.head is None else split_head(self.model)[0]
        return replace(self, forward=body, parallel=None)

    def update(self, loss: Tensor) -> None:
        """Backpropagate and change the weights."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)  # type: ignore[arg-type]  # without mixed precision it does nothing but step
        self.scaler.update()


def build_learner(
    model: Model,
    loss: Loss,
    *,
    optimizer: str = "sgd",
    lr: float = 0.1,
    device: torch.device,
    amp: bool = False,
    compile: bool = False,
    inputs: tuple[int, ...] = (28, 28),
    scale: float = 1.0,
    advice: str = LossEntry.advice,
    layer: bool = False,
) -> Learner:
    """Put the model on the device; float16, where bfloat16 is not supported, gets a gradient scaler.

    `layer` says that the loss is one of a layer, the model's last.
    """
    model = model.to(device)
    half = _half_type(device) if amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    body, head = split_head(model) if layer else (model, None)
    forward = torch.compile(body, dynamic=True) if compile else body  # the last batch is smaller
    steps = OPTIMIZERS[optimizer](model.parameters(), lr)
    learner = Learner(model, loss, steps, device, scaler, half, forward, scale, advice, head)
    if compile:
        _compile_now(learner, inputs)
    return learner


def learner_for(config: "TrainConfig", classes: int, device: torch.device) -> Learner:
    """Return the learner that a run's settings describe, with its initial weights."""
    return build_learner(
        build_model(config.model, classes, config.seed, config.activation),
        build_loss(config.loss, config.label_smoothing),
        optimizer=config.optimizer,
        lr=config.lr,
        device=device,
        amp=config.amp,
        compile=config.compile,
        inputs=MODELS[config.model].inputs,
        scale=config.logit_scale,
        advice=LOSSES[config.loss].advice,
        layer=LOSSES[config.loss].layer,
    )


def _half_type(device: torch.device) -> torch.dtype:
    """Return bfloat16, except on GPUs without it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _compile_now(learner: Learner, inputs: tuple[int, ...]) -> None:
    """Compile on two blank inputs, so that a missing compiler is reported here and epochs are timed without it."""
    images = torch.zeros(2, *inputs, device=learner.device)
    try:
        learner.logits(images).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise LabError(f"expected torch.compile to work here, got: {reason}; train without --compile") from error
    learner.optimizer.zero_grad()
