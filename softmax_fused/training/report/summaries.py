"""What a report says about runs in its tables and charts: strings and curves, whatever a record lacks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softmax_fused.training.models.losses import as_decimal
from softmax_fused.training.report.charts import Chart, line_chart
from softmax_fused.training.report.comparison import DIFFERENCE, differ
from softmax_fused.training.report.records import Curves, RunRecord, curves_of, is_number

WHAT = ("dataset", "model", "loss")
HOW = ("optimizer", "lr", "batch_size")
NAMES = {"lr": "learning rate"}
ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class Row:
    """A row of the table of all runs."""

    anchor: str
    name: str
    cells: dict[str, str]


@dataclass(frozen=True)
class LossRow:
    """A row of a comparison's table."""

    name: str
    cells: list[str]


def series(run: RunRecord) -> dict[str, Curves]:
    """Return a run's curves by contender: one nameless for a training run, the losses of a comparison."""
    found = {name: curves_of(loss) for name, loss in run.losses.items()} or {"": run.curves}
    return {name: curves for name, curves in found.items() if curves}


def plotted(run: RunRecord) -> dict[str, Curves]:
    """Return a run's curves, without the differences from torch's loss where there are none: a sentence says so."""
    found = series(run)
    left_out = () if differ(found) else (DIFFERENCE,)
    return {
        contender: {name: values for name, values in curves.items() if name not in left_out}
        for contender, curves in found.items()
    }


def grouped(contenders: Mapping[str, Curves]) -> dict[str, Curves]:
    """Return curves by what they measure: a run's losses share a chart, its accuracies, a comparison's contenders."""
    groups: dict[str, Curves] = {}
    for contender, curves in contenders.items():
        for name, values in curves.items():
            kin = [other for other in curves if other.rpartition("_")[2] == name.rpartition("_")[2]]
            if contender or len(kin) == 1:
                groups.setdefault(name, {})[contender or name] = values
            else:
                of, _, group = name.rpartition("_")
                groups.setdefault(group, {})[of or group] = values
    return groups


def overlays(runs: list[RunRecord]) -> list[Chart]:
    """Return a chart for each curve that several runs have."""
    found: dict[str, Curves] = {}
    owners: dict[str, set[str]] = {}
    for run in runs:
        for contender, curves in plotted(run).items():
            for name, values in curves.items():
                found.setdefault(name, {})[f"{run.name}: {contender}" if contender else run.name] = values
                owners.setdefault(name, set()).add(run.name)
    return [line_chart(as_words(name), curves) for name, curves in found.items() if len(owners[name]) > 1]


def summary_rows(run: RunRecord, anchor: str) -> list[Row]:
    """Return a run's rows of the first table: what was trained, each curve's last value, and how."""
    config = run.part("config")
    what, how = (
        {name: as_setting(config[name]) for name in names if config.get(name) is not None} for names in (WHAT, HOW)
    )
    rows = []
    for contender, curves in (series(run) or {"": {}}).items():
        trained = what | ({"loss": contender} if contender else {})
        epochs = {"epochs": as_number(len(next(iter(curves.values()), [])))}
        finals = {name: last(curves, name) for name, values in curves.items()}
        rows.append(Row(anchor, run.name, trained | epochs | finals | how))
    return rows


def loss_rows(run: RunRecord) -> list[LossRow]:
    """Return final loss, accuracy, distance from torch's loss and times of each loss of a comparison."""
    rows = []
    for name, loss in run.losses.items():
        curves = curves_of(loss)
        distances = [value for value in curves.get(DIFFERENCE, []) if value is not None]
        distance = as_number(max(distances)) if distances else ABSENT
        losses = curves.get("train_loss") or [None]
        final = ABSENT if losses[-1] is None else as_decimal(losses[-1], 6)
        numbers = [final, last(curves, "test_accuracy"), distance]
        rows.append(LossRow(name, [*numbers, _spread(loss.get("loss_us")), _spread(loss.get("step_us"))]))
    return rows


def last(curves: Curves, name: str, digits: int | None = None) -> str:
    """Return a curve's last value as a cell shows it, with a fixed number of decimals if `digits` says so."""
    value = curves[name][-1] if name in curves else None
    return as_number(value) if value is None or digits is None else f"{value:.{digits}f}"


def _spread(times: Any) -> str:
    if not isinstance(times, dict) or not all(is_number(times.get(name)) for name in ("p20", "median", "p80")):
        return ABSENT
    return f"{times['median']:.0f} ({times['p20']:.0f} to {times['p80']:.0f})"


def as_setting(value: Any) -> str:
    """Return a setting as it was given."""
    return f"{value:g}" if isinstance(value, float) else as_number(value)


def as_words(name: str) -> str:
    """Return a key as a heading."""
    words = NAMES.get(name, name).replace("_", " ").replace("-", " ")
    return words[:1].upper() + words[1:]


def as_number(value: Any) -> str:
    """Return any value as a cell shows it."""
    if isinstance(value, list):
        return ", ".join(map(as_number, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return ABSENT if value is None else str(value)
    if isinstance(value, int) or value == 0:
        return f"{int(value):,}"
    plain = 1e-3 <= abs(value) < 1e5
    return f"{value:.4f}" if plain else f"{value:.2e}"
