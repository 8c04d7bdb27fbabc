"""The commands of ``softmax-fused``: their options, their help, and what they print."""

from pathlib import Path
from typing import Annotated, Any

import typer

from softmax_fused.training.config import TrainConfig, check_name, check_range, losses_for
from softmax_fused.training.data.datasets import DATASETS, data_root, load_dataset
from softmax_fused.training.data.loading import WORKERS, time_loading
from softmax_fused.training.data.pictures import read_picture
from softmax_fused.training.errors import LabError, Stopped, UsageError
from softmax_fused.training.info import describe_installation
from softmax_fused.training.models.architectures import ACTIVATIONS, DEFAULT_ACTIVATION, MODELS
from softmax_fused.training.models.learner import OPTIMIZERS
from softmax_fused.training.models.losses import LOSSES
from softmax_fused.training.predict import check_classifier, classify, draw_test_set, load_trained
from softmax_fused.training.ranks.group import process_group, refuse_several_ranks, torchrun_ranks
from softmax_fused.training.report.activations import describe_activations, draw_activations
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.report.page import write_report
from softmax_fused.training.report.samples import describe_data, draw_samples
from softmax_fused.training.runs import compare as compare_module
from softmax_fused.training.runs import run
from softmax_fused.training.versions import describe_version

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
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT = TrainConfig()


@app.callback(invoke_without_command=True)
def begin(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions of this, torch and triton.")] = False,
) -> None:
    """Print the version or the help where no command is given, and refuse several ranks except for `train`."""
    command = context.invoked_subcommand
    if version or command is None:
        typer.echo(describe_version() if version else context.get_help())
        raise typer.Exit
    if command != "train":
        refuse_several_ranks(command)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"expected a whole number, got {text!r}") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number, got {text!r}") from None


def _integer_option(help: str, **settings: Any) -> Any:
    return typer.Option(parser=_integer, metavar="INTEGER", help=help, **settings)


def _number_option(help: str, metavar: str = "NUMBER", **settings: Any) -> Any:
    return typer.Option(parser=_float, metavar=metavar, help=help, **settings)


BY_DATASET, BY_MODEL = "what fits the data set", "what fits the model"  # stand for defaults in the help

Dataset = Annotated[str, typer.Option(metavar="|".join(DATASETS), help="What to train on.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(MODELS),
        help="softmax: 784 -> 10; mlp: 784 -> 256 -> 10; logistic: 784 -> 1; linear: 2 -> 1; scratch-: on raw tensors.",
        show_default=BY_DATASET,
    ),
]
LossName = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="|".join(LOSSES),
        help="fused: ours; fused-linear: with the last layer in one; torch: nn.CrossEntropyLoss; scratch: textbook; "
        "scratch-naive: the same, unstable.",
        show_default=BY_MODEL,
    ),
]
Epochs = Annotated[int | None, _integer_option("Passes over the training set.", show_default=BY_DATASET)]
BatchSize = Annotated[int | None, _integer_option("Images a step, of all ranks together.", show_default=BY_DATASET)]
Lr = Annotated[float | None, _number_option("Learning rate.", show_default=BY_DATASET)]
OptimizerName = Annotated[
    str | None,
    typer.Option("--optimizer", metavar="|".join(OPTIMIZERS), help="Rule of the step.", show_default=BY_MODEL),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="auto: the first GPU, else the CPU.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets, a torchvision root; else $SOFTMAX_FUSED_DATA, else a per-user cache."),
]
Output = Annotated[Path | None, typer.Option(help="Folder for the results; by default a new one under runs/.")]
Seed = Annotated[int, _integer_option("Of the initial weights and the order of the images.")]
Workers = Annotated[int, _integer_option("Processes that read batches; 0 gathers them from memory, which is faster.")]
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
        str | None, typer.Option(metavar="|".join(ACTIVATIONS), help="Of an MLP.", show_default=DEFAULT_ACTIVATION)
    ] = None,
    logit_scale: Annotated[
        float,
        _number_option("Multiply the logits: 100 tells stable losses apart."),
    ] = DEFAULT.logit_scale,
    label_smoothing: Annotated[
        float, _number_option("Share of the target spread over all classes.")
    ] = DEFAULT.label_smoothing,
    mixup: Annotated[
        float, _number_option("Mix images and targets by Beta(ALPHA, ALPHA).", metavar="ALPHA")
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
    given, ranks = _given_settings(context), torchrun_ranks()
    reporter = Reporter(quiet=quiet, mute=ranks.rank > 0)
    if resume is not None and output is not None:
        raise UsageError("expected --resume without --output, got both; leave --output out: a run stays in its folder")
    config = TrainConfig.with_defaults(given) if resume is None else None  # checked before ranks connect
    with process_group(ranks):
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
    given = _given_settings(context)
    config = TrainConfig.with_defaults(given)
    known = [name for name in losses_for(config.dataset) if not LOSSES[name].includes_last_layer]
    names = known[:3] if losses is None else [name.strip() for name in losses.split(",")]
    for name in names:
        check_name("losses", name, known, f" for --dataset {config.dataset}")
    if len(set(names)) < len(names):
        raise UsageError(f"expected --losses without repetition, got {losses!r}; name each loss once")
    reporter = Reporter(quiet=quiet)
    compare_module.compare(names, config, output=output, fallback="dataset" not in given, reporter=reporter)


@app.command(short_help="Name what is in pictures, or draw the test set's.")
def predict(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="checkpoint.pt of a run, or its folder.")],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Pictures of any size; none: a gallery of the test set.")
    ] = None,
    top: Annotated[int, _integer_option("Classes to name for each picture.")] = 3,
    device: Device = DEFAULT.device,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option(help="The gallery's PNG file; by default beside the checkpoint.")
    ] = None,
) -> None:
    """Name what is in your own pictures, or draw the test set with right and wrong predictions."""
    check_range("top", top, 1, 1000)
    trained = load_trained(checkpoint, device)
    if not images:
        path = output or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "gallery.png"
        draw_test_set(trained, path, _absolute(data_dir))
        typer.echo(path)
        return
    check_classifier(trained)
    status = 0
    for path in images:
        try:
            picture = read_picture(path)
        except LabError as error:  # the other pictures are still classified
            typer.echo(f"error: {error}", err=True)
            status = error.status
            continue
        typer.echo(f"{path} ({picture.description})")
        for name, probability in classify(trained, picture, top):
            typer.echo(f"  {probability:6.1%}  {name}")
    if status:
        raise typer.Exit(status)


@app.command(short_help="Describe a data set, draw samples, time how fast it is read.")
def data(
    context: typer.Context,
    dataset: Annotated[str, typer.Option(metavar="|".join(DATASETS), help="Images to look at.")] = DEFAULT.dataset,
    time: Annotated[
        bool, typer.Option("--time", help="Read an epoch with 0, 1, 2 and 4 DataLoader workers, and from memory.")
    ] = False,
    batch_size: Annotated[int, _integer_option("Images a step, for --time.")] = DEFAULT.batch_size,
    data_dir: DataDir = None,
    output: Annotated[Path, typer.Option(help="The PNG file with the samples.")] = Path("data.png"),
) -> None:
    """Describe a data set, draw samples of each class, and with --time measure how fast it is read.

    Without --dataset, scikit-learn's digits stand in for Fashion-MNIST where it cannot be downloaded.
    """
    check_name("dataset", dataset, DATASETS)
    check_range("batch-size", batch_size, 1, 2**31 - 1)
    images = load_dataset(dataset, data_root(data_dir), fallback=not _is_given(context, "dataset"))
    if images.train.images.ndim != 3:
        raise UsageError(f"--dataset must name a data set of images; got {dataset!r}, which has none")
    reporter = Reporter()
    if images.fallback:
        reporter.announce_fallback(dataset, images)
    for line in describe_data(images):
        reporter.line(line)
    draw_samples(images, output)
    reporter.result(str(output))
    timed = 0
    try:
        for name, seconds in time_loading(images.train, batch_size, reporter.track) if time else ():
            timed += 1
            reporter.line(f"{name:22}{seconds:8.2f} s{len(images.train) / seconds:13,.0f} images/s")
    except (KeyboardInterrupt, Stopped) as stop:
        done = f"{output} is written, {timed} of {len(WORKERS) + 1} ways timed"
        raise Stopped(f"stopped; {done}", getattr(stop, "status", 130)) from None


@app.command(short_help="Draw ReLU, sigmoid and tanh, and their slopes.")
def activations(
    output: Annotated[Path, typer.Option(help="The PNG file with the curves.")] = Path("activations.png"),
) -> None:
    """Draw ReLU, sigmoid and tanh above their slopes, which autograd computes, and print some of these."""
    for line in describe_activations():
        typer.echo(line)
    draw_activations(output)
    typer.echo(output)


@app.command(short_help="Put runs on one HTML page that needs nothing else.")
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders of train and compare.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", help="The HTML file; by default report.html in the first folder."),
    ] = None,
) -> None:
    """Put runs on one HTML page with everything inside: curves, tables, pictures, settings and versions."""
    typer.echo(write_report(folders, output))


@app.command(short_help="Print versions, devices, and which backend serves which.")
def info() -> None:
    """Print versions, devices, and which backend computes the losses on each."""
    for line in describe_installation():
        typer.echo(line)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option was on the command line, even with its default value."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _given_settings(context: typer.Context) -> dict[str, Any]:
    """Return the settings of a run that were on the command line."""
    given = {name: context.params[name] for name in DEFAULT.as_dict() if _is_given(context, name)}
    if "data_dir" in given:
        given["data_dir"] = _absolute(given["data_dir"])
    return given


def _absolute(folder: Path | None) -> str | None:
    """Return the folder as text that names it from any working directory, as a run records it."""
    return None if folder is None else str(folder.expanduser().absolute())
