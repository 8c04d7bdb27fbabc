"""From scratch: models on raw tensors and minibatch SGD, without nn.Module and torch.optim; autograd differentiates."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return torch.where(x > 0, x, torch.zeros_like(x))


class ScratchModel:
    r"""Affine maps with an activation between them, as the textbook writes them.

    .. math::
        h_0 = x, \qquad h_i = \phi(h_{i-1} W_i + b_i), \qquad o = h_{k-1} W_k + b_k

    Args:
        layers: Pairs (W, b) of shapes (inputs, outputs) and (outputs,).
        activation: The function between two layers.
        flat: Whether one output is returned with shape (N,) instead of (N, 1).
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], activation: Callable[[Tensor], Tensor], flat: bool):
        self.tensors: dict[str, Tensor] = {}
        for number, (weight, bias) in enumerate(layers, start=1):
            self.tensors |= {f"W{number}": weight.requires_grad_(), f"b{number}": bias.requires_grad_()}
        self.depth, self.activation, self.flat = len(layers), activation, flat

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return outputs of shape (N, outputs), or (N,), for inputs of shape (N, ...)."""
        hidden = inputs.flatten(1)
        for number in range(1, self.depth + 1):
            hidden = hidden @ self.tensors[f"W{number}"] + self.tensors[f"b{number}"]
            if number < self.depth:
                hidden = self.activation(hidden)
        return hidden.squeeze(1) if self.flat else hidden

    def parameters(self) -> list[Tensor]:
        """Return the tensors to train."""
        return list(self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, as a checkpoint holds them."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a checkpoint's values."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])

    def to(self, device: torch.device) -> "ScratchModel":
        """Move to a device; call it before anything holds the parameters."""
        self.tensors = {name: tensor.detach().to(device).requires_grad_() for name, tensor in self.tensors.items()}
        return self

    def train(self) -> None:
        """Do nothing: these layers are the same in training and evaluation."""

    def eval(self) -> None:
        """Do nothing, likewise."""


class ScratchSGD:
    r"""Minibatch stochastic gradient descent: :math:`w \leftarrow w - \eta\, g`, g being the batch's mean gradient."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= self.lr * parameter.grad

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, float]:
        """Return the learning rate: there is no other state."""
        return {"lr": self.lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's learning rate."""
        self.lr = state["lr"]
