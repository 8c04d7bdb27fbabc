"""Checkpoints: those of older versions can be resumed; damaged, newer and other files are reported in one line."""

import copy
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from softmax_fused import __version__
from softmax_fused.training.errors import LabError
from softmax_fused.training.predict import load_trained
from softmax_fused.training.runs import run as run_module
from softmax_fused.training.runs.checkpoint import load_checkpoint
from softmax_fused.training.runs.run import resume, train
from tests.lab import QUIET, SMALL, assert_consistent, few_digits, metrics_of, run_cli

State = dict[str, Any]
Edit = Callable[[State], object]

AGAIN = "; train again, or use a copy of it"
DAMAGED = "expected a checkpoint in {path}, got a damaged one"
OTHER = f"expected a checkpoint of softmax-fused {__version__} in {{path}}, got one of"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of one epoch; the optimizer's state is that of Adam."""
    config = replace(SMALL, model="mlp", optimizer="adam", lr=0.001, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_figures", lambda *_: None)
        return train(config, output=tmp_path_factory.mktemp("run"), data=few_digits(), reporter=QUIET)


def edited(saved: Path, folder: Path, edit: Edit) -> Path:
    """Write a changed copy of the checkpoint and return its path."""
    state = copy.deepcopy(torch.load(saved / "checkpoint.pt", weights_only=True))
    edit(state)
    torch.save(state, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_checkpoints_load_without_running_code(saved: Path) -> None:
    state = torch.load(saved / "checkpoint.pt", weights_only=True)
    assert state["config"] == metrics_of(saved)["config"]


def test_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Bomb(), tmp_path / "checkpoint.pt")
    with pytest.raises(LabError, match="got another file"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", f"a damaged one (an empty file){AGAIN}"),
        (b"no checkpoint", "another file; name a run's checkpoint.pt"),
        (b"PK\x03\x04 cut off", f"a damaged one (its end is missing){AGAIN}"),
    ],
)
def test_files_that_are_no_checkpoints_are_reported_as_such(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(LabError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value).endswith(f" in {tmp_path / 'checkpoint.pt'}, got {reason}")


@pytest.mark.parametrize("kept", [0.001, 0.2, 0.7, 0.999, -1])
def test_a_checkpoint_cut_off_anywhere_is_damaged(tmp_path: Path, saved: Path, kept: float) -> None:
    data = (saved / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: int(kept * len(data)) if kept > 0 else kept])
    with pytest.raises(LabError, match=r"got a damaged one \(its end is missing\); train again, or use a copy of it$"):
        load_checkpoint(tmp_path)


def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path, saved: Path) -> None:
    data = bytearray((saved / "checkpoint.pt").read_bytes())
    with zipfile.ZipFile(BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(LabError, match=rf"got a damaged one \(the checksum of {largest.filename} is wrong\); train"):
        load_checkpoint(tmp_path)


def in_both(name: str, value: object) -> Edit:
    """Return an edit that changes a setting in the config and in the record."""
    return lambda state: (state["config"].update({name: value}), state["metrics"]["config"].update({name: value}))


LOADED: dict[str, tuple[Edit, str]] = {
    "newer format": (
        lambda state: state.update(format=2),
        "expected a checkpoint of format 1 in {path}, got format 2, of a newer softmax-fused; upgrade softmax-fused",
    ),
    "no format": (lambda state: state.pop("format"), "expected a checkpoint of softmax-fused in {path}, got another"),
    "no weights": (lambda state: state.pop("model"), f"{DAMAGED} (no model)"),
    "unknown setting": (in_both("dropout", 0.5), f"{OTHER} another version (unknown setting 'dropout'); use that"),
    "newer version": (
        lambda state: (in_both("dropout", 0.5)(state), state["metrics"]["versions"].update({"softmax-fused": "9.0"})),
        f"{OTHER} softmax-fused 9.0 (unknown setting 'dropout'); use that version, or train again",
    ),
    "missing setting": (lambda state: state["config"].pop("lr"), f"{OTHER} another version (no setting 'lr'); use"),
    "unknown model": (in_both("model", "cnn"), f"{OTHER} another version (expected --model to be one of softmax, mlp"),
    "setting's type": (in_both("epochs", "ten"), f"{DAMAGED} (setting epochs is"),
    "another model": (
        lambda state: (in_both("model", "softmax")(state), in_both("activation", None)(state)),
        f"{DAMAGED} (weights 1.weight: of shape (256, 784), expected of shape (10,",
    ),
    "weights' type": (
        lambda state: state["model"].update({"1.bias": [0.0] * 256}),
        f"{DAMAGED} (weights 1.bias: none, expected of shape (256,) for",
    ),
    "no classes": (
        lambda state: state["metrics"]["dataset"].pop("classes"),
        f"{DAMAGED} (no description of the data set); train again",
    ),
    "uneven curves": (
        lambda state: state["metrics"]["train_loss"].append(1.0),
        f"{DAMAGED} (curves that are not one number an epoch); train again",
    ),
    "no matrix": (
        lambda state: state["metrics"].update(confusion_matrix=None),
        f"{DAMAGED} (no results of the last epoch); train again",
    ),
    "tensor in the record": (
        lambda state: state["metrics"].update(ranks=torch.ones(1)),
        f"{DAMAGED} (a record that is not plain values); train again",
    ),
}  # fmt: skip

RESUMED: dict[str, tuple[Edit, str]] = {
    "optimizer": (
        lambda state: state["optimizer"]["state"][0].pop("exp_avg"),
        f"{DAMAGED} (another optimizer's state); train again",
    ),
    "another optimizer": (
        lambda state: state["optimizer"]["param_groups"][0].pop("betas"),
        f"{DAMAGED} (another optimizer's state); train again",
    ),
    "generators": (
        lambda state: state["generators"].update(cpu=torch.zeros(3)),
        f"{DAMAGED} (no state of the random generators); train again",
    ),
}


@pytest.mark.parametrize("case", [*LOADED, *RESUMED])
def test_a_checkpoint_that_does_not_fit_is_explained_wherever_it_is_read(
    tmp_path: Path, saved: Path, case: str
) -> None:
    edit, message = (LOADED | RESUMED)[case]
    path = edited(saved, tmp_path, edit)
    readers: list[Callable[[], object]] = [lambda: resume(tmp_path, {"epochs": 2}, data=few_digits(), reporter=QUIET)]
    for read in readers + [lambda: load_trained(path, "cpu")] * (case in LOADED):
        with pytest.raises(LabError) as error:
            read()
        assert str(error.value).startswith(message.format(path=path))
        assert "\n" not in str(error.value)
    assert [child.name for child in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_another_number_of_classes_is_explained(tmp_path: Path, saved: Path) -> None:
    def lose_a_class(state: State) -> None:
        state["metrics"]["dataset"]["classes"].pop()
        state["metrics"]["confusion_matrix"] = [[0] * 9] * 9

    edited(saved, tmp_path, lose_a_class)
    with pytest.raises(LabError, match=r"weights 3.weight: of shape \(10, 256\), expected of shape \(9, 256\) for"):
        load_trained(tmp_path, "cpu")
    with pytest.raises(LabError, match=r"^expected the run's data \(classes .*'8'\]\), got classes .*'9'\]; pass the"):
        resume(tmp_path, {}, data=few_digits(), reporter=QUIET)


def test_a_checkpoint_of_version_0_1_0_can_be_resumed(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "draw_figures", lambda *_: None)

    def as_it_was(state: State) -> None:
        for name in ("activation", "logit_scale", "label_smoothing", "mixup", "one_hot"):
            del state["config"][name], state["metrics"]["config"][name]
        del state["job"], state["metrics"]["ranks"]

    edited(saved, tmp_path, as_it_was)
    assert load_trained(tmp_path, "cpu").metrics["config"]["logit_scale"] == 1
    resume(tmp_path, {"epochs": 2}, data=few_digits(), reporter=QUIET)
    assert_consistent(tmp_path, 2)


def test_the_commands_report_a_checkpoint_that_does_not_fit_in_one_line(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(saved, tmp_path, in_both("dropout", 0.5))
    for arguments in (["train", "--resume", tmp_path], ["predict", "--checkpoint", tmp_path]):
        outcome = run_cli(capsys, *arguments)
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.error.endswith("(unknown setting 'dropout'); use that version, or train again")
