"""What a command prints while it works: a progress bar on a terminal, a line for each epoch, warnings, a table."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from softmax_fused.training.data.batches import Batch
from softmax_fused.training.data.datasets import ImageData
from softmax_fused.training.report.sentences import any_difference
from softmax_fused.training.wording import format_decimal

REDRAWS = 50  # of a progress bar; redrawing takes as long as a training step
DIVERGED_LOSS = 1e5  # a finite loss from here on only shows that training has diverged

DIFFERENCE_NOTE = "off torch by: largest difference of a step's loss from torch's\n"
TIME_NOTE = "us: median microseconds of the loss, forward + backward, and of the whole step"


class Reporter:
    """Prints progress and results to standard output, warnings to standard error.

    Args:
        quiet: Leave out everything but results and warnings.
        mute: Print nothing at all; of several ranks only rank 0 prints.
    """

    def __init__(self, *, quiet: bool = False, mute: bool = False) -> None:
        self.quiet = quiet or mute
        self.console = Console(highlight=False, soft_wrap=True, quiet=mute)
        self.errors = Console(highlight=False, stderr=True, quiet=mute)

    def line(self, text: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def result(self, text: str) -> None:
        """Print one line, also if quiet."""
        self.console.print(text, markup=False)

    def warning(self, text: str) -> None:
        """Print a warning in one line."""
        self.errors.print(f"warning: {text}", markup=False, soft_wrap=True)

    def warn_if_diverged(self, losses: Sequence[float], advice: str, name: str = "") -> None:
        """Warn of the first epoch whose mean loss is finite and yet so large that training has diverged.

        It does not stop the run as NaN does: softmax regression goes on to learn, as a perceptron, at any --lr.
        """
        if losses[-1] >= DIVERGED_LOSS > max(losses[:-1], default=0.0):
            name = f" of {name}" if name else ""
            loss = f"the training loss{name} in epoch {len(losses)} is {format_decimal(losses[-1], 4)}"
            self.warning(f"{loss}: the steps are far too large; {advice}")

    def announce_fallback(self, wanted: str, data: ImageData) -> None:
        """Print a framed warning that other data replace those that were wanted."""
        text = (
            f"NOT {wanted}: this run uses {data.source}'s small {data.name} instead "
            f"({len(data.train):,} + {len(data.test):,} images). Its results say nothing about {wanted}.\n\n"
            f"{data.fallback}"
        )
        self.errors.print(
            Panel(Text(text), title="WARNING: other data", title_align="left", border_style="bold red", padding=(1, 2))
        )

    def compared(self, losses: dict[str, dict[str, Any]]) -> None:
        """Print a table of losses trained side by side, unless quiet."""
        if self.quiet:
            return
        differ = any_difference(losses)
        table = Table(caption=DIFFERENCE_NOTE * differ + TIME_NOTE)
        for heading in ("loss", "final loss", "test accuracy", *["off torch by"] * differ, "loss (us)", "step (us)"):
            table.add_column(heading, justify="left" if heading == "loss" else "right", no_wrap=True)
        for name, loss in losses.items():
            cells = [name, format_decimal(loss["train_loss"][-1], 6), f"{loss['test_accuracy'][-1]:.4f}"]
            if differ:
                values = loss["largest_difference"]
                cells.append("-" if values is None else f"{max(values):.1e}" if any(values) else "0")
            table.add_row(*cells, *[f"{loss[key]['median']:.0f}" for key in ("loss_us", "step_us")])
        self.console.print(table)

    def epoch(self, number: int, epochs: int) -> AbstractContextManager["ProgressBar"]:
        """Show a progress bar for one epoch inside the block."""
        return self.bar(f"epoch {number:{len(str(epochs))}}/{epochs}")

    @contextmanager
    def bar(self, label: str) -> Iterator["ProgressBar"]:
        """Show a progress bar inside the block, if this is a terminal and not quiet."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")
        hidden = self.quiet or not self.console.is_terminal
        # Without auto_refresh there is no thread that redraws, which must not run while DataLoader forks its workers.
        with Progress(*columns, console=self.console, transient=True, auto_refresh=False, disable=hidden) as progress:
            yield ProgressBar(self, label, progress)

    def track(self, batches: Iterable[Batch], steps: int, label: str) -> Iterator[Batch]:
        """Yield the same batches, counted by a progress bar."""
        with self.bar(label) as bar:
            yield from bar.track(batches, steps)


class ProgressBar:
    """A progress bar over batches, and the line of results that replaces it."""

    def __init__(self, reporter: Reporter, label: str, progress: Progress) -> None:
        self.reporter, self.label, self.progress = reporter, label, progress

    def track(self, batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
        """Yield the same batches, counted by the bar."""
        task = self.progress.add_task(self.label, total=steps)
        stride = max(1, steps // REDRAWS)
        for step, batch in enumerate(batches, start=1):
            yield batch
            if step % stride == 0 or step == steps:
                self.progress.update(task, completed=step, refresh=True)

    def finish(self, text: str) -> None:
        """Replace the bar with a line of results."""
        self.progress.stop()
        self.reporter.line(f"{self.label}  {text}")
