"""The records of runs, read back from their folders.

Runs that were stopped, and runs of older or newer versions, have incomplete records: whatever is there is shown.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmax_fused.training.errors import LabError
from softmax_fused.training.files import COMPARISON, METRICS

Metrics = dict[str, Any]  # the content of metrics.json
Curve = Sequence[float | None]  # a value for each epoch, None for one that did not record it
Curves = dict[str, list[float | None]]

SHOWN_ELSEWHERE = ("config", "versions", "dataset", "device", "device_name", "losses", "per_class_accuracy")


@dataclass(frozen=True)
class Confusion:
    """Counts of (target, predicted) class, with the names of the classes."""

    classes: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class RunRecord:
    """One run folder; `record` is the content of its JSON file."""

    name: str
    folder: Path
    record: dict[str, Any]

    def table(self, name: str) -> dict[str, Any]:
        """Return a dictionary of the record, empty where there is none of that name."""
        value = self.record.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Return what a comparison measured, by the name of the loss; empty for a training run."""
        return {name: loss for name, loss in self.table("losses").items() if isinstance(loss, dict)}

    @property
    def curves(self) -> Curves:
        """Return a training run's curves."""
        return read_curves(self.record)

    @property
    def data(self) -> dict[str, Any]:
        """Return the record's description of the data set."""
        data = {name: value for name, value in self.table("dataset").items() if value is not None}
        classes = data.get("classes")
        return data | ({"classes": ", ".join(map(str, classes))} if isinstance(classes, list) else {})

    @property
    def machine(self) -> dict[str, Any]:
        """Return the device, and the versions of what was installed."""
        device = {name: self.record[name] for name in ("device", "device_name") if name in self.record}
        return device | {name: version for name, version in self.table("versions").items() if version is not None}

    @property
    def others(self) -> dict[str, Any]:
        """Return the remaining values of the record that fit into a table cell."""
        rest = {name: value for name, value in self.record.items() if name not in (*SHOWN_ELSEWHERE, *self.curves)}
        return {name: value for name, value in rest.items() if _fits_into_cell(value)}

    @property
    def per_class(self) -> dict[str, float]:
        """Return the accuracy of each class."""
        return {name: share for name, share in self.table("per_class_accuracy").items() if is_number(share)}

    @property
    def confusion(self) -> Confusion | None:
        """Return the confusion matrix, if there is one and it is square."""
        counts, classes = self.record.get("confusion_matrix"), self.table("dataset").get("classes")
        if not counts or not isinstance(counts, list) or not isinstance(classes, list) or len(counts) != len(classes):
            return None
        square = all(isinstance(row, list) and len(row) == len(counts) and all(map(is_number, row)) for row in counts)
        return Confusion([str(name) for name in classes], counts) if square else None


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """Read the records of run folders; those with equal names are numbered.

    Raises:
        LabError: if a folder is not one of `train` or `compare`.
    """
    runs: list[RunRecord] = []
    for folder in folders:
        record = _read(folder)
        name = folder.resolve().name
        same_name = sum(run.folder.resolve().name == name for run in runs)
        runs.append(RunRecord(f"{name} ({same_name + 1})" if same_name else name, folder, record))
    return runs


def read_curves(record: Mapping[str, Any]) -> Curves:
    """Return those lists of a record that have a finite number or None for each epoch, and at least one number.

    None stands for an epoch of an older version that did not record this curve. The training loss tells the number of
    epochs.
    """
    lists = {name: value for name, value in record.items() if isinstance(value, list) and any(map(is_number, value))}
    numbers = {name: value for name, value in lists.items() if all(one is None or is_number(one) for one in value)}
    epochs = len(lists.get("train_loss") or next(iter(numbers.values()), []))
    return {name: value for name, value in numbers.items() if len(value) == epochs}


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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


def _fits_into_cell(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 20 and all(map(is_number, value))
    return isinstance(value, (bool, int, float, str))
