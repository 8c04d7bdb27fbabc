"""The command line: help, messages in one line, exit status, and signals."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import torch
from typer.main import get_command

from softmax_fused import __version__, cli
from softmax_fused.training.commands import EXAMPLES, app
from softmax_fused.training.data.datasets import DATASETS
from softmax_fused.training.errors import Stopped
from softmax_fused.training.runs import run as run_module
from softmax_fused.training.signals import signals_as_exception, signals_delayed
from tests.lab import assert_consistent, fake_fashion, run_cli, subprocess_arguments, subprocess_environment

DIGITS = ["--dataset", "digits", "--loss", "torch", "--device", "cpu", "--epochs", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "fashion"], f"expected --dataset to be one of {', '.join(DATASETS)}, got 'fashion'; did you"),
        (["--model", "cnn"], "expected --model to be one of softmax, mlp, scratch-softmax, scratch-mlp for --dataset"),
        (["--loss", "touch"], "expected --loss to be one of fused, torch, scratch, scratch-naive, fused-linear, mse"),
        (["--optimizer", "lion"], "expected --optimizer to be one of sgd, adam, scratch-sgd, got 'lion'; the default"),
        (["--epochs", "0"], "expected --epochs to be from 1 to 1000000, got 0; choose a value in that range"),
        (
            ["--epochs", "ten"],
            "invalid value for '--epochs': expected a whole number, got 'ten'; see softmax-fused train --help",
        ),
        (["--batch-size", "-1"], "expected --batch-size to be from 1 to 2147483647, got -1; choose a value in that"),
        (["--lr", "0"], "expected --lr to be a finite number above 0, got 0.0; 0.1 is usual"),
        (["--lr", "fast"], "invalid value for '--lr': expected a number, got 'fast'; see softmax-fused train --help"),
        (["--lr", "nan"], "expected --lr to be a finite number above 0, got nan; 0.1 is usual"),
        (["--seed", "-5"], "expected --seed to be from 0 to 4294967295, got -5; choose a value in that range"),
        (["--workers", "-1"], "expected --workers to be from 0 to 1024, got -1; choose a value in that range"),
        (["--device", "gpu"], "expected --device to be auto, cpu, cuda or cuda:N, got 'gpu'; use --device auto"),
        (["--frobnicate"], "no such option: --frobnicate"),
        (["extra"], "got unexpected extra argument"),
        (["--resume", "x", "--output", "y"], "expected --resume without --output, got both; leave --output out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    outcome = run_cli(capsys, "train", *arguments)
    assert outcome.status == 2
    assert outcome.error.startswith(f"error: {message}")
    assert outcome.out == ""


@pytest.mark.parametrize("arguments", [["walk"], ["predict"]])
def test_a_command_must_be_complete(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    outcome = run_cli(capsys, *arguments)
    assert outcome.status == 2
    assert outcome.error.startswith("error: ")
    assert outcome.error.endswith("; see softmax-fused predict --help" if "predict" in arguments else "fused --help")


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    alone, asked = run_cli(capsys), run_cli(capsys, "--help")
    assert (alone.status, alone.out, alone.err) == (0, asked.out, "")
    lines = [line.strip() for line in alone.out.splitlines()]
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        description = next(line for line in lines if re.match(rf"{name} +[A-Z]", line))
        assert re.search(r"[^.]\.$", description)
        assert any(line.startswith(f"softmax-fused {name}") for line in lines)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_in_the_help_are_commands(example: str) -> None:
    program, name, *arguments = example.split()
    assert program == "softmax-fused"
    get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


@pytest.mark.parametrize("extra", [True, False])
def test_the_version_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: bool
) -> None:
    if not extra:
        monkeypatch.setattr(cli, "find_spec", lambda _: None)
    outcome = run_cli(capsys, "--version")
    assert (outcome.status, outcome.err) == (0, "")
    assert re.fullmatch(
        rf"softmax-fused {__version__} \(torch {re.escape(torch.__version__)}, .*triton.*\)\n", outcome.out
    )


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    environment = subprocess_environment() | {
        "HOME": str(tmp_path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    command = subprocess_arguments("--install-completion", "bash")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    script = tmp_path / ".bash_completions/softmax-fused.sh"
    assert f"source '{script}'" in (tmp_path / ".bashrc").read_text()
    asked = {"_SOFTMAX_FUSED_COMPLETE": "complete_bash", "COMP_WORDS": "softmax-fused tr", "COMP_CWORD": "1"}
    assert set(asked) - {"COMP_WORDS", "COMP_CWORD"} <= set(re.findall(r"\w+", script.read_text()))
    done = subprocess.run(subprocess_arguments(), env=environment | asked, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("train\n", "")


def test_help_names_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "--help")
    assert outcome.status == 0
    assert all(command in outcome.out for command in ("train", "compare", "predict", "data", "report", "info"))
    outcome = run_cli(capsys, "train", "--help")
    options = (
        "dataset model loss epochs batch-size lr optimizer device data-dir output seed workers amp compile activation "
        "logit-scale label-smoothing mixup one-hot resume quiet"
    )
    assert all(f"--{option}" in outcome.out for option in options.split())


def test_info_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "info")
    assert outcome.status == 0
    lines = {line.split()[0]: line for line in outcome.out.splitlines()}
    assert {"python", "softmax-fused", "torch", "triton", "cpu"} <= set(lines)
    assert "backend torch: " in lines["cpu"]


def test_a_run_prints_a_line_an_epoch_and_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "train", *DIGITS, "--output", tmp_path / "run")
    assert outcome.status == 0
    line, folder = outcome.out.splitlines()
    assert re.match(r"epoch 1/1  train loss 2\.0\d+  test loss 1\.\d+  accuracy train 0\.\d+ test 0\.\d+  ", line)
    assert line.endswith(" images/s")
    assert folder == str(tmp_path / "run")
    quiet = run_cli(capsys, "train", *DIGITS, "--quiet", "--output", tmp_path / "quiet")
    assert (quiet.out, quiet.err) == (f"{tmp_path / 'quiet'}\n", "")


def test_resuming_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli(capsys, "train", *DIGITS, "--output", tmp_path)
    outcome = run_cli(capsys, "train", "--resume", tmp_path, "--epochs", 3)
    assert [line.split("  ")[0] for line in outcome.out.splitlines()[:2]] == ["epoch 2/3", "epoch 3/3"]
    conflict = run_cli(capsys, "train", "--resume", tmp_path, "--lr", 0.2)
    assert conflict.status == 2
    assert conflict.error.startswith("error: expected --lr to stay 0.1, as the run began, got 0.2; leave it out")
    again = run_cli(capsys, "train", *DIGITS, "--output", tmp_path)
    assert again.status == 1
    assert again.error.startswith(f"error: expected --output to be a new folder, got {tmp_path} with checkpoint.pt; ")
    assert f"--resume {tmp_path}" in again.error


def test_other_data_are_announced_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_fashion(tmp_path / "elsewhere", monkeypatch)
    options = ["--data-dir", tmp_path / "none", *DIGITS[2:], "--quiet"]
    outcome = run_cli(capsys, "train", *options, "--output", tmp_path / "run")
    assert outcome.status == 0
    for word in ("WARNING", "NOT fashion-mnist", "scikit-learn", "train-images-idx3-ubyte.gz"):
        assert word in outcome.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["dataset"] == metrics["dataset"]["name"] == "digits"
    assert "train-images-idx3-ubyte.gz" in metrics["dataset"]["fallback"]
    resumed = run_cli(capsys, "train", "--resume", tmp_path / "run", "--epochs", 2, "--quiet")
    assert resumed.status == 0
    assert "WARNING" in resumed.err


def test_a_data_set_asked_for_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_fashion(tmp_path / "elsewhere", monkeypatch)
    options = ["--data-dir", tmp_path / "none", "--dataset", "fashion-mnist", "--output", tmp_path / "run"]
    outcome = run_cli(capsys, "train", *options)
    assert outcome.status == 1
    assert outcome.error.startswith("error: expected train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, ")
    assert f"{tmp_path / 'none'}/FashionMNIST/raw" in outcome.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", *DIGITS, "--output", "{file}/run"],
            "expected to write {file}/run, got Not a directory; choose",
        ),
        (["train", "--resume", "{file}"], "expected a checkpoint in {file}/checkpoint.pt, got Not a directory; check"),
        (["train", "--resume", "{absent}"], "expected a checkpoint in {absent}/checkpoint.pt, got No such file"),
        (["train", *DIGITS, "--device", "cuda:99"], "expected a cuda:99 device on this machine, got none ("),
        (["predict", "--checkpoint", "{absent}"], "expected a checkpoint in {absent}, got No such file or directory"),
        (["predict", "--checkpoint", "{file}"], "expected a checkpoint of softmax-fused in {file}, got another file;"),
    ],
    ids=["output", "resume-file", "resume-absent", "device", "checkpoint-absent", "checkpoint-other"],
)
def test_failures_are_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"file": tmp_path / "file", "absent": tmp_path / "absent"}
    places["file"].write_text("text")
    outcome = run_cli(capsys, *(argument.format(**places) for argument in arguments))
    assert outcome.status == 1
    assert outcome.error.startswith(f"error: {message.format(**places)}")


def test_other_errors_of_the_system_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(run_module, "load_dataset", denied)
    outcome = run_cli(capsys, "train", "--dataset", "mnist")
    assert outcome.status == 1
    assert outcome.error.startswith("error: expected to read and write files, got [Errno 13] Permission denied: '/some")


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("typer", "rich") else object())
    outcome = run_cli(capsys, "train")
    assert outcome.status == 1
    assert outcome.error == "softmax-fused needs rich, typer; run: pip install 'softmax-fused[train]'"


def test_a_process_without_the_extra_says_so_too() -> None:
    hidden = "import sys; sys.modules['typer'] = None; from softmax_fused.cli import main; main(['train'])"
    command = [subprocess_arguments()[0], "-c", hidden]
    result = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "softmax-fused needs typer; run: pip install 'softmax-fused[train]'\n"


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reading end is closed; closing the stream flushes its buffer, as Python does at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        yield stream


@pytest.mark.parametrize(
    ("stream", "arguments"),
    [("stdout", ["--help"]), ("stdout", ["info"]), ("stderr", ["train", "--lr", "0"]), ("stderr", ["walk"])],
)
def test_a_command_whose_output_is_closed_ends_quietly(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unread: TextIO,
    stream: str,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, stream, unread)
    outcome = run_cli(capsys, *arguments)
    assert (outcome.status, outcome.out, outcome.err) == (141, "", "")


def test_a_run_whose_output_is_closed_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unread: TextIO
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread)
        outcome = run_cli(capsys, "train", *DIGITS, "--output", tmp_path)
    assert (outcome.status, outcome.err) == (141, "")
    assert_consistent(tmp_path, 0)
    assert run_cli(capsys, "train", "--resume", tmp_path).status == 0
    assert_consistent(tmp_path, 1)


@pytest.fixture
def signals_arrive() -> Iterator[None]:
    """Install the default handlers: a background job of a shell starts with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_arrive")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_before_a_run_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    monkeypatch.setattr(run_module, "load_dataset", lambda *_, **__: signal.raise_signal(number))
    outcome = run_cli(capsys, "train", *DIGITS)
    assert (outcome.status, outcome.error) == (status, "stopped before anything was written")


@pytest.mark.usefixtures("signals_arrive")
def test_signals_wait_for_the_end_of_a_write() -> None:
    steps = []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stop, signals_as_exception():  # noqa: PT012
        with signals_delayed():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            steps.append("written")
        steps.append("unreachable")
    assert steps == ["written"]
    assert stop.value.status == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
