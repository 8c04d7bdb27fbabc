"""Torch's own samples for cross_entropy: the only place that touches torch's internal test modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OPERATOR = next(info for info in op_db if info.name == "nn.functional.cross_entropy")
MODULE = next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ModuleCall(NamedTuple):
    construct: Call
    forward: Call


def operator_samples(device: str, dtype: torch.dtype) -> Iterator[Call]:
    """Calls of torch.nn.functional.cross_entropy, with gradients wanted."""
    for sample in OPERATOR.sample_inputs(device, dtype, requires_grad=True):
        yield Call((sample.input, *sample.args), dict(sample.kwargs))


def module_samples(device: str, dtype: torch.dtype) -> Iterator[ModuleCall]:
    """Constructions and calls of torch.nn.CrossEntropyLoss."""
    arguments = {"device": device, "dtype": dtype, "requires_grad": True, "training": True}
    for sample in MODULE.module_inputs_func(MODULE, **arguments):
        construct, forward = sample.constructor_input, sample.forward_input
        yield ModuleCall(Call(construct.args, construct.kwargs), Call(forward.args, forward.kwargs))


def module_errors(device: str) -> Iterator[tuple[ModuleCall, type[Exception]]]:
    """Constructions and calls that must raise, with what they raise."""
    arguments = {"device": device, "dtype": torch.float32, "requires_grad": False, "training": True}
    if MODULE.module_error_inputs_func is None:
        pytest.skip("this torch lists no errors of the module")
    for error in MODULE.module_error_inputs_func(MODULE, **arguments):
        construct, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        yield ModuleCall(Call(construct.args, construct.kwargs), Call(forward.args, forward.kwargs)), error.error_type
