"""Several ranks: they train what one process trains, and a job that loses a rank says so and can be resumed."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softmax_fused.training.config import check_ranks
from softmax_fused.training.data.batches import make_batches
from softmax_fused.training.data.datasets import ImageData, data_root, load_dataset
from softmax_fused.training.errors import LabError, Stopped, UsageError
from softmax_fused.training.ranks import group
from softmax_fused.training.ranks.group import CPU, SINGLE_PROCESS, Ranks
from softmax_fused.training.ranks.shards import EpochShards
from softmax_fused.training.runs import run as run_module
from softmax_fused.training.runs.checkpoint import load_checkpoint
from softmax_fused.training.runs.run import resume, train
from tests.lab import QUIET, SMALL, assert_consistent, digits, metrics_of, real_data, run_cli
from tests.lab_ranks import LIMIT, Runs, on_ranks, train_all, train_and_communicate
from tests.test_training_resume import interrupt_in_epoch
from tests.torchrun import PROC, torchrun

SCENARIOS: dict[str, dict[str, Any]] = {
    "a last batch of one image": {"loss": "fused", "batch_size": 50},
    "batches smaller than four ranks": {"model": "mlp", "optimizer": "adam", "lr": 0.001, "batch_size": 3, "epochs": 1},
    "the loss owns parameters": {"model": "mlp", "loss": "fused-linear", "batch_size": 50},
    "mixup": {"mixup": 0.4, "label_smoothing": 0.1, "batch_size": 50},
    "one-hot targets from workers": {"one_hot": True, "workers": 1, "batch_size": 50},
    "a regression": {"dataset": "linear", "model": "linear", "loss": "squared", "batch_size": 9, "lr": 0.03},
}


def few() -> ImageData:
    return digits().head(301, 99)


def all_runs() -> Runs:
    configs = {name: replace(SMALL, **changes) for name, changes in SCENARIOS.items()}
    linear = load_dataset("linear", Path()).head(100, 3)
    return {name: (config, linear if config.dataset == "linear" else few()) for name, config in configs.items()}


def assert_same_curves(one: Path, other: Path) -> None:
    ours, theirs = metrics_of(one), metrics_of(other)
    for name in ("train_loss", "test_loss"):
        assert ours.get(name, []) == pytest.approx(theirs.get(name, []), abs=1e-5)
    for name in ("train_accuracy", "test_accuracy"):
        assert ours.get(name, []) == pytest.approx(theirs.get(name, []), abs=0.002)
    weights, expected = load_checkpoint(one)["model"], load_checkpoint(other)["model"]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])  # four ranks share two cores
def test_any_number_of_ranks_gives_the_same_curve(tmp_path: Path, size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)
    runs = all_runs()
    train_all(SINGLE_PROCESS, tmp_path / "alone", runs)
    train(replace(SMALL, epochs=1), output=tmp_path / "begun", data=few(), reporter=QUIET)
    train(SMALL, output=tmp_path / "whole", data=few(), reporter=QUIET)
    on_ranks(size, train_and_communicate, tmp_path, tmp_path / "ranks", runs, tmp_path / "begun", few())
    for name, (config, _) in runs.items():
        assert_same_curves(tmp_path / "ranks" / name, tmp_path / "alone" / name)
        assert_consistent(tmp_path / "ranks" / name, config.epochs)
        assert metrics_of(tmp_path / "ranks" / name)["ranks"] == size
        assert len(list((tmp_path / "ranks" / name).glob("events.*"))) == 1
    confusion = torch.tensor(metrics_of(tmp_path / "ranks" / "mixup")["confusion_matrix"])
    assert torch.equal(confusion.sum(dim=1), few().test.labels.bincount(minlength=10))
    assert_same_curves(tmp_path / "begun", tmp_path / "whole")
    assert metrics_of(tmp_path / "begun")["ranks"] == size


@pytest.mark.slow  # 12,000 images
@real_data
def test_ranks_train_to_the_same_curve_on_the_real_data(tmp_path: Path, monkeypatch: Any) -> None:
    data = load_dataset("fashion-mnist", data_root()).head(12_000, 2_000)
    runs = {"run": (replace(SMALL, dataset="fashion-mnist", loss="fused"), data)}
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)
    train_all(SINGLE_PROCESS, tmp_path / "alone", runs)
    on_ranks(2, train_all, tmp_path, tmp_path / "ranks", runs)
    assert_same_curves(tmp_path / "ranks" / "run", tmp_path / "alone" / "run")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 50, 400])
def test_shards_are_the_batches_without_padding(size: int, batch_size: int) -> None:
    split = digits().head(301, 1).train
    everyone = [Ranks(rank, size) for rank in range(size)]
    whole = list(make_batches(split, batch_size, 7, CPU).epoch(3))
    batches = [list(make_batches(split, batch_size, 7, CPU, 0, ranks).epoch(3)) for ranks in everyone]
    shards = [list(EpochShards(ranks, len(split), batch_size)) for ranks in everyone]
    assert {len(part) for part in (*batches, *shards)} == {len(whole)}
    for step, (images, labels) in enumerate(whole):
        dealt = torch.full_like(labels, -1)
        for rank in range(size):
            shard, (own_images, own_labels) = shards[rank][step], batches[rank][step]
            assert len(own_labels) == max(1, shard.examples)
            assert torch.equal(own_images, images[rank::size] if shard.examples else images[:1])
            assert shard.factor == pytest.approx(size * shard.examples / len(labels))
            dealt[rank::size] = own_labels[: shard.examples]
        assert torch.equal(dealt, labels)


def curve_lines(out: str) -> list[str]:
    return re.findall(r"^epoch +(\d+)/", out, re.M)


@pytest.mark.slow  # torchrun waits for its ranks
@pytest.mark.skipif(not PROC.is_dir(), reason="finds the ranks through /proc")
def test_a_job_restarts_after_a_killed_rank_and_stops_on_sigterm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--dataset", "digits", "--loss", "torch", "--device", "cpu", "--epochs", 100_000]
    with torchrun(tmp_path, 2, "train", *options, "--output", folder, restarts=1) as job:
        job.wait_for(lambda: "3/100000" in job.out)
        os.kill(job.pids()[1], signal.SIGKILL)
        job.wait_for(lambda: "goes on" in job.out)
        before = len(curve_lines(job.out))
        job.wait_for(lambda: len(curve_lines(job.out)) > before + 2)
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.process.wait(LIMIT) != 0
        assert not job.pids()
        out, err = job.out, job.err
    lost, stopped = re.findall(r"^(?:error: expected every rank|stopped; ).*", err, re.M)
    command = rf"torchrun --nproc-per-node=2 -m softmax_fused train --resume {folder}"
    reason = r"error: expected every rank to go on, got one that ended \(.*\); torchrun names the first to fail"
    # The remaining rank is stopped by SIGTERM where torchrun notices the lost rank first.
    assert re.fullmatch(rf"({reason}|stopped); {folder} keeps \d+ of 100000 epochs; resume with: {command}", lost)
    done = len(metrics_of(folder)["train_loss"])
    # And on a busy machine the first rank to stop may be missed by the other before SIGTERM reaches that one.
    assert re.fullmatch(rf"({reason}|stopped); {folder} keeps {done} of 100000 epochs; resume with: {command}", stopped)
    assert curve_lines(out) == [str(number) for number in range(1, done + 1)]
    assert_consistent(folder, done)
    resume(folder, {"epochs": done + 1}, reporter=QUIET)
    whole = train(replace(SMALL, epochs=done + 1), output=tmp_path / "whole", reporter=QUIET)
    assert_same_curves(folder, whole)
    assert metrics_of(folder)["ranks"] == 1


@pytest.mark.slow  # torchrun waits for its ranks
@pytest.mark.skipif(not PROC.is_dir(), reason="finds the ranks through /proc")
def test_a_job_that_may_not_restart_ends_when_a_rank_dies(tmp_path: Path) -> None:
    options = ["--dataset", "digits", "--loss", "torch", "--device", "cpu", "--epochs", 100_000]
    with torchrun(tmp_path, 2, "train", *options, "--output", tmp_path / "run") as job:
        job.wait_for(lambda: "2/100000" in job.out)
        os.kill(job.pids()[0], signal.SIGKILL)
        assert job.process.wait(LIMIT) == 1
        assert not job.pids()
        err = job.err
    reason = "error: expected every rank to go on, got .*|stopped"  # by SIGTERM, where torchrun notices first
    assert re.search(rf"^rank 1: ({reason}); {tmp_path / 'run'} keeps ", err, re.M)
    assert "Signal 9 (SIGKILL)" in err
    done = len(load_checkpoint(tmp_path / "run")["metrics"]["train_loss"])
    assert done - len(metrics_of(tmp_path / "run")["train_loss"]) in (0, 1)  # it may have died while it wrote
    resume(tmp_path / "run", {"epochs": done + 1}, reporter=QUIET)
    assert_consistent(tmp_path / "run", done + 1)


@pytest.mark.parametrize("named", [True, False])
def test_a_restarted_job_finds_its_own_run_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    output = Path("run") if named else None
    data = few()

    def start(job: str, epochs: int = 3) -> Path:
        config = replace(SMALL, epochs=epochs)
        return train(config, output=output, data=data, reporter=QUIET, ranks=Ranks(job=job))

    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 2, Stopped())
        with pytest.raises(Stopped):
            start("one")
    folder = start("one")
    assert_consistent(folder, 3)
    if named:
        with pytest.raises(LabError, match="expected --output to be a new folder"):
            start("another")
        with pytest.raises(UsageError, match="expected --epochs of at least 3, which the run has done, got 2"):
            start("one", epochs=2)
    else:
        assert start("another") != folder
        assert start("one") == folder


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info"], "error: expected softmax-fused info in one process, got several ranks; start it without torchrun\n"),
        (["compare"], "error: expected softmax-fused compare in one process, got several ranks; start it without"),
        (["train", "--lr", "0"], "error: expected --lr to be a finite number above 0"),
    ],
)
def test_wrong_usage_is_reported_by_one_rank(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    arguments: list[str],
    message: str,
) -> None:
    pretend(monkeypatch, rank)
    outcome = run_cli(capsys, *arguments)
    assert outcome.status == 2
    assert not outcome.out
    assert outcome.err == "" if rank else outcome.err.startswith(message)


def test_scratch_models_and_shared_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ranks("scratch-mlp", SINGLE_PROCESS)
    with pytest.raises(UsageError, match="expected --model softmax or mlp with several ranks, got scratch-mlp; start"):
        check_ranks("scratch-mlp", Ranks(0, 2))
    for device in ("cuda:1", "mps"):
        monkeypatch.setattr(group, "pick_device", torch.device)
        with pytest.raises(
            UsageError, match=rf"expected --device auto, cpu or cuda with several ranks, .* got {device}"
        ):
            Ranks(0, 2).pick_device(device)
    assert Ranks(0, 2).pick_device("cpu") == CPU


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(group, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [str(Ranks(rank, 4, rank % 2, 2).pick_device("cuda")) for rank in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert taken == [0, 1, 0, 1]
    with pytest.raises(LabError, match="expected 3 GPUs, one for each rank here, got 2; choose --nproc-per-node=2 or"):
        Ranks(2, 3, 2, 3).pick_device("cuda")
