"""Run folders read back: whatever of a run's record is there, so that stopped, older and other runs can be shown."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmax_fused.training.errors import LabError
from softmax_fused.training.runs.checkpoint import COMPARISON, METRICS

Curve = Sequence[float | None]  # a value an epoch; None where that epoch did not record it
Curves = dict[str, list[float | None]]

SHOWN_APART = ("config", "versions", "dataset", "device", "device_name", "losses", "per_class_accuracy")


@dataclass(frozen=True)
class Confusion:
    """Counts of (true, predicted) class, with the names of the classes."""

    classes: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class RunRecord:
    """One run folder; `record` is its JSON file."""

    name: str
    folder: Path
    record: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """Return a table of the record, empty where there is none."""
        value = self.record.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Return what a comparison measured, by the name of the loss; empty for a training run."""
        return {name: loss for name, loss in self.part("losses").items() if isinstance(loss, dict)}

    @property
    def curves(self) -> Curves:
        """Return a training run's curves: lists with a number an epoch, or None."""
        return curves_of(self.record)

    @property
    def data(self) -> dict[str, Any]:
        """Return what the record says about the data set."""
        data = {name: value for name, value in self.part("dataset").items() if value is not None}
        classes = data.get("classes")
        return data | ({"classes": ", ".join(map(str, classes))} if isinstance(classes, list) else {})

    @property
    def machine(self) -> dict[str, Any]:
        """Return the device, and versions of what was installed."""
        device = {name: self.record[name] for name in ("device", "device_name") if name in self.record}
        return device | {name: version for name, version in self.part("versions").items() if version is not None}

    @property
    def others(self) -> dict[str, Any]:
        """Return what else the record says in plain values."""
        rest = {name: value for name, value in self.record.items() if name not in (*SHOWN_APART, *self.curves)}
        return {name: value for name, value in rest.items() if _plain(value)}

    @property
    def per_class(self) -> dict[str, float]:
        """Return accuracies by class."""
        return {name: share for name, share in self.part("per_class_accuracy").items() if is_number(share)}

    @property
    def confusion(self) -> Confusion | None:
        """Return the confusion matrix, if there is one and it is square."""
        counts, classes = self.record.get("confusion_matrix"), self.part("dataset").get("classes")
        if not counts or not isinstance(counts, list) or not isinstance(classes, list) or len(counts) != len(classes):
            return None
        square = all(isinstance(row, list) and len(row) == len(counts) and all(map(is_number, row)) for row in counts)
        return Confusion([str(name) for name in classes], counts) if square else None


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read the records of run folders; folders of the same name get numbers.

    Raises:
        LabError: if one is no run of `train` or `compare`.
    """
    runs: list[RunRecord] = []
    for folder in folders:
        record = _read(folder)
        name = folder.resolve().name
        taken = sum(run.folder.resolve().name == name for run in runs)
        runs.append(RunRecord(f"{name} ({taken + 1})" if taken else name, folder, record))
    return runs


def curves_of(record: Mapping[str, Any]) -> Curves:
    """Return the lists with a finite number or None an epoch, as many as there are training losses; one has a number.

    None stands where a run went on that an older version had begun, which did not record that curve.
    """
    lists = {name: value for name, value in record.items() if isinstance(value, list) and any(map(is_number, value))}
    numbers = {name: value for name, value in lists.items() if all(one is None or is_number(one) for one in value)}
    epochs = len(lists.get("train_loss") or next(iter(numbers.values()), []))
    return {name: value for name, value in numbers.items() if len(value) == epochs}


def _read(folder: Path) -> dict[str, Any]:
    path = next((folder / name for name in (METRICS, COMPARISON) if (folder / name).is_file()), None)
    if path is None:
        got = "none" if folder.is_dir() else "no such folder" if not folder.exists() else "a file"
        raise LabError(
            f"expected {METRICS} or {COMPARISON} in {folder}, got {got}; give folders that train or compare made"
        )
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LabError(f"expected JSON in {path}, got a damaged file ({error}); leave that folder out") from error
    if not isinstance(record, dict):
        raise LabError(f"expected the record of a run in {path}, got {type(record).__name__}; leave that folder out")
    return record


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _plain(value: Any) -> bool:
    """Whether it fits into a cell."""
    if isinstance(value, list):
        return 0 < len(value) <= 20 and all(map(is_number, value))
    return isinstance(value, (bool, int, float, str))
