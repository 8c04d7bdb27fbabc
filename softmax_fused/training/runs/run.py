"""One run: data, learner and run folder brought together, epoch after epoch."""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from softmax_fused.training.config import MACHINE, TrainConfig, check_changes
from softmax_fused.training.data.batches import Batches, make_batches
from softmax_fused.training.data.datasets import ImageData, data_root, load_dataset
from softmax_fused.training.data.targets import SoftBatches
from softmax_fused.training.errors import LabError, Stopped, WriteError
from softmax_fused.training.models.evaluation import curve_names, evaluate
from softmax_fused.training.models.learner import Learner, learner_for
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.models.parallel import check_parallel, parallel_learner
from softmax_fused.training.ranks.group import ALONE, Ranks, describe_lost_rank, is_lost_rank
from softmax_fused.training.ranks.shards import Shares
from softmax_fused.training.report.console import Reporter, describe, describe_parameters
from softmax_fused.training.report.events import EventWriter, event_writer
from softmax_fused.training.report.figures import draw_figures
from softmax_fused.training.runs.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    begun_folder,
    claimed_folder,
    load_checkpoint,
    new_folder,
    remove_figures,
    save_run,
)
from softmax_fused.training.runs.record import Metrics, add_results, continued_metrics, default_folder, new_metrics
from softmax_fused.training.runs.restore import restore_config, restore_metrics, restore_model, restore_training
from softmax_fused.training.signals import signals_held
from softmax_fused.training.wording import plural


@dataclass
class Run:
    """A run between two epochs; `metrics` is what metrics.json holds. Of several ranks the first writes."""

    folder: Path
    config: TrainConfig
    data: ImageData
    learner: Learner
    metrics: Metrics
    ranks: Ranks = ALONE

    @property
    def epochs_done(self) -> int:
        """Return the number of epochs whose results are in `metrics`."""
        return len(self.metrics["train_loss"])

    def save(self, events: EventWriter | None = None) -> None:
        """Write checkpoint.pt and metrics.json, and the last epoch's events; all ranks wait for them."""
        self.ranks.from_first(lambda: self._write(events))

    def _write(self, events: EventWriter | None) -> None:
        state = {
            "job": self.ranks.job,
            "config": self.config.as_dict(),
            "metrics": self.metrics,
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "generators": _generators(self.learner.device),
        }
        save_run(self.folder, state)
        if events:
            events.add_epoch(self.metrics)


def train(
    config: TrainConfig,
    *,
    output: Path | None = None,
    data: ImageData | None = None,
    fallback: bool = False,
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Train from the beginning, or from where torchrun's job was when it started its ranks again.

    Args:
        config: What to train.
        output: The run folder; by default a new one under ``runs``.
        data: Data to use instead of the data set that `config` names.
        fallback: Whether scikit-learn's digits may stand in for a data set that cannot be had.
        reporter: Where progress goes.
        ranks: The processes that train together, connected.

    Returns:
        The run folder.
    """
    reporter = reporter or Reporter(mute=ranks.rank > 0)
    check_parallel(config.model, ranks)
    device = ranks.pick_device(config.device)
    load, asked = partial(load_dataset, config.dataset, data_root(config.data_dir), fallback=fallback), config.dataset
    data = data or ranks.by_turns(load)
    if data.fallback:
        config = replace(config, dataset=data.name)
    label = f"{config.dataset}-{config.model}-{config.loss}" + f"-{ranks.job}" * (ranks.job is not None)
    begun = ranks.from_first(lambda: begun_folder(output, label, ranks.job))
    if begun:
        reporter.line(f"torchrun started the ranks again; {begun} goes on")
        return resume(begun, config.as_dict(), data=data, reporter=reporter, ranks=ranks)
    if data.fallback:
        reporter.fallback(asked, data)
    _check_same(config, data, ranks)
    torch.manual_seed(config.seed)
    learner = learner_for(config, len(data.classes), device)
    with ExitStack() as claim:  # of the first rank: the others write nothing
        folder = ranks.from_first(lambda: claim.enter_context(new_folder(output or default_folder(label))))
        run = Run(folder, config, data.to(device), learner, new_metrics(config, data, device, ranks), ranks)
        with _saying_how_to_resume(run):
            run.save()  # so that a run stopped in its first epoch can be resumed too
            _finish(run, reporter)
    return folder


def resume(
    folder: Path,
    changes: dict[str, Any],
    *,
    data: ImageData | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Continue a run; it ends with the same weights as one that never stopped.

    Args:
        folder: The run folder.
        changes: Settings by name; `check_changes` says which may differ from the run's.
        data: Data to use instead of the data set that the run names.
        reporter: Where progress goes.
        ranks: The processes that train together, connected; there may be more or fewer than before.

    Returns:
        The run folder.
    """
    with ExitStack() as claim:  # of the first rank, before it reads what another process may be writing
        state = ranks.from_first(lambda: _claim_and_load(claim, folder))
        return _resume(folder, state, changes, data, reporter or Reporter(mute=ranks.rank > 0), ranks)


def _claim_and_load(claim: ExitStack, folder: Path) -> Checkpoint:
    if (folder / CHECKPOINT).exists():
        claim.enter_context(claimed_folder(folder))
    return load_checkpoint(folder / CHECKPOINT)


def _resume(
    folder: Path,
    state: Checkpoint,
    changes: dict[str, Any],
    data: ImageData | None,
    reporter: Reporter,
    ranks: Ranks,
) -> Path:
    path = folder / CHECKPOINT
    began = restore_config(path, state)
    metrics: Metrics = restore_metrics(path, state, began)
    config = check_changes(began, changes, epochs_done=len(metrics["train_loss"]))
    check_parallel(config.model, ranks)
    device = ranks.pick_device(config.device)
    load = partial(load_dataset, config.dataset, data_root(config.data_dir))
    data = _same_data(metrics, data or ranks.by_turns(load))
    _check_same(config, data, ranks)
    if data.fallback:
        reporter.fallback("the data set asked for", data)
    learner = learner_for(config, len(data.classes), device)
    metrics = continued_metrics(metrics, config, data, device, ranks)
    run = Run(folder, config, data.to(device), learner, metrics, ranks)
    restore_model(path, learner, state)
    restore_training(path, learner, state)
    with _saying_how_to_resume(run):
        ranks.from_first(lambda: remove_figures(folder))
        run.save()  # metrics.json may be one epoch behind the checkpoint
        _finish(run, reporter)
    return folder


def _finish(run: Run, reporter: Reporter) -> None:
    """Train the epochs that are left, draw the pictures, say where everything is."""
    config = run.config
    batches = _batches(run)
    run.learner = parallel_learner(run.learner, run.ranks)
    with event_writer(run.folder, run.metrics) if run.ranks.rank == 0 else nullcontext() as events:
        for number in range(run.epochs_done + 1, config.epochs + 1):
            with reporter.epoch(number, config.epochs) as report:
                results, last = _epoch(run, report.track(batches.epoch(number), len(batches)))
                report.finish(describe(results, len(run.data.train)))
            with signals_held():
                add_results(run.metrics, results, last)
                run.save(events)
            reporter.large_loss(run.metrics["train_loss"], run.learner.advice)
    if not run.data.classes:
        reporter.line(describe_parameters(run.metrics["parameters"]))
    run.ranks.from_first(lambda: draw_figures(run.folder, run.metrics, run.data.test, run.learner))
    reporter.result(str(run.folder))


def _batches(run: Run) -> Batches:
    """Return the batches that the settings describe; labels are indices where nothing asks for probabilities.

    To mix images a rank reads whole batches: those of other ranks are among them.
    """
    config = run.config
    read, mix = (ALONE, run.ranks) if config.mixup else (run.ranks, ALONE)
    batches = make_batches(run.data.train, config.batch_size, config.seed, run.learner.device, config.workers, read)
    if config.one_hot or config.mixup:
        return SoftBatches(batches, len(run.data.classes), config.mixup, config.seed, mix)
    return batches


def _epoch(run: Run, batches: Any) -> tuple[dict[str, float], Metrics]:
    """Train one epoch and look at the test set; the seconds are those of both."""
    start = perf_counter()
    shares = Shares(run.ranks, len(run.data.train), run.config.batch_size) if run.ranks.size > 1 else None
    loss, accuracy = train_epoch(run.learner, batches, shares)
    scores, last = evaluate(run.learner, run.data, run.ranks)
    seconds = perf_counter() - start
    values = {"train_loss": loss, "train_accuracy": accuracy, **scores, "epoch_seconds": seconds}
    return {name: values[name] for name in curve_names(run.data)}, last


def _same_data(metrics: Metrics, data: ImageData) -> ImageData:
    then, now = metrics["dataset"], data.describe()
    for key in ("name", "train_images", "test_images", "classes"):
        if then[key] != now[key]:
            raise LabError(f"expected the run's data ({key} {then[key]}), got {key} {now[key]}; pass the same data")
    return replace(data, fallback=then["fallback"])


def _check_same(config: TrainConfig, data: ImageData, ranks: Ranks) -> None:
    """Raise `LabError` if ranks, on several machines perhaps, would not train the same model on the same data."""
    ranks.check_same("settings", {name: value for name, value in config.as_dict().items() if name not in MACHINE})
    ranks.check_same("data", {name: value for name, value in data.describe().items() if name != "source"})


def _generators(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators; models of this lab do not draw from them, others may."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@contextmanager
def _saying_how_to_resume(run: Run) -> Iterator[None]:
    command = f"{run.ranks.program} train --resume {shlex.quote(str(run.folder))}"

    def kept() -> str:
        done, epochs = run.epochs_done, run.config.epochs
        return f"{run.folder} keeps {done} of {epochs} {plural('epoch', epochs)}; resume with: {command}"

    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        raise Stopped(f"stopped; {kept()}", getattr(stop, "status", 130)) from None
    except WriteError as error:
        if not (run.folder / CHECKPOINT).exists():
            raise
        raise LabError(f"{error}, then resume with: {command}") from error
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise LabError(f"{describe_lost_rank(error)}; {kept()}") from error
