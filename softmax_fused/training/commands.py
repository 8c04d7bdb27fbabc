"""The commands of ``softmax-fused``: options and help; the work is done elsewhere and imported when it is needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from softmax_fused.cli import describe_version
from softmax_fused.training.activations_command import activations
from softmax_fused.training.config import TrainConfig, check_range
from softmax_fused.training.data.datasets import DATASETS
from softmax_fused.training.data_command import data
from softmax_fused.training.errors import LabError, UsageError
from softmax_fused.training.fitting import check_name, losses_for
from softmax_fused.training.models.architectures import ACTIVATIONS, MODELS
from softmax_fused.training.models.learner import OPTIMIZERS
from softmax_fused.training.models.losses import LOSSES
from softmax_fused.training.options import DataDir
from softmax_fused.training.ranks.group import connected, refuse_several, torchrun_ranks
from softmax_fused.training.report_command import report

EXAMPLES = (
    "softmax-fused train --model mlp --epochs 20",
    "softmax-fused compare --losses fused,torch,scratch",
    "softmax-fused predict --checkpoint runs/FOLDER shoe.jpg",
    "softmax-fused data --dataset mnist --time",
    "softmax-fused activations --output activations.png",
    "softmax-fused report runs/A runs/B",
    "softmax-fused info",
)

app = typer.Typer(
    help="Linear regression, softmax regression and an MLP, from scratch or from library parts, with the fused loss.",
    epilog="\n".join(["\b", "Examples:", *(f"  {example}" for example in EXAMPLES)]),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT = TrainConfig()


@app.callback(invoke_without_command=True)
def begin(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions of this, torch and triton.")] = False,
) -> None:
    """Answer what asks for no command, and let torchrun start several ranks of `train` alone."""
    command = context.invoked_subcommand
    if version or command is None:
        typer.echo(describe_version() if version else context.get_help())
        raise typer.Exit
    if command != "train":
        refuse_several(command)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"expected a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number, got {text!r}") from None


FITTING = "what fits the data set"

Dataset = Annotated[str, typer.Option(metavar="|".join(DATASETS), help="What to train on.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(MODELS),
        help="softmax: 784 -> 10; mlp: 784 -> 256 -> 10; logistic: 784 -> 1; linear: 2 -> 1; scratch-: on raw tensors.",
        show_default=FITTING,
    ),
]
LossName = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="|".join(LOSSES),
        help="fused: ours; fused-linear: with the last layer in one; torch: nn.CrossEntropyLoss; scratch: textbook; "
        "scratch-naive: the same, unstable.",
        show_default="what fits the model",
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(parser=_whole, metavar="INTEGER", help="Passes over the training set.", show_default=FITTING),
]
BatchSize = Annotated[
    int | None,
    typer.Option(parser=_whole, metavar="INTEGER", help="Images a step, of all ranks together.", show_default=FITTING),
]
Lr = Annotated[
    float | None, typer.Option(parser=_number, metavar="NUMBER", help="Learning rate.", show_default=FITTING)
]
OptimizerName = Annotated[
    str | None,
    typer.Option(
        "--optimizer", metavar="|".join(OPTIMIZERS), help="Rule of the step.", show_default="what fits the model"
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU, else the CPU.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the results; by default a new one under runs/.")]
Seed = Annotated[
    int, typer.Option(parser=_whole, metavar="INTEGER", help="Of the initial weights and the order of the images.")
]
Workers = Annotated[
    int,
    typer.Option(
        parser=_whole,
        metavar="INTEGER",
        help="Processes that read batches; 0 gathers them from memory, which is faster.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the folder of the results, and warnings.")]


@app.command(short_help="Train a model; keep metrics, curves and a checkpoint.")
def train(
    context: typer.Context,
    dataset: Dataset = DEFAULT.dataset,
    model: Model = None,
    loss: LossName = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    optimizer: OptimizerName = None,
    device: Device = DEFAULT.device,
    data_dir: DataDir = None,
    output: Output = None,
    seed: Seed = DEFAULT.seed,
    workers: Workers = DEFAULT.workers,
    amp: Annotated[
        bool, typer.Option("--amp", help="Mixed precision: bfloat16, or float16 on GPUs without it.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    activation: Annotated[
        str | None, typer.Option(metavar="|".join(ACTIVATIONS), help="Of an MLP.", show_default="relu")
    ] = None,
    logit_scale: Annotated[
        float,
        typer.Option(parser=_number, metavar="NUMBER", help="Multiply the logits: 100 tells stable losses apart."),
    ] = DEFAULT.logit_scale,
    label_smoothing: Annotated[
        float, typer.Option(parser=_number, metavar="NUMBER", help="Share of the target spread over all classes.")
    ] = DEFAULT.label_smoothing,
    mixup: Annotated[
        float, typer.Option(parser=_number, metavar="ALPHA", help="Mix images and targets by Beta(ALPHA, ALPHA).")
    ] = DEFAULT.mixup,
    one_hot: Annotated[bool, typer.Option("--one-hot", help="Class probabilities as targets, not indices.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Continue the run in this folder, with its own settings.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a model and leave metrics, curves, pictures and a checkpoint in a run folder.

    Without --dataset, scikit-learn's digits stand in for Fashion-MNIST where it cannot be downloaded.
    Under torchrun, each rank takes its share of every batch.
    """
    from softmax_fused.training.report.console import Reporter
    from softmax_fused.training.runs import run

    given, ranks = _given_settings(context), torchrun_ranks()
    reporter = Reporter(quiet=quiet, mute=ranks.rank > 0)
    if resume is not None and output is not None:
        raise UsageError("expected --resume without --output, got both; leave --output out: a run stays in its folder")
    config = TrainConfig.fitting(given) if resume is None else None
    with connected(ranks):
        if config is not None:
            run.train(config, output=output, fallback="dataset" not in given, reporter=reporter, ranks=ranks)
        elif resume is not None:
            run.resume(resume, given, reporter=reporter, ranks=ranks)


@app.command(short_help="Train with several losses side by side, and time them.")
def compare(
    context: typer.Context,
    losses: Annotated[
        str | None,
        typer.Option(help="Which to train side by side, with commas between.", show_default="fused,torch,scratch"),
    ] = None,
    dataset: Dataset = DEFAULT.dataset,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    optimizer: OptimizerName = None,
    device: Device = DEFAULT.device,
    data_dir: DataDir = None,
    output: Output = None,
    seed: Seed = DEFAULT.seed,
    quiet: Quiet = False,
) -> None:
    """Train with several losses side by side, from the same weights on the same batches, and time them."""
    from softmax_fused.training.report.console import Reporter
    from softmax_fused.training.runs.compare import compare

    given = _given_settings(context)
    config = TrainConfig.fitting(given)
    known = [name for name in losses_for(config.dataset) if not LOSSES[name].layer]
    names = known[:3] if losses is None else [name.strip() for name in losses.split(",")]
    for name in names:
        check_name("losses", name, known, f" for --dataset {config.dataset}")
    if len(set(names)) < len(names):
        raise UsageError(f"expected --losses without repetition, got {losses!r}; name each loss once")
    compare(names, config, output=output, fallback="dataset" not in given, reporter=Reporter(quiet=quiet))


@app.command(short_help="Name what is in pictures, or draw the test set's.")
def predict(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="checkpoint.pt of a run, or its folder.")],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Pictures of any size; none: a gallery of the test set.")
    ] = None,
    top: Annotated[int, typer.Option(parser=_whole, metavar="INTEGER", help="Classes to name for each picture.")] = 3,
    device: Device = DEFAULT.device,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option(help="The gallery's PNG file; by default beside the checkpoint.")
    ] = None,
) -> None:
    """Name what is in your own pictures, or draw the test set with right and wrong predictions."""
    from softmax_fused.training.data.pictures import read_picture
    from softmax_fused.training.predict import check_classifier, classify, draw_gallery, load_trained

    check_range("top", top, 1, 1000)
    trained = load_trained(checkpoint, device)
    if not images:
        path = output or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "gallery.png"
        typer.echo(draw_gallery(trained, path, _absolute(data_dir)))
        return
    check_classifier(trained)
    status = 0
    for path in images:
        try:
            picture = read_picture(path)
        except LabError as error:  # the other pictures are answered all the same
            typer.echo(f"error: {error}", err=True)
            status = error.status
            continue
        typer.echo(f"{path} ({picture.description})")
        for name, share in classify(trained, picture, top):
            typer.echo(f"  {share:6.1%}  {name}")
    if status:
        raise typer.Exit(status)


app.command(short_help="Describe a data set, draw samples, time how fast it is read.")(data)
app.command(short_help="Draw ReLU, sigmoid and tanh, and their slopes.")(activations)
app.command(short_help="Put runs on one HTML page that needs nothing else.")(report)


@app.command(short_help="Print versions, devices, and which backend serves which.")
def info() -> None:
    """Print versions, devices, and which backend computes the losses on each."""
    from softmax_fused.training.info import describe_installation

    for line in describe_installation():
        typer.echo(line)


def _given_settings(context: typer.Context) -> dict[str, Any]:
    """Return the settings of a run that were on the command line, be it with their defaults."""
    given = {}
    for name in DEFAULT.as_dict():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[name] = _absolute(context.params[name]) if name == "data_dir" else context.params[name]
    return given


def _absolute(folder: Path | None) -> str | None:
    """Return it as text, and true from any working directory."""
    return None if folder is None else str(folder.expanduser().absolute())
