"""The models of the textbook chapter, from library parts and from scratch, with the same initial weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from softmax_fused.training.data.datasets import Task
from softmax_fused.training.errors import UsageError
from softmax_fused.training.models.scratch import ScratchModel, relu

INITIAL_STD = 0.01

Model = nn.Module | ScratchModel


@dataclass(frozen=True)
class ModelEntry:
    """The layer sizes of a model, prod(input_shape) -> hidden -> outputs, and the loss that is trained by default."""

    task: Task
    loss: str
    input_shape: tuple[int, ...] = (28, 28)
    hidden: tuple[int, ...] = ()
    scratch: bool = False


MODELS: dict[str, ModelEntry] = {
    "softmax": ModelEntry(Task.CLASSES, "fused"),
    "mlp": ModelEntry(Task.CLASSES, "fused", hidden=(256,)),
    "scratch-softmax": ModelEntry(Task.CLASSES, "scratch", scratch=True),
    "scratch-mlp": ModelEntry(Task.CLASSES, "scratch", hidden=(256,), scratch=True),
    "logistic": ModelEntry(Task.BINARY, "logistic"),
    "linear": ModelEntry(Task.REGRESSION, "squared", input_shape=(2,)),
    "scratch-linear": ModelEntry(Task.REGRESSION, "scratch-squared", input_shape=(2,), scratch=True),
}

# Of each activation, the module for library models and the function for models from scratch.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU, relu),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "tanh": (nn.Tanh, torch.tanh),
}
DEFAULT_ACTIVATION = "relu"


def build_model(name: str, classes: int, seed: int = 0, activation: str | None = None) -> Model:
    """Return a model with biases 0 and weights drawn from N(0, 0.01^2), which depend on the seed alone.

    Args:
        name: One of `MODELS`.
        classes: The number of outputs. Models for two classes and for regression have one output whatever it is.
        seed: Of the weights.
        activation: One of `ACTIVATIONS`, between the layers of an MLP; by default `DEFAULT_ACTIVATION`.

    Returns:
        A module or a `ScratchModel`, which maps (N, ...) to (N, classes), or to (N,) where it has one output.
    """
    entry = MODELS[name]
    single_output = entry.task is not Task.CLASSES
    sizes = (math.prod(entry.input_shape), *entry.hidden, 1 if single_output else classes)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.empty(n, m).normal_(std=INITIAL_STD, generator=generator) for m, n in pairwise(sizes)]
    module, function = ACTIVATIONS[activation or DEFAULT_ACTIVATION]
    if entry.scratch:
        layers = [(weight.T.contiguous(), torch.zeros(len(weight))) for weight in weights]
        return ScratchModel(layers, function, single_output)
    return _library_model(weights, module, single_output)


def split_head(model: Model) -> tuple[nn.Module, nn.Linear]:
    """Return a library model without its last layer, and that layer; both share its parameters.

    Raises:
        UsageError: if it does not end in a linear layer.
    """
    if not (isinstance(model, nn.Sequential) and isinstance(model[-1], nn.Linear)):
        raise UsageError("expected a model that ends in nn.Linear, as --loss fused-linear wants it; got another")
    return model[:-1], model[-1]


def _library_model(weights: Sequence[Tensor], activation: Callable[[], nn.Module], single_output: bool) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten()]
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data.copy_(weight)
        nn.init.zeros_(layer.bias)
        parts += [layer, activation()]
    return nn.Sequential(*parts[:-1], *[nn.Flatten(0)] * single_output)  # the last one maps (N, 1) to (N,)
