"""Models from scratch against library models, and losses against their formulas."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from softmax_fused.training.config import TrainConfig, learner_for
from softmax_fused.training.data.batches import MemoryBatches
from softmax_fused.training.data.datasets import data_root, load_dataset, select_pair
from softmax_fused.training.errors import LabError
from softmax_fused.training.models.architectures import ACTIVATIONS, MODELS, build_model
from softmax_fused.training.models.evaluation import predict_classes
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.models.losses import build_loss
from softmax_fused.training.models.scratch import ScratchSGD
from softmax_fused.training.report.activations import slopes
from softmax_fused.training.runs.run import train
from tests.lab import QUIET, SMALL, few_digits, metrics_of, real_data, run_cli

CPU = torch.device("cpu")

PAIRS = [("softmax", None), *(("mlp", activation) for activation in ACTIVATIONS), ("linear", None)]


@pytest.mark.parametrize(("name", "activation"), PAIRS)
def test_a_model_from_scratch_is_the_library_model(name: str, activation: str | None) -> None:
    library, scratch = (build_model(each, 10, 3, activation) for each in (name, f"scratch-{name}"))
    assert not isinstance(scratch, nn.Module)
    inputs = torch.rand(7, *MODELS[name].input_shape)
    outputs = [model(inputs) for model in (library, scratch)]
    assert outputs[0].shape == ((7,) if name == "linear" else (7, 10))
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad(output, list(model.parameters()), upstream)
        for output, model in zip(outputs, (library, scratch), strict=True)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs.T if theirs.dim() == 2 else theirs)


def test_slopes_of_activations_are_their_derivatives() -> None:
    x = torch.tensor([-9.0, -1.5, 0.0, 0.5, 9.0], dtype=torch.float64)
    expected = {
        "relu": (x > 0).double(),
        "sigmoid": 1 / (2 + x.exp() + (-x).exp()),
        "tanh": 1 / x.cosh() ** 2,
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, slope in expected.items():
        torch.testing.assert_close(slopes(name, x), slope)
        assert not x.requires_grad


@pytest.mark.pictures
def test_activations_are_drawn_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "activations", "--output", tmp_path / "curves.png")
    headings, *rows, path = outcome.out.splitlines()
    assert (outcome.status, path) == (0, str(tmp_path / "curves.png"))
    assert headings.split() == ["slope", "at", "-8", "-2", "0", "2", "8", "largest"]
    assert dict(row.split(maxsplit=1) for row in rows)["sigmoid"].split() == [
        "0.000335",
        "0.105",
        "0.25",
        "0.105",
        "0.000335",
        "0.25",
    ]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > picture.size[1] > 400


def test_a_mean_divided_by_the_batch_again_is_a_smaller_learning_rate() -> None:
    weight, mean_gradient = torch.randn(1000), torch.randn(1000)
    twice_divided = weight - 100 * mean_gradient / 256
    ours = weight.clone().requires_grad_()
    ours.grad = mean_gradient
    ScratchSGD([ours], lr=0.390625).step()
    assert torch.equal(ours.detach(), twice_divided)


def test_scratch_parts_train_as_library_parts_do(tmp_path: Path) -> None:
    records = {}
    for model in ("softmax", "scratch-softmax"):
        config = TrainConfig.with_defaults({"dataset": "digits", "model": model, "epochs": 5, "device": "cpu"})
        records[model] = metrics_of(train(config, output=tmp_path / model, reporter=QUIET))
    scratch, library = records["scratch-softmax"], records["softmax"]
    assert (scratch["config"]["loss"], scratch["config"]["optimizer"]) == ("scratch", "scratch-sgd")
    assert scratch["train_loss"] == pytest.approx(library["train_loss"], rel=1e-4)
    assert scratch["test_accuracy"] == library["test_accuracy"]


def test_large_logits_break_the_naive_loss_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train", "--dataset", "digits", "--logit-scale", 100, "--epochs", 6, "--loss"]
    naive = run_cli(capsys, *options, "scratch-naive", "--output", tmp_path / "naive")
    assert naive.status == 1
    assert naive.error == (
        "error: expected a finite training loss, got nan; "
        "exp overflows in float32 from logits of 89 on; choose --loss fused, which subtracts the maximum"
    )
    assert run_cli(capsys, *options, "fused", "--output", tmp_path / "fused").status == 0
    assert metrics_of(tmp_path / "fused")["test_accuracy"][-1] > 0.8


def test_the_scale_multiplies_the_logits() -> None:
    learners = [learner_for(replace(SMALL, logit_scale=scale), 10, CPU) for scale in (1, 100)]
    images = few_digits().test.images / 255
    torch.testing.assert_close(learners[1].logits(images), 100 * learners[0].logits(images))


def test_squared_loss_halves_the_square() -> None:
    values, target = torch.randn(2, 9, dtype=torch.float64)
    values.requires_grad_()
    for name in ("squared", "scratch-squared"):
        loss = build_loss(name)(values, target)
        assert loss.item() == pytest.approx(((values - target) ** 2).sum().item() / 18)
        (gradient,) = torch.autograd.grad(loss, values)
        torch.testing.assert_close(gradient, (values - target).detach() / 9)


@pytest.mark.parametrize("name", ["logistic", "logistic-squared"])
def test_the_gradient_of_two_classes_is_the_input_times_the_error(name: str) -> None:
    data = select_pair(few_digits(), "fashion-pair", 3, 8).train
    inputs, target = data.images.flatten(1).double() / 255, data.labels
    weight = torch.randn(784, dtype=torch.float64, requires_grad=True)
    loss = build_loss(name)(inputs @ weight, target)
    (gradient,) = torch.autograd.grad(loss, weight)
    share = 1 / (1 + (-inputs @ weight.detach()).exp())
    error = share - target
    expected = (share.log() * target + (1 - share).log() * (1 - target)).neg()
    if name == "logistic-squared":
        expected, error = error**2 / 2, error * share * (1 - share)
    torch.testing.assert_close(loss.detach(), expected.mean())
    torch.testing.assert_close(gradient, (inputs * error.unsqueeze(1)).mean(dim=0))


def test_mean_squared_error_and_double_softmax_follow_their_formulas() -> None:
    logits, target = torch.randn(8, 5, dtype=torch.float64), torch.randint(5, (8,))
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    error = p - torch.eye(5, dtype=torch.float64)[target]
    assert build_loss("mse")(logits, target).item() == pytest.approx((error**2).sum().item() / 40)
    again = p.exp() / p.exp().sum(1, keepdim=True)
    twice = -again[range(8), target].log().mean()
    assert build_loss("softmax-twice")(logits, target).item() == pytest.approx(twice.item())


@pytest.mark.parametrize("loss", ["logistic", "logistic-squared"])
def test_two_classes_are_learned_drawn_and_predicted(
    tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = select_pair(few_digits(), "fashion-pair", 3, 8)
    assert data.classes == ("3", "8")
    settings = {"dataset": "fashion-pair", "loss": loss, "batch_size": 8, "epochs": 10, "device": "cpu"}
    folder = train(TrainConfig.with_defaults(settings), output=tmp_path, data=data, reporter=QUIET)
    metrics = metrics_of(folder)
    assert metrics["test_accuracy"][-1] > 0.8
    assert torch.tensor(metrics["confusion_matrix"]).shape == (2, 2)
    assert (folder / "predictions.png").exists()
    outcome = run_cli(capsys, "predict", "--checkpoint", folder, folder / "predictions.png")
    assert {line.split()[1] for line in outcome.out.splitlines()[1:]} == {"3", "8"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_learns(activation: str) -> None:
    config = TrainConfig.with_defaults(
        {"dataset": "digits", "model": "mlp", "activation": activation, "optimizer": "adam"}
    )
    learner, data = learner_for(replace(config, lr=0.01), 10, CPU), few_digits()
    for epoch in range(1, 9):
        train_epoch(learner, MemoryBatches(data.train, 16, 0, CPU).epoch(epoch))
    assert (predict_classes(learner, data.test) == data.test.labels).sum() > 80


@real_data
@pytest.mark.slow
def test_softmax_regression_from_scratch_on_fashion_mnist() -> None:
    data = load_dataset("fashion-mnist", data_root())
    accuracies = []
    for model in ("softmax", "scratch-softmax"):
        learner = learner_for(TrainConfig.with_defaults({"model": model}), 10, CPU)
        for epoch in range(1, 4):
            train_epoch(learner, MemoryBatches(data.train, 256, 0, CPU).epoch(epoch))
        accuracies.append((predict_classes(learner, data.test) == data.test.labels).double().mean().item())
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    assert all(0.8 < accuracy < 0.85 for accuracy in accuracies)


def test_the_message_of_a_loss_that_is_not_finite_depends_on_the_loss() -> None:
    learner = learner_for(replace(SMALL, loss="scratch-naive", lr=1e6), 10, CPU)
    with pytest.raises(LabError, match=r"got nan; exp overflows in float32"):
        train_epoch(learner, MemoryBatches(few_digits().train, 16, 0, CPU).epoch(1))
