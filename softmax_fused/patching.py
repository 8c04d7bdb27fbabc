"""Let torch's name for the loss lead to ours, for code that is not to be changed."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch.overrides import get_overridable_functions, handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors, functional
from softmax_fused._dispatch import check_backend
from softmax_fused._errors import TENSORS
from softmax_fused._fallback import torch_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

lock = threading.Lock()

patches: list[Patch] = []
"""The patches in force, in the order of their calls."""

options: dict[str, Any] | None = None
"""The options that the latest patch passes to every call; None where no patch is in force."""

found: Callable[..., Tensor] = torch_function
"""What the first patch found under torch's name; undoing the last one puts it back."""


@functools.wraps(torch_function)
def replacement(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Stand under torch's name. Once undone it is torch's function, for code that still holds a reference to it."""
    chosen = options  # read once: another thread may undo
    if chosen is None:
        return torch_function(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if has_torch_function_variadic(input, target, weight):
        tensors = [tensor for tensor in (input, target, weight) if tensor is not None]
        loss: Tensor = handle_torch_function(
            known_function(tensors),
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss
    return functional.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, **chosen
    )


def known_function(tensors: list[Tensor]) -> Callable[..., Tensor]:
    """Return the function that __torch_function__ is told: torch's to tensor subclasses, the replacement to modes."""
    return replacement if all(type(tensor) in TENSORS for tensor in tensors) else torch_function


class Patch:
    """What :func:`softmax_fused.patch` returns: a context manager, or undone by hand."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def undo(self) -> None:
        """Undo this patch; does nothing the second time. With the last one torch's function is back."""
        with lock:
            if self in patches:
                patches.remove(self)
                settle()

    def __enter__(self) -> Patch:
        if self not in patches:
            raise _errors.undone()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def fill_tables() -> None:
    """Have torch fill its tables of functions, once a process, while the name still leads to torch's own."""
    importlib.import_module("torch._dynamo")
    get_overridable_functions()


def settle() -> None:
    """Apply the latest patch or, where none is left, put back what was found."""
    global options, found
    options = patches[-1].options if patches else None
    current = F.cross_entropy
    if patches and current is not replacement:
        found = current
        F.cross_entropy = replacement
    elif not patches and current is replacement:
        F.cross_entropy = found
    elif not patches and current is not found:
        warnings.warn(_errors.replaced_since(current), RuntimeWarning, stacklevel=3)


def patch(*, backend: str = "auto", grad_in_forward: bool = False) -> Patch:
    """Have `torch.nn.functional.cross_entropy` computed by :func:`cross_entropy` from now on, until undone.

    With it `torch.nn.CrossEntropyLoss`, and every model that calls either, whatever library it comes from. In force in
    all threads of the process. Patches nest: torch's function is back when the last is undone, in whatever order;
    meanwhile the options of the latest hold.

    Not reached: a module's own copy of the name, made by `from torch.nn.functional import cross_entropy` before the
    patch. A copy made while patched computes with torch again once undone. torch.jit.script refuses a patched name.

    Args:
        backend: As for :func:`cross_entropy`.
        grad_in_forward: As for :func:`cross_entropy`. There is no `inplace_backward`: it takes a caller who knows that
            nothing reads the logits after the backward pass.

    Returns:
        A context manager that undoes the patch at its end; or call its method `undo()`.

    Raises:
        ValueError: Unknown backend.
        RuntimeError: Another library has replaced the function since an earlier patch that is still in force.

    Example:
        >>> import torch
        >>> criterion = torch.nn.CrossEntropyLoss(reduction="sum")
        >>> with patch():
        ...     criterion(torch.zeros(2, 4), torch.tensor([0, 1]))
        tensor(2.7726)
        >>> everywhere = patch(backend="torch")
        >>> everywhere.undo()
    """
    check_backend(backend)
    fill_tables()
    with lock:
        if patches and F.cross_entropy is not replacement:
            raise _errors.replaced_before(F.cross_entropy)
        made = Patch({"backend": backend, "grad_in_forward": grad_in_forward})
        patches.append(made)
        settle()
    return made
