"""The training loop: one step, one epoch, one evaluation. Nothing here reads a value back before an epoch ends."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softmax_fused.training.batches import Batch
from softmax_fused.training.data import Split, to_input
from softmax_fused.training.errors import LabError
from softmax_fused.training.losses import Loss

EVALUATION_BATCH = 2000  # rows whose float32 pixels, 6 MB, stay in a core's cache

Optimizer = torch.optim.Optimizer

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}


@dataclass(frozen=True)
class Learner:
    """A model with what it takes to train it; `forward` is the model, compiled or not."""

    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    device: torch.device
    scaler: torch.amp.GradScaler
    half: torch.dtype | None
    forward: Callable[[Tensor], Tensor]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision if the run asks for it."""
        if self.half is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)

    def logits(self, images: Tensor) -> Tensor:
        """Scores of shape (N, C), in float32: that is where autocast computes torch's loss, so all losses get it."""
        with self.autocast():
            return self.forward(images).float()

    def update(self, loss: Tensor) -> None:
        """Backpropagates and changes the weights."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()


def build_learner(
    model: nn.Module,
    loss: Loss,
    *,
    optimizer: str = "sgd",
    lr: float = 0.1,
    device: torch.device,
    amp: bool = False,
    compile: bool = False,
) -> Learner:
    """Puts the model on the device; float16, where bfloat16 is not supported, gets a gradient scaler."""
    model = model.to(device)
    half = _half_type(device) if amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    forward = torch.compile(model, dynamic=True) if compile else model  # the last batch is smaller
    learner = Learner(model, loss, OPTIMIZERS[optimizer](model.parameters(), lr), device, scaler, half, forward)
    if compile:
        _compile_now(learner)
    return learner


def train_epoch(learner: Learner, batches: Iterable[Batch]) -> tuple[float, float]:
    """Trains on every batch once.

    Returns:
        The mean loss over the epoch's images and the share of them classified correctly, each at its own step.

    Raises:
        LabError: if a loss is not finite.
    """
    learner.model.train()
    losses, correct, sizes = [], [], []
    for images, labels in batches:
        logits = learner.logits(images)
        loss = learner.loss(logits, labels)
        learner.update(loss)
        losses.append(loss.detach())
        correct.append((logits.detach().argmax(dim=1) == labels).sum())
        sizes.append(len(labels))
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = (torch.stack(losses).cpu().double() * weights).sum().item()
    if not torch.isfinite(torch.tensor(mean)):
        raise LabError(f"expected a finite training loss, got {mean}; choose a smaller --lr")
    return mean, int(torch.stack(correct).sum()) / sum(sizes)


@torch.no_grad()
def predict_logits(learner: Learner, split: Split) -> Iterator[Tensor]:
    """Scores for a whole split, in slices."""
    learner.model.eval()
    for images in torch.split(split.images, EVALUATION_BATCH):
        with learner.autocast():
            yield learner.model(to_input(images)).float()


def predict_classes(learner: Learner, split: Split) -> Tensor:
    """The class index of every image of a split on the learner's device."""
    return torch.cat([logits.argmax(dim=1) for logits in predict_logits(learner, split)])


def confusion_matrix(predicted: Tensor, split: Split, classes: int) -> Tensor:
    """Counts of shape (true class, predicted class)."""
    return torch.bincount(split.labels * classes + predicted, minlength=classes**2).view(classes, classes)


def _half_type(device: torch.device) -> torch.dtype:
    """bfloat16, except on GPUs without it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _compile_now(learner: Learner) -> None:
    """Compiles on one image, so that a missing compiler is reported here and epochs are timed without it."""
    images = torch.zeros(2, 28, 28, device=learner.device)
    try:
        learner.logits(images).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise LabError(f"expected torch.compile to work here, got: {reason}; train without --compile") from error
    learner.optimizer.zero_grad()
