"""The commands of ``softmax-fused``: options and help; the work is done elsewhere and imported when it is needed."""

from pathlib import Path
from typing import Annotated

import typer

from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data import DATASETS
from softmax_fused.training.errors import UsageError
from softmax_fused.training.loop import OPTIMIZERS
from softmax_fused.training.losses import LOSSES
from softmax_fused.training.models import MODELS

app = typer.Typer(
    help="Softmax regression and an MLP on Fashion-MNIST, with the fused loss or with the losses it replaces.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT = TrainConfig()


@app.callback()
def softmax_fused() -> None:
    """Keeps `train` a subcommand."""


Dataset = Annotated[str, typer.Option(metavar="|".join(DATASETS), help="Images to train on.")]
Model = Annotated[
    str, typer.Option(metavar="|".join(MODELS), help="softmax: 784 -> 10; mlp: 784 -> 256 -> ReLU -> 10.")
]
LossName = Annotated[
    str,
    typer.Option(
        "--loss", metavar="|".join(LOSSES), help="fused: ours; torch: nn.CrossEntropyLoss; scratch: textbook."
    ),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training set.")]
BatchSize = Annotated[int, typer.Option(help="Images a step.")]
Lr = Annotated[float, typer.Option(help="Learning rate.")]
OptimizerName = Annotated[str, typer.Option("--optimizer", metavar="|".join(OPTIMIZERS), help="Rule of the step.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU, else the CPU.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets, a torchvision root; else $SOFTMAX_FUSED_DATA, else a per-user cache."),
]
Output = Annotated[Path | None, typer.Option(help="Folder for the results; by default a new one under runs/.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights and the order of the images.")]
Workers = Annotated[int, typer.Option(help="Processes that read batches; 0 gathers them from memory, which is faster.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the folder of the results, and warnings.")]


@app.command()
def train(
    context: typer.Context,
    dataset: Dataset = DEFAULT.dataset,
    model: Model = DEFAULT.model,
    loss: LossName = DEFAULT.loss,
    epochs: Epochs = DEFAULT.epochs,
    batch_size: BatchSize = DEFAULT.batch_size,
    lr: Lr = DEFAULT.lr,
    optimizer: OptimizerName = DEFAULT.optimizer,
    device: Device = DEFAULT.device,
    data_dir: DataDir = None,
    output: Output = None,
    seed: Seed = DEFAULT.seed,
    workers: Workers = DEFAULT.workers,
    amp: Annotated[
        bool, typer.Option("--amp", help="Mixed precision: bfloat16, or float16 on GPUs without it.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Continue the run in this folder, with its own settings.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Trains a classifier and leaves metrics, curves, pictures and a checkpoint in a run folder.

    Without --dataset, scikit-learn's digits stand in for Fashion-MNIST where it cannot be downloaded.
    """
    from softmax_fused.training import run
    from softmax_fused.training.report import Reporter

    config = TrainConfig(
        dataset=dataset,
        model=model,
        loss=loss,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        device=device,
        data_dir=_absolute(data_dir),
        seed=seed,
        workers=workers,
        amp=amp,
        compile=compile,
    )
    reporter = Reporter(quiet=quiet)
    if resume is None:
        run.train(config, output=output, fallback=not _given(context, "dataset"), reporter=reporter)
    elif output is not None:
        raise UsageError("expected --resume without --output, got both; leave --output out: a run stays in its folder")
    else:
        changes = {name: value for name, value in config.as_dict().items() if _given(context, name)}
        run.resume(resume, changes, reporter=reporter)


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was on the command line, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _absolute(folder: Path | None) -> str | None:
    """As text, and true from any working directory."""
    return None if folder is None else str(folder.expanduser().absolute())
