"""Models, losses, the training loop and the evaluation."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softmax_fused.training.config import learner_for
from softmax_fused.training.data.batches import MemoryBatches
from softmax_fused.training.data.datasets import Task
from softmax_fused.training.errors import LabError
from softmax_fused.training.models import evaluation
from softmax_fused.training.models.architectures import MODELS, build_model
from softmax_fused.training.models.evaluation import confusion_matrix, evaluate, predict_classes
from softmax_fused.training.models.learner import build_learner
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.models.losses import build_loss, naive_cross_entropy, scratch_cross_entropy
from tests.lab import SMALL, few_digits

CPU = torch.device("cpu")


CLASSIFIERS = [name for name, entry in MODELS.items() if entry.task is Task.CLASSES]


@pytest.mark.parametrize("name", ["fused", "torch", "scratch", "scratch-naive"])
def test_every_loss_is_cross_entropy(name: str) -> None:
    logits = torch.randn(33, 10, dtype=torch.float64, requires_grad=True)
    target = torch.randint(10, (33,))
    (upstream,) = torch.randn(1, dtype=torch.float64)
    loss = build_loss(name)(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    probabilities = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
    torch.testing.assert_close(loss, -probabilities[range(33), target].log().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, upstream * (probabilities - F.one_hot(target, 10)) / 33)


def test_the_textbook_loss_survives_large_logits_but_not_large_differences() -> None:
    target = torch.tensor([0])
    assert math.isclose(scratch_cross_entropy(torch.tensor([[1e30, 1e30]]), target).item(), math.log(2), rel_tol=1e-6)
    assert scratch_cross_entropy(torch.tensor([[0.0, 200.0]]), target).item() == math.inf
    assert math.isnan(naive_cross_entropy(torch.tensor([[89.0, 89.0]]), target).item())


@pytest.mark.parametrize("name", ["softmax", "mlp"])
def test_models_begin_as_in_the_textbook(name: str) -> None:
    layers = [layer for layer in build_model(name, 10).modules() if isinstance(layer, nn.Linear)]
    sizes = {"softmax": [(10, 784)], "mlp": [(256, 784), (10, 256)]}
    assert [tuple(layer.weight.shape) for layer in layers] == sizes[name]
    for layer in layers:
        assert 0.009 < layer.weight.std() < 0.011
        assert not layer.bias.any()
    again, other = build_model(name, 10), build_model(name, 10, seed=1)
    assert torch.equal(next(again.parameters()), layers[0].weight)
    assert not torch.equal(next(other.parameters()), layers[0].weight)


def test_an_epoch_reports_means_over_images_not_over_batches() -> None:
    split = few_digits().train
    learner = build_learner(build_model("softmax", 10), nn.CrossEntropyLoss(), lr=1e-12, device=CPU)
    loss, accuracy = train_epoch(learner, MemoryBatches(split, 299, 0, CPU).epoch(1))
    with torch.no_grad():
        logits = learner.model(split.images / 255)
    assert math.isclose(loss, F.cross_entropy(logits, split.labels).item(), rel_tol=1e-6)
    assert accuracy == (logits.argmax(1) == split.labels).sum().item() / 300


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"loss": "torch"}, {}),
        ({"loss": "scratch", "logit_scale": 3.0}, {}),
        ({"loss": "fused", "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ({"loss": "fused-linear", "label_smoothing": 0.2, "logit_scale": 3.0}, {"label_smoothing": 0.2}),
        ({"loss": "fused", "mixup": 0.5, "one_hot": True}, {}),
    ],
    ids=["torch", "scaled", "smoothed", "layer", "mixed"],
)
def test_the_test_loss_is_the_mean_over_all_images(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], arguments: dict[str, float]
) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 70)  # the last batch has 30 images
    data, learner = few_digits(), learner_for(replace(SMALL, **settings), 10, CPU)
    with torch.no_grad():
        learner.model[-1].weight.normal_(std=0.1)  # so that batches have different mean losses
        logits = learner.model(data.test.images / 255)
    scores, last = evaluate(learner, data)
    expected = F.cross_entropy(learner.logit_scale * logits.double(), data.test.labels, **arguments)
    assert scores["test_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert scores["test_accuracy"] == (logits.argmax(1) == data.test.labels).sum().item() / 100
    assert torch.tensor(last["confusion_matrix"]).sum() == 100


def test_a_test_loss_that_is_not_finite_stops_the_run() -> None:
    learner = learner_for(replace(SMALL, loss="scratch"), 10, CPU)
    with torch.no_grad():
        learner.model[-1].bias[0] = 200.0  # the probabilities of all other classes underflow to 0
    with pytest.raises(
        LabError, match=r"^expected a finite test loss, got inf; choose a smaller --lr, or --loss fused"
    ):
        evaluate(learner, few_digits())


def test_evaluation_does_not_run_the_compiled_model() -> None:
    def compiled(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("torch.compile would compile again, for a mode without gradients")

    learner = replace(learner_for(SMALL, 10, CPU), forward=compiled)
    assert evaluate(learner, few_digits())[0]["test_loss"] > 0


def test_the_confusion_matrix_counts_true_rows_and_predicted_columns() -> None:
    split = few_digits().test
    predicted = (split.labels + 1) % 10
    counts = confusion_matrix(predicted, split, 10)
    assert counts.sum() == 100
    assert counts[3, 4] == (split.labels == 3).sum()
    assert not counts.diagonal().any()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", CLASSIFIERS)
def test_training_learns(model: str, optimizer: str) -> None:
    data = few_digits()
    learner = build_learner(
        build_model(model, 10),
        nn.CrossEntropyLoss(),
        optimizer=optimizer,
        lr=0.1 if optimizer == "sgd" else 1e-2,
        device=CPU,
    )
    batches = MemoryBatches(data.train, 16, 0, CPU)
    losses = [train_epoch(learner, batches.epoch(epoch))[0] for epoch in range(1, 16)]
    assert losses[-1] < 0.5 < losses[0]
    assert (predict_classes(learner, data.test) == data.test.labels).sum() > 80


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    learner = build_learner(build_model("softmax", 10), scratch_cross_entropy, lr=1e6, device=CPU)
    with pytest.raises(LabError, match=r"^expected a finite training loss, got .*; choose a smaller --lr"):
        train_epoch(learner, MemoryBatches(few_digits().train, 16, 0, CPU).epoch(1))


@pytest.mark.parametrize("model", ["softmax", "scratch-softmax"])
def test_weights_that_are_not_finite_stop_the_run_though_its_losses_were(model: str) -> None:
    learner = build_learner(build_model(model, 10), lambda z, t: 1e3 * F.cross_entropy(z, t), lr=1e38, device=CPU)
    with pytest.raises(LabError, match=r"^expected finite weights after the epoch's last step, .* a smaller --lr$"):
        train_epoch(learner, MemoryBatches(few_digits().train, 300, 0, CPU).epoch(1))


def test_mixed_precision_stays_near_full_precision() -> None:
    losses = {}
    for amp in (False, True):
        learner = build_learner(build_model("mlp", 10), nn.CrossEntropyLoss(), device=CPU, amp=amp)
        assert learner.amp_dtype is (torch.bfloat16 if amp else None)
        losses[amp] = train_epoch(learner, MemoryBatches(few_digits().train, 16, 0, CPU).epoch(1))[0]
    assert losses[True] != losses[False]
    assert math.isclose(losses[True], losses[False], rel_tol=0.01)


def test_a_compiler_that_fails_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, **options: object) -> object:
        def forward(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nmany details")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(LabError, match=r"^expected torch.compile to work here, got: no C\+\+ compiler; train without"):
        build_learner(build_model("mlp", 10), nn.CrossEntropyLoss(), device=CPU, compile=True)
