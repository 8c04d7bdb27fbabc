"""The command `data`: a data set described, drawn, and read by several loaders."""

import io
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from softmax_fused.training.data import loading
from softmax_fused.training.data.datasets import Split, to_input
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.report.samples import GAP, SAMPLES, pixel_moments, plot_samples
from tests.lab import digits, fake_fashion, few_digits, run_cli, subprocess_arguments, subprocess_environment


@pytest.mark.pictures
def test_the_description_counts_images_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "data", "--dataset", "digits", "--output", tmp_path / "own.png")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "data set  digits, from scikit-learn"
    assert lines[1] == "images    1,437 to train, 360 to test"
    assert lines[4].split() == ["class", "train", "test"]
    counts = [[int(count) for count in line.split()[1:]] for line in lines[5:15]]
    assert np.array(counts).sum(axis=0).tolist() == [1437, 360]
    assert lines[15] == str(tmp_path / "own.png")
    assert [path.name for path in tmp_path.iterdir()] == ["own.png"]
    with Image.open(tmp_path / "own.png") as picture:
        assert min(picture.size) > 1000


def test_pixel_moments_are_those_of_the_pixels() -> None:
    pixels = digits().train.images.double() / 255
    expected = pixels.mean().item(), pixels.std(correction=0).item()
    assert pixel_moments(digits().train) == pytest.approx(expected)


def test_each_class_has_its_row_and_may_have_few_images() -> None:
    labels = torch.tensor([1, 0, 1])
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28) * 10
    figure = plot_samples("title", Split(images, labels), ("zero", "one", "none"))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["zero", "one", "none"]
    sheet = axes.images[0].get_array()
    side = 28 + GAP
    corners = sheet[::side, ::side]
    assert corners.shape == (3, SAMPLES)
    assert corners[:, :3].tolist() == [[10, 255, 255], [0, 20, 255], [255, 255, 255]]


def test_other_data_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_fashion(tmp_path / "elsewhere", monkeypatch)
    options = ["--data-dir", tmp_path / "none", "--output", tmp_path / "data.png"]
    outcome = run_cli(capsys, "data", *options)
    assert outcome.status == 0
    assert "NOT fashion-mnist" in outcome.err
    assert outcome.out.startswith("data set  digits")
    outcome = run_cli(capsys, "data", *options, "--dataset", "fashion-mnist")
    assert outcome.status == 1
    assert outcome.error.startswith("error: expected train-images-idx3-ubyte.gz")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dataset", "cifar"], 2, "expected --dataset to be one of fashion-mnist, mnist, digits, fashion-pair, "),
        (["--dataset", "linear"], 2, "--dataset must name a data set of images; got 'linear', which has none"),
        (["--batch-size", "0"], 2, "expected --batch-size to be from 1 to 2147483647, got 0; choose a value in that"),
        (["--dataset", "digits", "--output", "/nowhere/a.png"], 1, "expected to write /nowhere/a.png, got No such"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    outcome = run_cli(capsys, "data", *arguments)
    assert outcome.status == status
    assert outcome.error.startswith(f"error: {message}")


def test_every_loader_reads_every_image_once_and_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "WORKERS", (0, 2))
    split = few_digits().train
    truth = sorted(zip(to_input(split.images).sum(dim=(1, 2)).tolist(), split.labels.tolist(), strict=True))
    names = []
    for name, batches in loading.loaders(split, 64):
        names.append(name)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        sums = images.reshape(-1, 28, 28).sum(dim=(1, 2))
        assert sorted(zip(sums.tolist(), labels.tolist(), strict=True)) == truth
    assert names == ["DataLoader, 0 workers", "DataLoader, 2 workers", "tensor in memory"]


def test_times_are_printed_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "WORKERS", (0, 1))
    outcome = run_cli(capsys, "data", "--time", "--dataset", "digits", "--output", tmp_path / "data.png")
    assert (outcome.status, outcome.err) == (0, "")
    *_, path, first, second, third = outcome.out.splitlines()
    assert path == str(tmp_path / "data.png")
    for line, name in ((first, "DataLoader, 0 workers"), (second, "DataLoader, 1 worker"), (third, "tensor in memory")):
        assert line.startswith(name)
        assert line.endswith(" images/s")


def test_more_workers_than_cores_cause_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    batches = loading.start_workers(loading.textbook_loader(few_digits().train, 300, workers=2))
    assert sum(len(labels) for _, labels in batches) == 300


def test_a_terminal_shows_a_progress_bar() -> None:
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=70, _environ={"TERM": "xterm"})
    assert list(reporter.track([1, 2, 3], 3, "three")) == [1, 2, 3]
    assert all(text in reporter.console.file.getvalue() for text in ("three", "1/3", "2/3", "3/3"))


def test_ctrl_c_between_two_loaders_prints_one_line(tmp_path: Path) -> None:
    """The signal also reaches workers that are starting, as it does from a terminal."""
    command = subprocess_arguments("data", "--time", "--dataset", "digits", "--output", tmp_path / "data.png")
    process = subprocess.Popen(
        command,
        env=subprocess_environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # pytest may have been started with SIGINT ignored
    )
    for line in process.stdout:
        if line.startswith("DataLoader, 1 worker"):
            os.killpg(process.pid, signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"stopped; {tmp_path / 'data.png'} is written, 2 of 5 ways timed\n"
