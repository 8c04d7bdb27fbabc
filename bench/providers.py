"""Who computes the loss, or the softmax. Rivals are imported when asked for, and say why when they cannot do a case.

Liger-Kernel computes the gradient in the forward pass and writes it over the logits. It gets a copy of them, refreshed
outside the timed region: users who need their logits afterwards pay for a copy that is not counted here.
flash-attn's losses come per row; its mean is taken as its own module takes it. Only its Triton file is needed, so a
folder with flash_attn/ops/triton/cross_entropy.py on PYTHONPATH will do where its CUDA extension is not built.
All three need real folders: Triton and QuACK's compiler read the kernels' source, which they cannot do inside a wheel.
"""

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_fused
from bench.cases import Case, Loss
from bench.formulas import BASE, OURS
from softmax_fused.functional import explain_backend


class Unavailable(Exception):  # noqa: N818 (a reason to skip, not an error)
    """Why a provider cannot do a case."""


class Provider(NamedTuple):
    """`build` returns the loss for a case on a device, or raises Unavailable."""

    build: Callable[[Case, str], Loss]
    modes: tuple[str, ...] = ("forward", "backward", "both", "step")
    overwrites: bool = False


def of_logits(softmax: Callable[..., Tensor]) -> Loss:
    """A softmax along the classes in the place of a loss: it looks at no target."""
    return lambda logits, _: softmax(logits, 1)


def rows_of_ours(logits: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    return summed(*softmax_fused.cross_entropy_rows(logits, target, backend=backend)[:4])


def rows_of_torch(logits: Tensor, target: Tensor) -> Tensor:
    """A pass over the logits, or several, for each output."""
    entropy = torch.special.entr(F.softmax(logits, 1)).sum(1)
    losses = F.cross_entropy(logits, target, reduction="none")
    return summed(losses, torch.logsumexp(logits, 1), logits.argmax(1), entropy)


def summed(loss: Tensor, logsumexp: Tensor, prediction: Tensor, entropy: Tensor) -> Tensor:
    """The loss with z-loss and an entropy bonus, and a number that takes the prediction."""
    return (loss + 1e-4 * logsumexp.square() - 0.01 * entropy).mean() + 0 * prediction.sum()


def pure_torch(case: Case, device: str) -> Loss:
    """Ours without Numba, where that computes otherwise."""
    if device != "cpu" or explain_backend(torch.device(device))[0] != "numba" or case.operation == "softmax":
        raise Unavailable("ours is not computed by Numba here")
    function = softmax_fused.cross_entropy if case.operation == "loss" else rows_of_ours
    return functools.partial(function, backend="torch")


def ours(case: Case, device: str, *, option: str | None = None) -> Loss:  # noqa: ARG001
    if case.operation != "loss":
        if option:
            raise Unavailable(f"{case.operation} has no {option}")
        return rows_of_ours if case.operation == "rows" else of_logits(softmax_fused.softmax)
    if option is None:
        return softmax_fused.cross_entropy
    return functools.partial(softmax_fused.cross_entropy, **{option: True})


def torch_eager(case: Case, device: str) -> Loss:  # noqa: ARG001
    return {"loss": F.cross_entropy, "rows": rows_of_torch}.get(case.operation, of_logits(F.softmax))


def torch_compiled(case: Case, device: str) -> Loss:
    """Compile afresh for each case: shapes are constants, as torch.compile makes them for a first batch."""
    eager = torch_eager(case, device)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return eager(logits, target)

    torch.compiler.reset()  # else the ninth shape would run uncompiled
    return torch.compile(loss, dynamic=False)


def rival(module: str, case: Case, device: str) -> ModuleType:
    """Import a rival that has kernels for logits (N, C) on a GPU only; Triton's interpreter may run them, too."""
    name = module.partition(".")[0]
    if case.operation == "rows":
        raise Unavailable(f"{name} has no such outputs of rows")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(f"{name} needs a GPU")
    if len(case.shape) != 2:
        raise Unavailable(f"{name} takes logits (N, C) only")
    try:
        return importlib.import_module(module)
    except Exception as error:  # an extension that does not fit this torch raises anything
        raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def liger(case: Case, device: str) -> Loss:
    module = rival(LIGER, case, device)
    return module.liger_cross_entropy if case.operation == "loss" else of_logits(along_last(module.liger_softmax))


def quack(case: Case, device: str) -> Loss:
    if case.operation == "loss":
        return rival("quack.cross_entropy", case, device).cross_entropy
    return of_logits(along_last(rival("quack.softmax", case, device).softmax))


def along_last(softmax: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda logits, _: softmax(logits)


def flash_attn(case: Case, device: str) -> Loss:
    if case.operation == "softmax":
        raise Unavailable("flash-attn has no softmax of its own")
    losses = rival("flash_attn.ops.triton.cross_entropy", case, device).cross_entropy_loss

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return losses(logits, target)[0].mean()

    return loss


LIGER = "liger_kernel.transformers.functional"
COMPILED = "torch.compile"
PROVIDERS = {
    OURS: Provider(ours),
    "ours, grad_in_forward": Provider(functools.partial(ours, option="grad_in_forward")),
    "ours, inplace_backward": Provider(
        functools.partial(ours, option="inplace_backward"), modes=("both", "step"), overwrites=True
    ),
    "ours, backend torch": Provider(pure_torch),
    BASE: Provider(torch_eager),
    COMPILED: Provider(torch_compiled),
    "Liger": Provider(liger, overwrites=True),
    "flash-attn": Provider(flash_attn),
    "QuACK": Provider(quack),
}
