"""--loss fused-linear, which computes the last layer too: it gives the curve of --loss fused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softmax_fused import _dispatch
from softmax_fused.functional import linear
from softmax_fused.training.config import learner_for
from softmax_fused.training.errors import UsageError
from softmax_fused.training.models.architectures import build_model
from softmax_fused.training.models.learner import build_learner
from softmax_fused.training.models.losses import build_loss
from softmax_fused.training.runs.run import train
from tests.lab import QUIET, SMALL, few_digits, metrics_of, run_cli

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"epochs": 3},
    "mlp": {"model": "mlp", "activation": "tanh"},
    "smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.5},
    "scale": {"logit_scale": 3.0},
}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of batches computed in chunks, which are forced here: only many classes would need chunks."""
    seen: list[int] = []
    chunked = linear.chunked
    monkeypatch.setattr(_dispatch, "SMALL_CPU_NUMEL", 0)
    monkeypatch.setattr(linear, "default_rows", lambda *_: 100)
    monkeypatch.setattr(linear, "chunked", lambda layer, plan: (seen.append(len(layer.input)), chunked(layer, plan))[1])
    return seen


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_curve_is_that_of_the_fused_loss(tmp_path: Path, settings: dict[str, Any], sizes: list[int]) -> None:
    curves = {}
    for loss in ("fused", "fused-linear"):
        config = replace(SMALL, loss=loss, **settings)
        curves[loss] = metrics_of(train(config, output=tmp_path / loss, data=few_digits(), reporter=QUIET))
    assert sizes == [256, 44, 100] * config.epochs  # the training set's two batches, the test set
    for name in ("train_loss", "test_loss"):
        assert curves["fused-linear"][name] == pytest.approx(curves["fused"][name], abs=1e-5)
    for name in ("train_accuracy", "test_accuracy"):
        assert curves["fused-linear"][name] == curves["fused"][name]


def test_mixed_precision(sizes: list[int]) -> None:
    images, labels = few_digits().train.images[:64] / 255, few_digits().train.labels[:64]
    config = replace(SMALL, amp=True)
    outputs, losses = zip(
        *(
            learner_for(replace(config, loss=loss), 10, torch.device("cpu")).outputs_and_loss(images, labels)
            for loss in ("fused", "fused-linear")
        ),
        strict=True,
    )
    assert sizes == [64]
    assert torch.equal(*outputs)
    assert losses[0].dtype is losses[1].dtype is torch.float32
    torch.testing.assert_close(*losses, rtol=0, atol=1e-4)


def test_models_that_do_not_end_in_a_linear_layer_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "train", "--model", "scratch-softmax", "--loss", "fused-linear")
    assert outcome.status == 2
    assert outcome.error == (
        "error: expected --loss fused-linear with --model softmax or mlp, which end in nn.Linear, got it with --model "
        "scratch-softmax; choose --loss fused"
    )
    for model in (build_model("scratch-mlp", 10), nn.Sequential(nn.Linear(784, 10), nn.ReLU())):
        with pytest.raises(UsageError, match=r"expected a model that ends in nn\.Linear"):
            build_learner(model, build_loss("fused-linear"), device=torch.device("cpu"), includes_last_layer=True)


def test_losses_of_logits_alone_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "compare", "--losses", "fused,fused-linear")
    assert outcome.status == 2
    assert "got 'fused-linear'" in outcome.error
