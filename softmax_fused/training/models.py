"""The two classifiers of the textbook chapter, with the textbook's initial weights."""

from collections.abc import Callable

import torch
from torch import nn

PIXELS = 28 * 28
HIDDEN = 256
STD = 0.01


def softmax_regression(classes: int) -> nn.Module:
    """Return 784 -> classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, classes))


def mlp(classes: int) -> nn.Module:
    """Return 784 -> 256 -> ReLU -> classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "softmax": softmax_regression,
    "mlp": mlp,
}


def build_model(name: str, classes: int, seed: int = 0) -> nn.Module:
    """Return a model with weights drawn from N(0, 0.01), the same for the same seed on every device, and biases 0."""
    model = MODELS[name](classes)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=STD, generator=generator)
            nn.init.zeros_(layer.bias)
    return model
