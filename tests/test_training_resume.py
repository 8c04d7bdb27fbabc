"""Runs stopped by Ctrl-C, a kill or a full disk, and resumed to the results of a run that was never stopped."""

import errno
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softmax_fused.training import files as files_module
from softmax_fused.training.errors import LabError, Stopped, UsageError
from softmax_fused.training.report.page import write_report
from softmax_fused.training.runs import run as run_module
from softmax_fused.training.runs.checkpoint import load_checkpoint, save_run
from softmax_fused.training.runs.run import resume, train
from tests.lab import (
    QUIET,
    SMALL,
    assert_consistent,
    few_digits,
    metrics_of,
    subprocess_arguments,
    subprocess_environment,
)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, which takes longer than these runs."""
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_checkpoint(one), load_checkpoint(other)
    assert ours["model"].keys() == theirs["model"].keys()
    for name, weight in ours["model"].items():
        assert torch.equal(weight, theirs["model"][name]), name
    for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "confusion_matrix"):
        assert ours["metrics"][name] == theirs["metrics"][name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "mlp", "optimizer": "adam", "lr": 0.01, "batch_size": 64},
        {"amp": True},
        {"workers": 1},
        {"model": "scratch-mlp", "activation": "tanh", "optimizer": "scratch-sgd", "loss": "scratch"},
        {"loss": "fused", "mixup": 0.4, "label_smoothing": 0.1},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@pytest.mark.usefixtures("no_pictures")
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(SMALL, epochs=4, **changes)
    whole = train(config, output=tmp_path / "whole", data=few_digits(), reporter=QUIET)
    parts = train(replace(config, epochs=1), output=tmp_path / "parts", data=few_digits(), reporter=QUIET)
    torch.manual_seed(99)
    resume(parts, {"epochs": 3}, data=few_digits(), reporter=QUIET)
    resume(parts, {"epochs": 4}, data=few_digits(), reporter=QUIET)
    assert_same_weights(whole, parts)
    assert_consistent(parts, 4)
    assert metrics_of(parts)["config"]["epochs"] == 4
    assert torch.equal(load_checkpoint(whole)["generators"]["cpu"], load_checkpoint(parts)["generators"]["cpu"])


def test_resuming_a_finished_run_draws_its_figures_again(tmp_path: Path) -> None:
    folder = train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    (folder / "curves.png").unlink()
    (folder / "metrics.json").unlink()
    resume(folder, {}, data=few_digits(), reporter=QUIET)
    assert (folder / "curves.png").exists()
    assert_consistent(folder, 2)


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_recorded_without_test_losses_records_them_when_resumed(tmp_path: Path, epochs: int) -> None:
    folder = train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    state = load_checkpoint(folder)
    del state["metrics"]["test_loss"]
    save_run(folder, state)
    resume(folder, {"epochs": epochs}, data=few_digits(), reporter=QUIET)
    assert_consistent(folder, epochs)
    losses = metrics_of(folder)["test_loss"]
    assert losses[:2] == [None, None]
    assert len(losses) == epochs
    scalars = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert "loss/test" in scalars  # of the first epochs, or of the last one
    table = write_report([folder]).read_text().partition("Every epoch</summary>")[2]
    assert ('<th scope="col">Test loss</th>' in table) == (epochs == 3)
    assert table.partition("</table>")[0].count("<td>\N{EN DASH}</td>") == (2 if epochs == 3 else 0)


def test_figures_of_an_earlier_epoch_are_removed_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    assert list(folder.glob("*.png"))
    interrupt_in_epoch(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(Stopped):
        resume(folder, {"epochs": 3}, data=few_digits(), reporter=QUIET)
    assert not list(folder.glob("*.png"))


@pytest.mark.usefixtures("no_pictures")
def test_only_some_settings_may_change_on_resuming(tmp_path: Path) -> None:
    folder = train(SMALL, output=tmp_path, data=few_digits(), reporter=QUIET)
    resume(folder, {"loss": "torch", "lr": 0.1}, data=few_digits(), reporter=QUIET)
    with pytest.raises(UsageError, match=r"expected --batch-size to stay 256, as the run began, got 8; leave it out"):
        resume(folder, {"batch_size": 8}, data=few_digits(), reporter=QUIET)
    with pytest.raises(UsageError, match="expected --epochs of at least 2, which the run has done, got 1"):
        resume(folder, {"epochs": 1}, data=few_digits(), reporter=QUIET)
    with pytest.raises(LabError, match=r"train_images 300.*train_images 299"):
        resume(folder, {}, data=few_digits().head(299, 100), reporter=QUIET)


def interrupt_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, stop: BaseException) -> None:
    original = run_module.train_epoch
    done = 0

    def interrupted(learner: Any, batches: Any, *shares: Any) -> Any:
        nonlocal done
        done += 1
        if done == epoch:
            next(iter(batches))
            raise stop
        return original(learner, batches, *shares)

    monkeypatch.setattr(run_module, "train_epoch", interrupted)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (Stopped(status=143), 143)])
def test_an_interrupted_run_says_how_to_resume_and_loses_one_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, stop: BaseException, status: int
) -> None:
    config = replace(SMALL, epochs=4)
    folder = tmp_path / "my run"
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, epoch, stop)
        with pytest.raises(Stopped) as stopped:
            train(config, output=folder, data=few_digits(), reporter=QUIET)
    kept = f"{folder} keeps {epoch - 1} of 4 epochs"
    assert str(stopped.value) == f"stopped; {kept}; resume with: softmax-fused train --resume '{folder}'"
    assert stopped.value.status == status
    assert_consistent(folder, epoch - 1)
    assert not list(folder.glob("*.png"))
    resume(folder, {}, data=few_digits(), reporter=QUIET)
    assert_same_weights(folder, train(config, output=tmp_path / "whole", data=few_digits(), reporter=QUIET))


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str, writes: int) -> None:
    """Let the file `name` be written `writes` times; then the disk is full."""
    original = os.fsync
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        if Path(f"/proc/self/fd/{descriptor}").resolve().name == f".{name}.tmp":
            count += 1
            if count > writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(files_module.os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds the file being written through /proc")
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("name", "kept"), [("checkpoint.pt", 1), ("metrics.json", 2)])
def test_a_full_disk_loses_one_epoch_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: int
) -> None:
    config = replace(SMALL, epochs=3)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, name, writes=2)  # the initial state and one epoch
        with pytest.raises(LabError) as error:
            train(config, output=folder, data=few_digits(), reporter=QUIET)
    assert str(error.value) == (
        f"expected to write {folder / name}, got No space left on device; free some disk space, "
        f"then resume with: softmax-fused train --resume {folder}"
    )
    assert len(load_checkpoint(folder)["metrics"]["train_loss"]) == kept
    assert len(metrics_of(folder)["train_loss"]) == 1
    resume(folder, {}, data=few_digits(), reporter=QUIET)
    assert_consistent(folder, 3)
    assert_same_weights(folder, train(config, output=tmp_path / "whole", data=few_digits(), reporter=QUIET))


@pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")
def test_a_disk_that_refuses_figures_and_events_leaves_no_traceback(tmp_path: Path) -> None:
    limited = (
        "import resource, signal, sys; from softmax_fused.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        f"main(['train', '--dataset', 'digits', '--loss', 'torch', '--epochs', '2', '--output', {str(tmp_path)!r}])"
    )
    result = subprocess.run(
        [*subprocess_arguments()[:1], "-c", limited], env=subprocess_environment(), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: expected to write {tmp_path}/curves.png, got File too large; free some")
    assert len(result.stderr.splitlines()) == 1
    assert_consistent(tmp_path, 2)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.usefixtures("no_pictures")
def test_a_killed_process_resumes_to_the_same_weights(tmp_path: Path) -> None:
    options = ["--dataset", "digits", "--loss", "torch", "--device", "cpu"]
    command = subprocess_arguments("train", *options, "--epochs", 100_000, "--output", tmp_path / "run")
    process = subprocess.Popen(
        command, env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline().startswith("epoch ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    done = len(metrics_of(tmp_path / "run")["train_loss"])
    assert err == (
        f"stopped; {tmp_path / 'run'} keeps {done} of 100000 epochs; "
        f"resume with: softmax-fused train --resume {tmp_path / 'run'}\n"
    )
    assert_consistent(tmp_path / "run", done)
    resume(tmp_path / "run", {"epochs": done + 1}, reporter=QUIET)
    whole = train(replace(SMALL, epochs=done + 1), output=tmp_path / "whole", reporter=QUIET)
    assert_same_weights(tmp_path / "run", whole)
    steps = [event.step for event in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("loss/train")]
    assert steps == list(range(1, done + 2))
