"""``softmax-fused data``: a data set looked at, and its reading timed, before anything is trained on it."""

from pathlib import Path
from typing import Annotated

import typer

from softmax_fused.training.config import TrainConfig, check_range
from softmax_fused.training.data.datasets import DATASETS
from softmax_fused.training.errors import UsageError
from softmax_fused.training.fitting import check_name
from softmax_fused.training.options import DataDir

DEFAULT = TrainConfig()


def data(
    context: typer.Context,
    dataset: Annotated[str, typer.Option(metavar="|".join(DATASETS), help="Images to look at.")] = DEFAULT.dataset,
    time: Annotated[
        bool, typer.Option("--time", help="Read an epoch with 0, 1, 2 and 4 DataLoader workers, and from memory.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="INTEGER", help="Images a step, for --time.")] = DEFAULT.batch_size,
    data_dir: DataDir = None,
    output: Annotated[Path, typer.Option(help="The PNG file with the samples.")] = Path("data.png"),
) -> None:
    """Describe a data set, draw samples of each class, and with --time measure how fast it is read.

    Without --dataset, scikit-learn's digits stand in for Fashion-MNIST where it cannot be downloaded.
    """
    from softmax_fused.training.data.datasets import data_root, load_dataset
    from softmax_fused.training.data.loading import time_loading
    from softmax_fused.training.report.console import Reporter
    from softmax_fused.training.report.samples import describe_data, draw_samples

    check_name("dataset", dataset, DATASETS)
    check_range("batch-size", batch_size, 1, 2**31 - 1)
    source = context.get_parameter_source("dataset")
    fallback = source is None or source.name != "COMMANDLINE"
    images = load_dataset(dataset, data_root(data_dir), fallback=fallback)
    if images.train.images.ndim != 3:
        raise UsageError(f"--dataset must name a data set of images; got {dataset!r}, which has none")
    reporter = Reporter()
    if images.fallback:
        reporter.fallback(dataset, images)
    for line in describe_data(images):
        reporter.line(line)
    draw_samples(images, output)
    reporter.result(str(output))
    if time:
        time_loading(images.train, batch_size, reporter, kept=output)
