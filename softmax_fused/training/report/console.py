"""What a run says while it runs: a bar on a terminal, then a line, for each epoch, the folder at the end."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from softmax_fused.training.data.batches import Batch
from softmax_fused.training.data.datasets import ImageData
from softmax_fused.training.models.losses import LARGE, as_decimal
from softmax_fused.training.report.comparison import differ

UPDATES = 50  # of the bar, an epoch: redrawing costs as much as a training step

DISTANCE_NOTE = "off torch by: largest difference of a step's loss from torch's\n"
TIME_NOTE = "us: median microseconds of the loss, forward + backward, and of the whole step"


class Reporter:
    """Progress on standard output; warnings go to standard error, and `quiet` does not silence them.

    One that is `mute` prints nothing at all: of several ranks one speaks.
    """

    def __init__(self, *, quiet: bool = False, mute: bool = False) -> None:
        self.quiet = quiet or mute
        self.console = Console(highlight=False, soft_wrap=True, quiet=mute)

    def line(self, text: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def result(self, text: str) -> None:
        """Print one line, always."""
        self.console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Print a warning in one line."""
        console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=self.console.quiet)
        console.print(f"warning: {text}", markup=False)

    def large_loss(self, losses: Sequence[float], advice: str, of: str = "") -> None:
        """Warn of the first epoch whose mean loss is finite and yet hopeless.

        It does not stop the run as NaN does: softmax regression goes on to learn, as a perceptron, at any --lr.
        """
        if losses[-1] >= LARGE > max(losses[:-1], default=0.0):
            of = f" of {of}" if of else ""
            loss = f"the training loss{of} in epoch {len(losses)} is {as_decimal(losses[-1], 4)}"
            self.warning(f"{loss}: the steps are far too large; {advice}")

    def fallback(self, wanted: str, data: ImageData) -> None:
        """Print a framed warning that other data stand in for those that were wanted."""
        text = (
            f"NOT {wanted}: this run uses {data.source}'s small {data.name} instead "
            f"({len(data.train):,} + {len(data.test):,} images). Its results say nothing about {wanted}.\n\n"
            f"{data.fallback}"
        )
        panel = Panel(
            Text(text), title="WARNING: other data", title_align="left", border_style="bold red", padding=(1, 2)
        )
        Console(stderr=True, highlight=False, quiet=self.console.quiet).print(panel)

    def comparison(self, losses: dict[str, dict[str, Any]]) -> None:
        """Print a table of losses trained side by side."""
        if self.quiet:
            return
        apart = differ(losses)
        table = Table(caption=DISTANCE_NOTE * apart + TIME_NOTE)
        for heading in ("loss", "final loss", "test accuracy", *["off torch by"] * apart, "loss (us)", "step (us)"):
            table.add_column(heading, justify="left" if heading == "loss" else "right", no_wrap=True)
        for name, loss in losses.items():
            cells = [name, as_decimal(loss["train_loss"][-1], 6), f"{loss['test_accuracy'][-1]:.4f}"]
            if apart:
                far = loss["largest_difference"]
                cells.append("-" if far is None else f"{max(far):.1e}" if any(far) else "0")
            table.add_row(*cells, *[f"{loss[key]['median']:.0f}" for key in ("loss_us", "step_us")])
        self.console.print(table)

    def epoch(self, number: int, epochs: int) -> "EpochReport":
        """Return a context for one epoch."""
        label = f"epoch {number:{len(str(epochs))}}/{epochs}"
        live = self.console.is_terminal and not self.quiet
        return EpochReport(self, label, _bar(self.console, label) if live else None)


class EpochReport:
    """The bar, or the line, of one epoch."""

    def __init__(self, reporter: Reporter, label: str, bar: Progress | None) -> None:
        self.reporter, self.label, self.bar = reporter, label, bar

    def __enter__(self) -> "EpochReport":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def track(self, batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
        """Yield the same batches, counted by the bar."""
        if not self.bar:
            yield from batches
            return
        self.bar.update(self.bar.task_ids[0], total=steps)
        stride = max(1, steps // UPDATES)
        for step, batch in enumerate(batches, start=1):
            yield batch
            if step % stride == 0 or step == steps:
                self.bar.update(self.bar.task_ids[0], completed=step)

    def finish(self, text: str) -> None:
        """Put the results of the epoch in the place of its bar."""
        if self.bar:
            self.bar.stop()
        self.reporter.line(f"{self.label}  {text}")


def describe(results: dict[str, float], images: int) -> str:
    """Return one epoch in one line, units included."""
    seconds = results["epoch_seconds"]
    scores, unit = "", "examples"
    if "test_accuracy" in results:
        scores = f"  accuracy train {results['train_accuracy']:.4f} test {results['test_accuracy']:.4f}"
        unit = "images"
    train, test = (
        as_decimal(results[name], 4) if unit == "images" else f"{results[name]:.3g}"
        for name in ("train_loss", "test_loss")
    )
    return f"train loss {train}  test loss {test}{scores}  {seconds:.2f} s  {images / seconds:,.0f} {unit}/s"


def describe_parameters(parameters: dict[str, Any]) -> str:
    """Return a linear model's weights and bias, beside those the data were made with."""

    def text(weights: list[float], bias: float, digits: int) -> str:
        return f"weights {', '.join(as_decimal(weight, digits) for weight in weights)}  bias {as_decimal(bias, digits)}"

    found = text(parameters["weights"], parameters["bias"], 4)
    return f"{found}  (made with {text(parameters['true_weights'], parameters['true_bias'], 1)})"


def _bar(console: Console, label: str) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(label, total=None)
    return progress
