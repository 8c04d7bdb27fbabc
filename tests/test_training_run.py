"""Run folders: their content, and their protection from other processes."""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softmax_fused.training.errors import LabError
from softmax_fused.training.models.evaluation import CURVES
from softmax_fused.training.ranks.devices import device_name
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.report.plots import plot_curves
from softmax_fused.training.runs import lock
from softmax_fused.training.runs import run as run_module
from softmax_fused.training.runs.compare import compare
from softmax_fused.training.runs.folder import default_folder
from softmax_fused.training.runs.lock import LOCK
from softmax_fused.training.runs.run import resume, train
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


@pytest.mark.pictures
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


def test_the_device_name_has_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, text in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert device_name(torch.device("cpu")).endswith(f", {text}")


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    before = metrics_of(tmp_path)
    with pytest.raises(LabError, match=f"continue that run with --resume {tmp_path}, or choose another folder"):
        train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    assert metrics_of(tmp_path) == before


def test_default_folders_differ_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {default_folder("digits-softmax-torch") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and folder.parent == Path("runs") for folder in folders)


BUSY = (
    "^expected a folder in which nothing else trains, got .*, in which another process does; wait until that ends, or"
)


def test_of_two_runs_in_one_folder_the_second_is_refused_before_the_first_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run_module.save_run

    def start_another_and_save(*arguments: Any) -> None:
        for start in (train, partial(compare, ["torch"])):
            with pytest.raises(LabError, match=BUSY):
                start(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
        save(*arguments)
        with pytest.raises(LabError, match=BUSY):
            resume(tmp_path, {}, data=few_digits(), reporter=QUIET)

    monkeypatch.setattr(run_module, "save_run", start_another_and_save)
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)
    train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    assert_consistent(tmp_path, 2)


LOCKER = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.flock(file, 2); print(flush=True); sys.stdin.read()"


@pytest.mark.skipif(os.name != "posix", reason="the other process locks as POSIX does")
def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)
    train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    command = [sys.executable, "-I", "-S", "-c", LOCKER, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(LabError, match=BUSY):
            resume(tmp_path, {}, data=few_digits(), reporter=QUIET)
        other.kill()
    assert (tmp_path / LOCK).exists()
    resume(tmp_path, {}, data=few_digits(), reporter=QUIET)
    assert_consistent(tmp_path, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the child does nothing
def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    file = lock._open_locked(tmp_path / LOCK)
    assert file is not None
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(writer, b"!")
        signal.pause()
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    file.close()  # as the operating system does when it ends the parent
    try:
        with lock.locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_file_system_without_locks_is_used_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", unsupported)
    with lock.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_diverged_loss_is_printed_in_exponent_form_and_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)
    train(replace(SMALL, lr=1e30, epochs=3), output=tmp_path, data=few_digits(), reporter=Reporter())
    out, err = capsys.readouterr()
    assert re.match(r"epoch 1/3  train loss \d\.\d\de\+\d\d  test loss \d\.\d\de\+\d\d  accuracy", out)
    assert re.fullmatch(
        r"warning: the training loss in epoch 1 is .*e\+\d\d: the steps are far too large; choose a smaller --lr\n",
        err,
    )
    assert_consistent(tmp_path, 3)
