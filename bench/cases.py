"""What is timed: a case, its inputs, and jobs whose untimed part brings back what the timed part needs."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

LOSS_MODES = ("forward", "backward", "both")
PIXELS = 28 * 28


class Case(NamedTuple):
    """Logits of one shape and dtype, with class indices as targets: their loss, outputs of their rows, or a softmax."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    modes: tuple[str, ...] = LOSS_MODES
    operation: str = "loss"  # or "rows" or "softmax"

    @property
    def logits(self) -> int:
        """How many."""
        return prod(self.shape)

    def __str__(self) -> str:
        kind = "" if self.operation == "loss" else f"-{self.operation}"
        return f"{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}{kind}"


STEP = Case((256, 10), torch.float32, ("step",))
"""Softmax regression as the textbook trains it: batch 256, 784 -> 10, SGD."""


class Inputs:
    """Random logits and targets; a provider that overwrites logits gets a copy of its own."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.logits = torch.randn(case.shape, dtype=case.dtype, device=device).requires_grad_()
        self.target = torch.randint(0, case.shape[1], (case.shape[0], *case.shape[2:]), device=device)
        self.upstream = torch.randn_like(self.logits) if case.operation == "softmax" else None
        self.scratch: Tensor | None = None

    def logits_to_overwrite(self) -> Tensor:
        """One copy serves all who overwrite: each brings the values back before its turn. An operation made it: leaves
        may not be overwritten."""
        if self.scratch is None:
            self.scratch = self.logits * 1
        return self.scratch


class Job(NamedTuple):
    """`prepare` is not timed, `call` is."""

    prepare: Callable[[], None]
    call: Callable[[], None]


def logits_and_refresh(inputs: Inputs, overwrites: bool) -> tuple[Tensor, Callable[[], None]]:
    if not overwrites:
        return inputs.logits, lambda: None
    logits = inputs.logits_to_overwrite()

    def refresh() -> None:
        with torch.no_grad():
            logits.copy_(inputs.logits)

    return logits, refresh


def forward_job(loss: Loss, inputs: Inputs, overwrites: bool) -> Job:
    """The loss alone, without gradient: recorded for backward, some compute the gradient with it."""
    logits, refresh = logits_and_refresh(inputs, overwrites)

    def call() -> None:
        with torch.no_grad():
            loss(logits, inputs.target)

    return Job(refresh, call)


def backward_job(loss: Loss, inputs: Inputs, overwrites: bool) -> Job:
    """The gradient alone: a fresh loss is recorded before each call."""
    logits, refresh = logits_and_refresh(inputs, overwrites)
    recorded: list[Tensor] = []

    def prepare() -> None:
        refresh()
        recorded[:] = [loss(logits, inputs.target)]

    def call() -> None:
        torch.autograd.grad(recorded.pop(), logits, inputs.upstream)

    return Job(prepare, call)


def both_job(loss: Loss, inputs: Inputs, overwrites: bool) -> Job:
    """Loss and gradient."""
    logits, refresh = logits_and_refresh(inputs, overwrites)

    def call() -> None:
        torch.autograd.grad(loss(logits, inputs.target), logits, inputs.upstream)

    return Job(refresh, call)


def step_job(loss: Loss, inputs: Inputs, overwrites: bool) -> Job:  # noqa: ARG001 (a step makes its own logits)
    """One training step, everything between two batches included."""
    rows, classes = inputs.case.shape
    model = nn.Linear(PIXELS, classes, dtype=inputs.case.dtype, device=inputs.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.rand(rows, PIXELS, dtype=inputs.case.dtype, device=inputs.device)

    def call() -> None:
        optimizer.zero_grad()
        loss(model(images), inputs.target).backward()
        optimizer.step()

    return Job(lambda: None, call)


JOBS: dict[str, Callable[[Loss, Inputs, bool], Job]] = {
    "forward": forward_job,
    "backward": backward_job,
    "both": both_job,
    "step": step_job,
}
