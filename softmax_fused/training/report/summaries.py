"""The rows and charts of the report page, from records that may lack anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softmax_fused.training.report.charts import Chart, line_chart
from softmax_fused.training.report.records import Curves, RunRecord, is_number, read_curves
from softmax_fused.training.report.sentences import DIFFERENCE, any_difference
from softmax_fused.training.wording import NO_VALUE, format_decimal, format_setting, format_value, heading

MODEL_SETTINGS = ("dataset", "model", "loss")  # shown in front of the results
OPTIMIZER_SETTINGS = ("optimizer", "lr", "batch_size")  # shown after the results


@dataclass(frozen=True)
class SummaryRow:
    """A row of the table of all runs."""

    anchor: str
    name: str
    cells: dict[str, str]


@dataclass(frozen=True)
class LossRow:
    """A row of the table of one comparison."""

    name: str
    cells: list[str]


def curves_by_loss(run: RunRecord) -> dict[str, Curves]:
    """Return the curves of each loss of a comparison; those of a training run have the empty name."""
    found = {name: read_curves(loss) for name, loss in run.losses.items()} or {"": run.curves}
    return {name: curves for name, curves in found.items() if curves}


def curves_to_draw(run: RunRecord) -> dict[str, Curves]:
    """Return a run's curves, without the differences from torch's loss where all are 0, which a sentence says."""
    found = curves_by_loss(run)
    left_out = () if any_difference(found) else (DIFFERENCE,)
    return {
        loss: {name: values for name, values in curves.items() if name not in left_out}
        for loss, curves in found.items()
    }


def run_charts(run: RunRecord) -> list[Chart]:
    """Return a chart for each quantity of a run.

    Curves whose names have the same last word, such as train_loss and test_loss, share a chart. In a comparison, the
    curves of the same name of all losses share one.
    """
    groups: dict[str, Curves] = {}
    for loss, curves in curves_to_draw(run).items():
        for name, values in curves.items():
            split, _, quantity = name.rpartition("_")
            shared = [other for other in curves if other.rpartition("_")[2] == quantity]
            if loss or len(shared) == 1:
                groups.setdefault(name, {})[loss or name] = values
            else:
                groups.setdefault(quantity, {})[split or quantity] = values
    return [line_chart(heading(group), curves) for group, curves in groups.items()]


def overlay_charts(runs: list[RunRecord]) -> list[Chart]:
    """Return a chart for each curve that several runs have."""
    found: dict[str, Curves] = {}
    owners: dict[str, set[str]] = {}
    for run in runs:
        for loss, curves in curves_to_draw(run).items():
            for name, values in curves.items():
                found.setdefault(name, {})[f"{run.name}: {loss}" if loss else run.name] = values
                owners.setdefault(name, set()).add(run.name)
    return [line_chart(heading(name), curves) for name, curves in found.items() if len(owners[name]) > 1]


def summary_rows(run: RunRecord, anchor: str) -> list[SummaryRow]:
    """Return a run's rows of the table of all runs: what was trained, the last value of each curve, and how."""
    config = run.table("config")
    model, optimizer = (
        {name: format_setting(config[name]) for name in names if config.get(name) is not None}
        for names in (MODEL_SETTINGS, OPTIMIZER_SETTINGS)
    )
    rows = []
    for loss, curves in (curves_by_loss(run) or {"": {}}).items():
        trained = model | ({"loss": loss} if loss else {})
        epochs = {"epochs": format_value(len(next(iter(curves.values()), [])))}
        finals = {name: format_value(values[-1]) for name, values in curves.items()}
        rows.append(SummaryRow(anchor, run.name, trained | epochs | finals | optimizer))
    return rows


def loss_rows(run: RunRecord) -> list[LossRow]:
    """Return final loss, accuracy, difference from torch's loss and times of each loss of a comparison."""
    rows = []
    for name, loss in run.losses.items():
        curves = read_curves(loss)
        final, accuracy = (curves.get(curve, [None])[-1] for curve in ("train_loss", "test_accuracy"))
        differences = [value for value in curves.get(DIFFERENCE, []) if value is not None]
        cells = [
            NO_VALUE if final is None else format_decimal(final, 6),
            format_value(accuracy),
            format_value(max(differences, default=None)),
            *(_format_times(loss.get(times)) for times in ("loss_us", "step_us")),
        ]
        rows.append(LossRow(name, cells))
    return rows


def _format_times(times: Any) -> str:
    """Return the median, with the 20th and the 80th percentile."""
    if not isinstance(times, Mapping) or not all(is_number(times.get(name)) for name in ("p20", "median", "p80")):
        return NO_VALUE
    return f"{times['median']:.0f} ({times['p20']:.0f} to {times['p80']:.0f})"
