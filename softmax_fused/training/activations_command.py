"""``softmax-fused activations``: the functions between the layers of an MLP, and how much gradient they let through."""

from pathlib import Path
from typing import Annotated

import typer


def activations(
    output: Annotated[Path, typer.Option(help="The PNG file with the curves.")] = Path("activations.png"),
) -> None:
    """Draw ReLU, sigmoid and tanh above their slopes, which autograd computes, and print some of these."""
    from softmax_fused.training.report.activations import describe_activations, draw_activations

    for line in describe_activations():
        typer.echo(line)
    draw_activations(output)
    typer.echo(output)
