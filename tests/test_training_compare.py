"""Losses trained side by side: what is recorded, drawn and printed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data.datasets import select_pair
from softmax_fused.training.errors import LabError, UsageError
from softmax_fused.training.models.losses import NATS
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.report.page import write_report
from softmax_fused.training.report.plots import plot_comparison
from softmax_fused.training.report.sentences import describe_accuracies, describe_identical
from softmax_fused.training.runs.compare import compare, explain_small_batches
from softmax_fused.training.runs.run import train
from tests.lab import QUIET, SMALL, few_digits, metrics_of, run_cli

KNOWN = "fused, torch, scratch, scratch-naive, mse, softmax-twice for --dataset fashion-mnist"


def comparison(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


@pytest.mark.pictures
def test_the_record_holds_curves_differences_and_times(tmp_path: Path) -> None:
    compare(["fused", "torch", "scratch"], SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    record = comparison(tmp_path)
    assert list(record["losses"]) == ["fused", "torch", "scratch"]
    assert "loss" not in record["config"]
    for loss in record["losses"].values():
        assert len(loss["train_loss"]) == len(loss["test_accuracy"]) == 2
        assert max(loss["largest_difference"]) < 1e-4
        for times in (loss["loss_us"], loss["step_us"]):
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
        assert loss["loss_us"]["median"] < loss["step_us"]["median"]
    assert record["losses"]["torch"]["largest_difference"] == [0, 0]
    assert max(record["losses"]["scratch"]["largest_difference"]) > 0
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size[0] > picture.size[1] > 400


def fake_losses(**differences: list[float] | None) -> dict[str, dict[str, Any]]:
    measured = {"unit": NATS, "train_loss": [2.0, 1.0], "test_accuracy": [0.5, 0.75]}
    times = {"p20": 1.0, "median": 2.0, "p80": 3.0}
    return {
        name: {**measured, "largest_difference": values, "loss_us": times, "step_us": times}
        for name, values in differences.items()
    }


@pytest.mark.parametrize(
    ("differences", "drawn", "sentence"),
    [
        ({"fused": [0.0, 0.0], "torch": [0.0, 0.0]}, None, "fused: identical to torch's loss to the last bit at every"),
        (
            {"fused": [0.0, 0.0], "fused-linear": [0.0, 0.0], "torch": [0.0, 0.0], "scratch": [0.0, 2e-7]},
            {"scratch": [0.0, 2e-7]},
            "fused, fused-linear: identical to torch's loss to the last bit at every step",
        ),
        ({"fused": [1e-9, 1e-7], "torch": [0.0, 0.0]}, {"fused": [1e-9, 1e-7]}, ""),
        ({"torch": [0.0, 0.0]}, None, ""),
        ({"fused": None, "mse": None}, None, ""),
    ],
    ids=["none", "some", "all", "torch alone", "without torch"],
)
def test_differences_are_drawn_where_there_are_any(
    differences: dict[str, Any], drawn: dict[str, list[float]] | None, sentence: str
) -> None:
    losses = fake_losses(**differences)
    assert describe_identical(losses).startswith(sentence)
    assert bool(describe_identical(losses)) == bool(sentence)
    panels = plot_comparison("title", losses).axes
    assert len(panels) == (3 if drawn is None else 4)
    if drawn:
        lines = {line.get_label(): list(line.get_ydata()) for line in panels[3].get_lines()}
        assert lines == drawn
        colours = [{line.get_label(): line.get_color() for line in panel.get_lines()} for panel in panels]
        assert all(colours[3][name] == colours[0][name] for name in drawn)
        low, high = panels[3].get_ylim()
        assert all(low <= value < high for values in lines.values() for value in values)


def test_losses_identical_to_torch_are_named_in_a_sentence_and_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--losses", "fused,torch", "--dataset", "digits", "--epochs", 1, "--output", tmp_path / "same"]
    outcome = run_cli(capsys, "compare", *options)
    sentence = "fused: identical to torch's loss to the last bit at every step"
    assert sentence in outcome.out.splitlines()
    assert "off torch by" not in outcome.out
    page = write_report([tmp_path / "same"]).read_text()
    assert f"<p>{sentence.replace(chr(39), '&#39;')}.</p>" in page
    assert "<figcaption>Largest difference</figcaption>" not in page


def test_a_sentence_says_why_fused_is_not_faster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beginning = "fused is not faster than torch here: "
    sentence = explain_small_batches(["scratch", "fused", "torch"], 256, 10)
    assert sentence.startswith(beginning)
    assert "256 x 10 logits go to torch's own operator" in sentence
    assert explain_small_batches(["fused", "scratch"], 256, 10) == ""
    assert explain_small_batches(["fused", "torch"], 2**20, 10) == ""
    compare(["fused", "torch"], replace(SMALL, epochs=1), output=tmp_path, data=few_digits(), reporter=Reporter())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(beginning)]
    assert len(lines) == (comparison(tmp_path)["device"] == "cpu")


def test_each_loss_trains_as_it_does_alone(tmp_path: Path) -> None:
    compare(["scratch", "torch"], SMALL, output=tmp_path / "both", data=few_digits(), reporter=QUIET)
    alone = train(SMALL, output=tmp_path / "alone", data=few_digits(), reporter=QUIET)
    together = comparison(tmp_path / "both")["losses"]["torch"]
    assert together["train_loss"] == pytest.approx(metrics_of(alone)["train_loss"], abs=1e-6)
    assert together["test_accuracy"] == metrics_of(alone)["test_accuracy"]


def test_differences_need_the_loss_of_torch(tmp_path: Path) -> None:
    compare(["scratch"], SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    assert comparison(tmp_path)["losses"]["scratch"]["largest_difference"] is None


def test_losses_of_other_kinds_are_compared_by_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--losses", "fused,mse,softmax-twice", "--dataset", "digits", "--lr", 0.5, "--batch-size", 64]
    outcome = run_cli(capsys, "compare", *options, "--epochs", 2, "--output", tmp_path / "out")
    record = comparison(tmp_path / "out")
    assert outcome.out.splitlines()[-2] == record["shows"]
    assert record["shows"].startswith("test accuracy after epoch 1: ")
    assert [loss["largest_difference"] for loss in record["losses"].values()] == [None] * 3
    accuracies = {name: loss["test_accuracy"] for name, loss in record["losses"].items()}
    assert accuracies["fused"][1] > accuracies["mse"][1]


def test_diverged_losses_are_printed_in_exponent_form_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, lr=1e30)
    compare(["fused", "mse"], config, output=tmp_path, data=few_digits(), reporter=Reporter())
    out, err = capsys.readouterr()
    assert re.match(r"epoch 1/2  fused \d\.\d\de\+\d\d  mse 0\.\d{6}\n", out)
    assert re.search(r"fused +\S +\d\.\d\de\+\d\d ", out)
    assert re.fullmatch(r"warning: the training loss of fused in epoch 1 is .*; choose a smaller --lr\n", err)
    with pytest.raises(LabError, match=r"^scratch: expected a finite training loss, got inf; choose a smaller --lr"):
        compare(["fused", "scratch"], config, output=tmp_path / "other", data=few_digits(), reporter=QUIET)


def test_one_line_ranks_the_losses() -> None:
    curves = {"mse": [0.25, 0.5], "fused": [0.5, 0.75], "torch": [0.5, 0.75]}
    assert describe_accuracies(curves) == (
        "test accuracy after epoch 1: fused 0.5000 = torch 0.5000 > mse 0.2500; "
        "after epoch 2: fused 0.7500 = torch 0.7500 > mse 0.5000"
    )


def test_two_classes_are_compared_and_regressions_are_not(tmp_path: Path) -> None:
    data = select_pair(few_digits(), "fashion-pair", 3, 8)
    config = TrainConfig.with_defaults({"dataset": "fashion-pair", "epochs": 1, "device": "cpu"})
    compare(["logistic", "logistic-squared"], config, output=tmp_path / "pair", data=data, reporter=QUIET)
    assert set(comparison(tmp_path / "pair")["losses"]) == {"logistic", "logistic-squared"}
    with pytest.raises(UsageError, match="expected a data set of classes to compare losses on, got linear; use"):
        compare(
            ["squared"], TrainConfig.with_defaults({"dataset": "linear"}), output=tmp_path / "linear", reporter=QUIET
        )


def test_a_comparison_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "compare.json").touch()
    with pytest.raises(LabError, match="got .* with compare.json; choose another folder"):  # noqa: RUF043
        compare(["torch"], SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--losses", "torch, scratch", "--dataset", "digits", "--epochs", 1, "--output", tmp_path / "out"]
    outcome = run_cli(capsys, "compare", *options)
    assert outcome.status == 0
    for word in ("final loss", "test accuracy", "off torch by", "loss (us)", "step (us)", "scratch", str(tmp_path)):
        assert word in outcome.out
    assert outcome.out.splitlines()[-1] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            "torch,fussed",
            f"error: expected --losses to be one of {KNOWN}, got 'fussed'; did you mean fused?",
        ),
        ("torch,torch", "error: expected --losses without repetition, got 'torch,torch'; name each loss once"),
        ("", f"error: expected --losses to be one of {KNOWN}, got ''; the default is fused"),
    ],
)
def test_wrong_losses(capsys: pytest.CaptureFixture[str], losses: str, message: str) -> None:
    outcome = run_cli(capsys, "compare", "--losses", losses)
    assert (outcome.status, outcome.error) == (2, message)
