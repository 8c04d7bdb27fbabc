"""Training with the Triton kernels against training with the torch path."""

import pytest
import torch

from softmax_fused import CrossEntropyLoss
from softmax_fused.training.data.batches import make_batches
from softmax_fused.training.data.datasets import data_root, load_dataset
from softmax_fused.training.models.architectures import build_model
from softmax_fused.training.models.learner import build_learner
from softmax_fused.training.models.loop import train_epoch
from tests.conftest import Place
from tests.lab import digits, real_data


def loss_curve(place: Place, backend: str, data: object) -> torch.Tensor:
    device = torch.device(place.device)
    criterion = CrossEntropyLoss(backend=backend)
    curve = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        curve.append(criterion(logits, target))
        return curve[-1]

    learner = build_learner(build_model("softmax", 10), loss, device=device)
    train_epoch(learner, make_batches(data.train, 256, 0, device).epoch(1))
    return torch.stack(curve).detach().cpu()


@pytest.mark.parametrize("name", ["digits", pytest.param("fashion-mnist", marks=real_data)])
def test_an_epoch_with_the_kernels_is_the_epoch_without(kernels: Place, name: str) -> None:
    data = digits() if name == "digits" else load_dataset(name, data_root()).head(2000, 500)
    ours = loss_curve(kernels, "triton", data)
    theirs = loss_curve(kernels, "torch", data)
    assert len(ours) == -(-len(data.train) // 256)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours[0] > ours[-1]
