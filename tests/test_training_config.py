"""Settings of a run: defaults, and combinations that are refused."""

import pytest

from softmax_fused.training.config import TrainConfig, losses_for, models_for
from softmax_fused.training.data.datasets import DATASETS
from softmax_fused.training.errors import UsageError
from tests.lab import run_cli


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_valid_defaults(dataset: str) -> None:
    for model in models_for(dataset):
        config = TrainConfig.with_defaults({"dataset": dataset, "model": model})
        assert config.loss in losses_for(dataset)
    assert TrainConfig.with_defaults({"dataset": dataset}).lr == DATASETS[dataset].lr


def test_given_settings_are_kept() -> None:
    config = TrainConfig.with_defaults({"dataset": "mnist", "lr": 0.1, "model": "scratch-mlp", "optimizer": "adam"})
    assert (config.lr, config.batch_size, config.loss, config.optimizer) == (0.1, 64, "scratch", "adam")
    assert config.activation == "relu"
    assert TrainConfig.with_defaults({}) == TrainConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--dataset linear --mixup 0.2",
            "expected --mixup with a data set of several classes, got it with --dataset linear (a regression)",
        ),
        (
            "--dataset fashion-pair --one-hot",
            "expected --one-hot with a data set of several classes, got it with --dataset fashion-pair (two classes)",
        ),
        (
            "--dataset linear --logit-scale 2",
            "expected --logit-scale with a data set of several classes, got it with --dataset linear (a regression)",
        ),
        (
            "--activation tanh",
            "expected --activation with --model mlp or scratch-mlp, got it with --model softmax, "
            "which has no hidden layer; leave it out",
        ),
        ("--model mlp --activation gelu", "expected --activation to be one of relu, sigmoid, tanh, got 'gelu'"),
        ("--loss mse --mixup 1", "expected --mixup with --loss fused or torch or fused-linear, got it with --loss mse"),
        (
            "--model scratch-softmax --label-smoothing 0.1",
            "expected --label-smoothing with --loss fused or torch or fused-linear, got it with --loss scratch",
        ),
        (
            "--dataset linear --model mlp",
            "expected --model to be one of linear, scratch-linear for --dataset linear (a regression), got 'mlp'; "
            "the default is linear",
        ),
        (
            "--dataset linear --loss fused",
            "expected --loss to be one of squared, scratch-squared for --dataset linear (a regression), got 'fused'",
        ),
        (
            "--model scratch-mlp --compile",
            "expected --compile with library parts, got it with --model scratch-mlp; leave it out",
        ),
        (
            "--optimizer scratch-sgd --amp",
            "expected --amp with library parts, got it with --optimizer scratch-sgd; leave it out",
        ),
        (
            "--label-smoothing 1.5",
            "expected --label-smoothing to be from 0 to 1, got 1.5; choose a value in that range",
        ),
        ("--mixup -1", "expected --mixup to be from 0 to 1000, got -1.0; choose a value in that range"),
        ("--logit-scale 0", "expected --logit-scale to be a finite number above 0, got 0.0; 1 is usual"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    outcome = run_cli(capsys, "train", *options.split())
    assert outcome.status == 2
    assert outcome.error.startswith(f"error: {message}")


def test_a_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="expected --model to be one of logistic for --dataset fashion-pair"):
        TrainConfig(dataset="fashion-pair")
