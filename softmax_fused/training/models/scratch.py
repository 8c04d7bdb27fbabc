"""Models and minibatch SGD from scratch: on plain tensors, without nn.Module and torch.optim, but with autograd."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return torch.where(x > 0, x, torch.zeros_like(x))


class ScratchModel:
    r"""Affine layers with an activation between them, as the textbook writes them.

    .. math::
        h_0 = x, \qquad h_i = \phi(h_{i-1} W_i + b_i), \qquad o = h_{k-1} W_k + b_k

    Args:
        layers: Pairs (W, b) of shapes (inputs, outputs) and (outputs,).
        activation: The function between two layers.
        single_output: Whether to return the one output as shape (N,) instead of (N, 1).
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], activation: Callable[[Tensor], Tensor], single_output: bool
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        for number, (weight, bias) in enumerate(layers, start=1):
            self.tensors |= {f"W{number}": weight.requires_grad_(), f"b{number}": bias.requires_grad_()}
        self.depth, self.activation, self.single_output = len(layers), activation, single_output

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return outputs of shape (N, outputs), or (N,), for inputs of shape (N, ...)."""
        hidden = inputs.flatten(1)
        for number in range(1, self.depth + 1):
            hidden = hidden @ self.tensors[f"W{number}"] + self.tensors[f"b{number}"]
            if number < self.depth:
                hidden = self.activation(hidden)
        return hidden.squeeze(1) if self.single_output else hidden

    def parameters(self) -> list[Tensor]:
        """Return the tensors to train."""
        return list(self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, for a checkpoint."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a checkpoint."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])

    def to(self, device: torch.device) -> "ScratchModel":
        """Move to a device. It replaces the parameters, so call it before an optimiser is built on them."""
        self.tensors = {name: tensor.detach().to(device).requires_grad_() for name, tensor in self.tensors.items()}
        return self

    def train(self) -> None:
        """Do nothing: these layers compute the same in training and in evaluation."""

    def eval(self) -> None:
        """Do nothing, as `train` does."""


class ScratchSGD:
    r"""Minibatch stochastic gradient descent: :math:`w \leftarrow w - \eta\, g`, with g the mean loss's gradient."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= self.lr * parameter.grad

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, float]:
        """Return the learning rate, which is the only state."""
        return {"lr": self.lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the learning rate of a checkpoint."""
        self.lr = state["lr"]
