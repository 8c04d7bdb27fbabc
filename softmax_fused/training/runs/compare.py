"""Losses trained side by side: from the same weights, on the same batches, with interleaved timing."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from softmax_fused._dispatch import is_small
from softmax_fused.training.config import TrainConfig, learner_for
from softmax_fused.training.data.batches import Batch, Batches, make_batches
from softmax_fused.training.data.datasets import ImageData, data_root, load_dataset
from softmax_fused.training.errors import AllRanksError, UsageError
from softmax_fused.training.files import COMPARISON, write_atomically, write_json
from softmax_fused.training.models.evaluation import predict_classes
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.loop import check_weights, mean_loss
from softmax_fused.training.models.losses import LOSSES, NATS
from softmax_fused.training.ranks.devices import pick_device
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.report.figures import run_title
from softmax_fused.training.report.plots import plot_comparison, to_png
from softmax_fused.training.report.sentences import REFERENCE_LOSS, describe_accuracies, describe_identical
from softmax_fused.training.runs.folder import default_folder, new_folder
from softmax_fused.training.runs.record import run_environment
from softmax_fused.training.wording import format_decimal

WARM_UP = 10  # steps whose times do not count


@dataclass
class Contender:
    """A loss with a model of its own, and what was measured."""

    learner: Learner
    step_losses: list[Tensor] = field(default_factory=list)  # one tensor for each epoch
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def compare(
    losses: list[str],
    config: TrainConfig,
    *,
    output: Path | None = None,
    data: ImageData | None = None,
    fallback: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Train one model with each loss, all on one batch before the next.

    Args:
        losses: Names in `LOSSES`.
        config: Everything else; its own loss is not used.
        output: Folder for compare.json and compare.png; by default a new one under ``runs``.
        data: Data to use instead of the data set that `config` names.
        fallback: Whether scikit-learn's digits may replace a data set that is absent and cannot be downloaded.
        reporter: Where progress goes.

    Returns:
        The folder.

    Raises:
        UsageError: if the data set has no classes.
    """
    reporter = reporter or Reporter()
    device = pick_device(config.device)
    data = data or load_dataset(config.dataset, data_root(config.data_dir), fallback=fallback)
    if data.fallback:
        reporter.announce_fallback(config.dataset, data)
        config = replace(config, dataset=data.name)
    if not data.classes:
        raise UsageError(
            f"expected a data set of classes to compare losses on, got {data.name}; use softmax-fused train"
        )
    with new_folder(output or default_folder(f"compare-{config.dataset}-{config.model}")) as folder:
        data = data.to(device)
        contenders = {
            name: Contender(learner_for(replace(config, loss=name), len(data.classes), device)) for name in losses
        }
        batches = make_batches(data.train, config.batch_size, config.seed, device, config.workers)
        _train(contenders, data, batches, config.epochs, reporter)
        record = {**run_environment(config, device), "dataset": data.describe(), "losses": _results(contenders)}
        del record["config"]["loss"]
        _write(folder, record, reporter)
    return folder


def _train(
    contenders: dict[str, Contender], data: ImageData, batches: Batches, epochs: int, reporter: Reporter
) -> None:
    for number in range(1, epochs + 1):
        with reporter.epoch(number, epochs) as bar:
            _epoch(contenders, data, bar.track(batches.epoch(number), len(batches)))
            losses = {name: contender.train_loss for name, contender in contenders.items()}
            bar.finish("  ".join(f"{name} {format_decimal(values[-1], 6)}" for name, values in losses.items()))
        for name, values in losses.items():
            reporter.warn_if_diverged(values, contenders[name].learner.advice, name)


def _write(folder: Path, record: dict[str, Any], reporter: Reporter) -> None:
    """Write compare.json and compare.png, and print what they show."""
    losses = record["losses"]
    record["shows"] = describe_accuracies({name: loss["test_accuracy"] for name, loss in losses.items()})
    small = explain_small_batches(losses, record["config"]["batch_size"], len(record["dataset"]["classes"]))
    lines = list(
        filter(None, [record["shows"], describe_identical(losses), small if record["device"] == "cpu" else ""])
    )
    title = "\n".join([f"{run_title(record)}, {record['device_name']}", *lines])
    write_json(folder / COMPARISON, record)
    write_atomically(folder / "compare.png", to_png(plot_comparison(title, losses)))
    reporter.compared(losses)
    for line in reversed(lines):
        reporter.line(line)
    reporter.result(str(folder))


def explain_small_batches(losses: Collection[str], batch_size: int, classes: int) -> str:
    """Return why `fused` is not faster than `torch` on the CPU; empty where batches are large, and without both."""
    if not {"fused", REFERENCE_LOSS} <= set(losses) or not is_small(
        torch.empty(batch_size, classes, requires_grad=True)
    ):
        return ""
    return (
        f"fused is not faster than torch here: on the CPU {batch_size} x {classes} logits go to torch's own operator, "
        "after a few microseconds of Python"
    )


def _epoch(contenders: dict[str, Contender], data: ImageData, batches: Iterable[Batch]) -> None:
    """Train every contender on each batch before the next batch. Another contender is the first at each step."""
    names = list(contenders)
    losses: dict[str, list[Tensor]] = {name: [] for name in names}
    sizes = []
    for contender in contenders.values():
        contender.learner.model.train()
    for step, (images, labels) in enumerate(batches):
        sizes.append(len(labels))
        first = step % len(names)
        for name in names[first:] + names[:first]:
            losses[name].append(_step(contenders[name], images, labels))
    for name, contender in contenders.items():
        contender.step_losses.append(torch.stack(losses[name]).cpu().double())
        try:
            contender.train_loss.append(mean_loss(losses[name], sizes, contender.learner.advice))
            check_weights(contender.learner)
        except AllRanksError as error:
            raise AllRanksError(f"{name}: {error}") from error
        right = predict_classes(contender.learner, data.test) == data.test.labels
        contender.test_accuracy.append(int(right.sum()) / len(right))


def _step(contender: Contender, images: Tensor, labels: Tensor) -> Tensor:
    """Take one step. The loss gets detached logits, so that its backward is timed apart from the model's."""
    learner = contender.learner
    start = _now(learner.device)
    logits = learner.logits(images)
    detached = logits.detach().requires_grad_()
    before = _now(learner.device)
    loss = learner.loss(detached, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    after = _now(learner.device)
    learner.optimizer.zero_grad()
    logits.backward(detached.grad)  # type: ignore[no-untyped-call]
    learner.optimizer.step()
    contender.step_seconds.append(_now(learner.device) - start)
    contender.loss_seconds.append(after - before)
    return loss.detach()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _results(contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    """Return what compare.json says about each loss."""
    reference = contenders.get(REFERENCE_LOSS)
    return {
        name: {
            "unit": LOSSES[name].unit,
            "train_loss": contender.train_loss,
            "test_accuracy": contender.test_accuracy,
            "largest_difference": largest_differences(contender, reference) if LOSSES[name].unit == NATS else None,
            "loss_us": microseconds(contender.loss_seconds),
            "step_us": microseconds(contender.step_seconds),
        }
        for name, contender in contenders.items()
    }


def largest_differences(contender: Contender, reference: Contender | None) -> list[float] | None:
    """Return, for each epoch, the largest difference of a step's loss from torch's; None without torch's loss."""
    if reference is None:
        return None
    pairs = zip(contender.step_losses, reference.step_losses, strict=True)
    return [float((ours - theirs).abs().max()) for ours, theirs in pairs]


def microseconds(seconds: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile, without the first steps."""
    times = torch.tensor(seconds[WARM_UP:] or seconds, dtype=torch.float64) * 1e6
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"p20": p20, "median": median, "p80": p80}
