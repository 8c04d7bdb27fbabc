"""Linear regression: its data, its recovered parameters, its run folder."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data.datasets import load_dataset
from softmax_fused.training.errors import LabError
from softmax_fused.training.runs.checkpoint import load_checkpoint
from softmax_fused.training.runs.run import resume, train
from tests.lab import QUIET, assert_consistent, metrics_of, run_cli


def test_the_examples_are_a_plane_with_noise() -> None:
    data = load_dataset("linear", Path())
    for split in (data.train, data.test):
        assert (split.images.shape, split.labels.shape) == ((1000, 2), (1000,))
        noise = split.labels - split.images @ torch.tensor([2.0, -1.2]) - 3.1
        assert abs(noise.mean()) < 0.001
        assert 0.009 < noise.std() < 0.011
    assert not torch.equal(data.train.images, data.test.images)
    assert torch.equal(load_dataset("linear", Path()).train.labels, data.train.labels)


@pytest.mark.parametrize("options", [[], ["--model", "scratch-linear"]], ids=["library", "scratch"])
def test_the_plane_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    outcome = run_cli(capsys, "train", "--dataset", "linear", *options, "--output", tmp_path / "run")
    *epochs, parameters, folder = outcome.out.splitlines()
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("test loss" in line and line.endswith(" examples/s") for line in epochs)
    assert parameters.endswith("(made with weights 2.0, -1.2  bias 3.1)")
    assert folder == str(tmp_path / "run")
    metrics = metrics_of(tmp_path / "run")
    found = metrics["parameters"]
    assert found["weights"] == pytest.approx([2, -1.2], abs=0.01)
    assert found["bias"] == pytest.approx(3.1, abs=0.01)
    assert (found["true_weights"], found["true_bias"]) == ([2.0, -1.2], 3.1)
    assert metrics["test_loss"][-1] < 1e-4
    assert "test_accuracy" not in metrics
    assert (metrics["config"]["batch_size"], metrics["config"]["lr"]) == (10, 0.03)
    assert_consistent(tmp_path / "run", 3)


def test_a_test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = TrainConfig.with_defaults({"dataset": "linear", "lr": 1e30, "batch_size": 1000, "device": "cpu"})
    with pytest.raises(LabError, match=r"^expected a finite test loss, got inf; choose a smaller --lr$"):
        train(config, output=tmp_path, reporter=QUIET)
    assert_consistent(tmp_path, 0)


def test_scratch_and_library_take_the_same_steps(tmp_path: Path) -> None:
    runs = []
    for model in ("linear", "scratch-linear"):
        config = TrainConfig.with_defaults({"dataset": "linear", "model": model, "device": "cpu"})
        runs.append(metrics_of(train(config, output=tmp_path / model, reporter=QUIET)))
    assert runs[0]["train_loss"] == pytest.approx(runs[1]["train_loss"], rel=1e-4)


@pytest.mark.pictures
def test_a_regression_is_drawn_resumed_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig.with_defaults({"dataset": "linear", "epochs": 1, "device": "cpu"})
    folder = train(config, output=tmp_path / "run", reporter=QUIET)
    resume(folder, {"epochs": 2}, reporter=QUIET)
    whole = train(
        TrainConfig.with_defaults({"dataset": "linear", "epochs": 2, "device": "cpu"}),
        output=tmp_path / "whole",
        reporter=QUIET,
    )
    for name, weight in load_checkpoint(whole)["model"].items():
        assert torch.equal(weight, load_checkpoint(folder)["model"][name])
    assert sorted(path.name for path in folder.glob("*.png")) == ["curves.png", "fit.png"]
    outcome = run_cli(capsys, "predict", "--checkpoint", folder, "--output", tmp_path / "fit.png")
    assert outcome.status == 0
    for path in (folder / "fit.png", folder / "curves.png", tmp_path / "fit.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 400
    Image.new("L", (28, 28)).save(tmp_path / "zero.png")
    refused = run_cli(capsys, "predict", "--checkpoint", folder, tmp_path / "zero.png")
    assert refused.error == (
        "error: expected the checkpoint of a classifier, got linear on linear; leave the pictures out"
    )


@pytest.mark.skipif(os.name != "posix", reason="workers are forked")
def test_workers_read_features_too(tmp_path: Path) -> None:
    config = TrainConfig.with_defaults({"dataset": "linear", "epochs": 1, "batch_size": 100, "device": "cpu"})
    plain = train(config, output=tmp_path / "plain", reporter=QUIET)
    changed = TrainConfig.with_defaults({**config.as_dict(), "workers": 1})
    workers = train(changed, output=tmp_path / "workers", reporter=QUIET)
    assert metrics_of(plain)["train_loss"] == metrics_of(workers)["train_loss"]
