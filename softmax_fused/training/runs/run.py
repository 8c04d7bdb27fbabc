"""A training run: data, learner and run folder, epoch after epoch."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from softmax_fused.training.config import MACHINE_SETTINGS, TrainConfig, check_changes, check_ranks, learner_for
from softmax_fused.training.data.batches import Batch, Batches, SoftLabelBatches, make_batches
from softmax_fused.training.data.datasets import ImageData, data_root, load_dataset
from softmax_fused.training.errors import LabError, Stopped, WriteError
from softmax_fused.training.files import CHECKPOINT
from softmax_fused.training.models.evaluation import curve_names, evaluate
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.loop import train_epoch
from softmax_fused.training.ranks.group import SINGLE_PROCESS, Ranks, describe_lost_rank, is_lost_rank
from softmax_fused.training.ranks.shards import EpochShards
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.report.events import EventWriter, event_writer
from softmax_fused.training.report.figures import draw_figures
from softmax_fused.training.report.records import Metrics
from softmax_fused.training.report.sentences import describe_epoch, describe_parameters
from softmax_fused.training.runs.checkpoint import Checkpoint, load_checkpoint, save_run
from softmax_fused.training.runs.folder import (
    default_folder,
    find_job_folder,
    locked_folder,
    new_folder,
    remove_figures,
)
from softmax_fused.training.runs.record import add_results, new_metrics, resumed_metrics
from softmax_fused.training.runs.restore import (
    generator_states,
    restore_config,
    restore_metrics,
    restore_model,
    restore_training,
)
from softmax_fused.training.signals import signals_delayed
from softmax_fused.training.wording import plural


@dataclass
class Run:
    """A run between two epochs; `metrics` is the content of metrics.json. Of several ranks, rank 0 writes."""

    folder: Path
    config: TrainConfig
    data: ImageData
    learner: Learner
    metrics: Metrics
    ranks: Ranks = SINGLE_PROCESS

    @property
    def epochs_done(self) -> int:
        """Return the number of epochs whose results are in `metrics`."""
        return len(self.metrics["train_loss"])

    def save(self, events: EventWriter | None = None) -> None:
        """Write checkpoint.pt, metrics.json and the last epoch's events; all ranks wait until they are written."""
        self.ranks.call_on_first(lambda: self._write(events))

    def _write(self, events: EventWriter | None) -> None:
        state = {
            "job": self.ranks.job,
            "config": self.config.as_dict(),
            "metrics": self.metrics,
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "generators": generator_states(self.learner.device),
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
    ranks: Ranks = SINGLE_PROCESS,
) -> Path:
    """Train from the beginning, or resume the run that the same torchrun job began before it restarted its ranks.

    Args:
        config: What to train.
        output: The run folder; by default a new one under ``runs``.
        data: Data to use instead of the data set that `config` names.
        fallback: Whether scikit-learn's digits may replace a data set that is absent and cannot be downloaded.
        reporter: Where progress goes.
        ranks: The processes that train together, connected.

    Returns:
        The run folder.
    """
    reporter = reporter or Reporter(mute=ranks.rank > 0)
    check_ranks(config.model, ranks)
    device = ranks.pick_device(config.device)
    wanted, load = config.dataset, partial(load_dataset, config.dataset, data_root(config.data_dir), fallback=fallback)
    data = data or ranks.call_local_first(load)
    if data.fallback:
        config = replace(config, dataset=data.name)
    label = f"{config.dataset}-{config.model}-{config.loss}" + f"-{ranks.job}" * (ranks.job is not None)
    begun = ranks.call_on_first(lambda: find_job_folder(output, label, ranks.job))
    if begun:
        reporter.line(f"torchrun started the ranks again; {begun} goes on")
        return resume(begun, config.as_dict(), data=data, reporter=reporter, ranks=ranks)
    if data.fallback:
        reporter.announce_fallback(wanted, data)
    _check_equal_on_ranks(config, data, ranks)
    torch.manual_seed(config.seed)
    learner = learner_for(config, len(data.classes), device)
    with ExitStack() as lock:  # held by rank 0, which alone writes
        folder = ranks.call_on_first(lambda: lock.enter_context(new_folder(output or default_folder(label))))
        run = Run(folder, config, data.to(device), learner, new_metrics(config, data, device, ranks), ranks)
        with _stop_explained(run):
            run.save()  # a run that is stopped in its first epoch can be resumed too
            _finish(run, reporter)
    return folder


def resume(
    folder: Path,
    changes: dict[str, Any],
    *,
    data: ImageData | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Path:
    """Continue a run. It ends with the same weights as a run that was never stopped.

    Args:
        folder: The run folder.
        changes: Settings by name; see `check_changes` for those that may differ from the run's.
        data: Data to use instead of the data set that the run names.
        reporter: Where progress goes.
        ranks: The processes that train together, connected; there may be more or fewer than before.

    Returns:
        The run folder.
    """
    reporter = reporter or Reporter(mute=ranks.rank > 0)
    with ExitStack() as lock:  # held by rank 0, from before it reads: another process may still be writing
        state = ranks.call_on_first(lambda: _lock_and_load(lock, folder))
        _resume(folder, state, changes, data, reporter, ranks)
    return folder


def _lock_and_load(lock: ExitStack, folder: Path) -> Checkpoint:
    if (folder / CHECKPOINT).exists():
        lock.enter_context(locked_folder(folder))
    return load_checkpoint(folder / CHECKPOINT)


def _resume(
    folder: Path,
    state: Checkpoint,
    changes: dict[str, Any],
    data: ImageData | None,
    reporter: Reporter,
    ranks: Ranks,
) -> None:
    path = folder / CHECKPOINT
    begun = restore_config(path, state)
    metrics = restore_metrics(path, state, begun)
    config = check_changes(begun, changes, epochs_done=len(metrics["train_loss"]))
    check_ranks(config.model, ranks)
    device = ranks.pick_device(config.device)
    load = partial(load_dataset, config.dataset, data_root(config.data_dir))
    data = _check_same_data(metrics, data or ranks.call_local_first(load))
    _check_equal_on_ranks(config, data, ranks)
    if data.fallback:
        reporter.announce_fallback("the data set asked for", data)
    learner = learner_for(config, len(data.classes), device)
    metrics = resumed_metrics(metrics, config, data, device, ranks)
    run = Run(folder, config, data.to(device), learner, metrics, ranks)
    restore_model(path, learner, state)
    restore_training(path, learner, state)
    with _stop_explained(run):
        ranks.call_on_first(lambda: remove_figures(folder))
        run.save()  # metrics.json may be one epoch behind the checkpoint
        _finish(run, reporter)


def _finish(run: Run, reporter: Reporter) -> None:
    """Train the remaining epochs, draw the figures, print where everything is."""
    config = run.config
    batches = _batches(run)
    run.learner = run.learner.on_ranks(run.ranks)
    with event_writer(run.folder, run.metrics) if run.ranks.rank == 0 else nullcontext() as events:
        for number in range(run.epochs_done + 1, config.epochs + 1):
            with reporter.epoch(number, config.epochs) as bar:
                results, last_epoch = _epoch(run, bar.track(batches.epoch(number), len(batches)))
                bar.finish(describe_epoch(results, len(run.data.train)))
            with signals_delayed():
                add_results(run.metrics, results, last_epoch)
                run.save(events)
            reporter.warn_if_diverged(run.metrics["train_loss"], run.learner.advice)
    if not run.data.classes:
        reporter.line(describe_parameters(run.metrics["parameters"]))
    run.ranks.call_on_first(lambda: draw_figures(run.folder, run.metrics, run.data.test, run.learner))
    reporter.result(str(run.folder))


def _batches(run: Run) -> Batches:
    """Return the batches that the settings describe.

    With mixup every rank reads whole batches and takes its shard after mixing; else it reads shards.
    """
    config = run.config
    reading, mixing = (SINGLE_PROCESS, run.ranks) if config.mixup else (run.ranks, SINGLE_PROCESS)
    batches = make_batches(run.data.train, config.batch_size, config.seed, run.learner.device, config.workers, reading)
    if config.one_hot or config.mixup:
        return SoftLabelBatches(batches, len(run.data.classes), config.mixup, config.seed, mixing)
    return batches


def _epoch(run: Run, batches: Iterable[Batch]) -> tuple[dict[str, float], Metrics]:
    """Train one epoch and evaluate the test set; return what `add_results` takes. Seconds include both."""
    start = perf_counter()
    shards = EpochShards(run.ranks, len(run.data.train), run.config.batch_size) if run.ranks.size > 1 else None
    loss, accuracy = train_epoch(run.learner, batches, shards)
    scores, last_epoch = evaluate(run.learner, run.data, run.ranks)
    seconds = perf_counter() - start
    results = {"train_loss": loss, "train_accuracy": accuracy, **scores, "epoch_seconds": seconds}
    return {name: results[name] for name in curve_names(run.data)}, last_epoch


def _check_same_data(metrics: Metrics, data: ImageData) -> ImageData:
    """Return the data with the run's own `fallback`; raise `LabError` if they are not the run's data."""
    recorded, found = metrics["dataset"], data.describe()
    for key in ("name", "train_images", "test_images", "classes"):
        if recorded[key] != found[key]:
            raise LabError(
                f"expected the run's data ({key} {recorded[key]}), got {key} {found[key]}; pass the same data"
            )
    return replace(data, fallback=recorded["fallback"])


def _check_equal_on_ranks(config: TrainConfig, data: ImageData, ranks: Ranks) -> None:
    """Raise `AllRanksError` unless all ranks, perhaps on several machines, train the same model on the same data."""
    settings = {name: value for name, value in config.as_dict().items() if name not in MACHINE_SETTINGS}
    ranks.check_equal("settings", settings)
    ranks.check_equal("data", {name: value for name, value in data.describe().items() if name != "source"})


@contextmanager
def _stop_explained(run: Run) -> Iterator[None]:
    """Add to the message of whatever stops the run how many epochs are kept and how to resume."""
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
