"""Run folders: what is in them, and that they are neither overwritten nor believed blindly."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softmax_fused.training.checkpoint import load_checkpoint
from softmax_fused.training.errors import LabError
from softmax_fused.training.evaluation import CURVES
from softmax_fused.training.plots import plot_curves
from softmax_fused.training.record import default_folder, device_name
from softmax_fused.training.run import train
from tests.lab import QUIET, SMALL, assert_consistent, few_digits, metrics_of


def test_a_run_folder_holds_everything(tmp_path: Path) -> None:
    folder = train(SMALL, output=tmp_path / "new" / "run", data=few_digits(), reporter=QUIET)
    assert_consistent(folder, 2)
    metrics = metrics_of(folder)
    assert metrics["config"] == SMALL.as_dict()
    assert metrics["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert metrics["device"] == "cpu"
    assert metrics["dataset"]["name"] == "digits"
    assert metrics["dataset"]["train_images"] == 300
    assert {len(metrics[name]) for name in CURVES} == {2}
    counts = torch.tensor(metrics["confusion_matrix"])
    assert counts.sum() == 100
    assert metrics["test_accuracy"][-1] == int(counts.diagonal().sum()) / 100
    assert list(metrics["per_class_accuracy"]) == list("0123456789")
    assert metrics["per_class_accuracy"]["3"] == int(counts[3, 3]) / int(counts[3].sum())


def test_pictures_open_and_events_hold_every_epoch(tmp_path: Path) -> None:
    folder = train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    for name in ("curves.png", "predictions.png", "confusion.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) >= 400
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or []) > 20
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(folder)).Reload()
    for name in ("train", "test"):
        losses = [event.value for event in events.Scalars(f"loss/{name}")]
        assert losses == pytest.approx(metrics_of(folder)[f"{name}_loss"])
    assert [event.step for event in events.Scalars("accuracy/test")] == [1, 2]


def test_a_curve_is_drawn_where_it_has_values() -> None:
    losses = {"training": [3.0, 2.0, 1.0], "test": [None, None, 2.0], "another": [None, None, None]}
    axes = plot_curves("title", "nats", losses, {"test": [0.1, 0.2, 0.3]}).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(drawn) == [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "test"]
    assert np.array_equal(drawn["test"], [np.nan, np.nan, 2.0], equal_nan=True)


def test_one_thread_is_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, text in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert device_name(torch.device("cpu")).endswith(f", {text}")


def test_checkpoints_load_without_running_code(tmp_path: Path) -> None:
    folder = train(replace(SMALL, optimizer="adam"), output=tmp_path, data=few_digits(), reporter=QUIET)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["config"] == metrics_of(folder)["config"]


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    before = metrics_of(tmp_path)
    with pytest.raises(LabError, match=f"continue that run with --resume {tmp_path}, or choose another folder"):
        train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    assert metrics_of(tmp_path) == before


def test_default_folders_differ_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = set()
    for _ in range(3):
        folder = default_folder("digits-softmax-torch")
        folder.mkdir(parents=True)
        folders.add(folder)
    assert len(folders) == 3
    assert all(folder.parent == Path("runs") for folder in folders)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(LabError, match=r"^expected a checkpoint in .*checkpoint\.pt, got another or a damaged file"):
        load_checkpoint(tmp_path)
    torch.save({"model": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(LabError, match=r"expected a checkpoint of softmax-fused \(format 1\)"):
        load_checkpoint(tmp_path)


def test_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Bomb(), tmp_path / "checkpoint.pt")
    with pytest.raises(LabError, match="got another or a damaged file"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
