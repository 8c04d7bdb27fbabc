"""A learner under DistributedDataParallel."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softmax_fused.training.errors import UsageError
from softmax_fused.training.models.architectures import MODELS
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.ranks.group import Ranks


class LossModule(nn.Module):
    """A learner's model and loss in one: the loss may use parameters too, and only those used inside are averaged."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.model, self.compute = learner.model, learner.loss_and_predictions

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the learner does."""
        return self.compute(images, target)


def parallel_learner(learner: Learner, ranks: Ranks) -> Learner:
    """Return the learner whose gradients are averaged over ranks; alone, the same."""
    if ranks.size == 1:
        return learner
    where: Any = {"device_ids": [learner.device.index]} if learner.device.type == "cuda" else {}
    return replace(learner, parallel=DistributedDataParallel(LossModule(learner), **where))


def check_parallel(model: str, ranks: Ranks) -> None:
    """Raise `UsageError` if several ranks cannot train the model: DistributedDataParallel takes an nn.Module."""
    if ranks.size > 1 and MODELS[model].scratch:
        library = " or ".join(
            n for n, entry in MODELS.items() if not entry.scratch and entry.task is MODELS[model].task
        )
        raise UsageError(f"expected --model {library} with several ranks, got {model}; start it without torchrun")
