"""Several outputs of each row, from one read of the logits, as a function."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors
from softmax_fused._dispatch import (
    ROWS,
    ROWS_WITHOUT_LOSS,
    check_backend,
    get_backend,
    has_subclass,
    loss_dtype,
    route,
    row_operations,
    supports_fused,
)
from softmax_fused._fallback import validate
from softmax_fused._row_outputs import OUTPUTS, RowOutputs
from softmax_fused._spec import FLOATS, RowSpec
from softmax_fused.backends.torch.row_outputs import effective, needs_log_p, statistics
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.functional.autograd import CrossEntropyRows
from softmax_fused.functional.loss import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

NAMES = tuple(OUTPUTS)


def check_options(logit_scale: Any, softcap: Any, outputs: Any, dtype: Any) -> tuple[str, ...]:
    """Return the names of the outputs asked for, in their order.

    Raises:
        ValueError: An option has a value that means nothing.
        TypeError: A scale or cap is no number.
    """
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if type(value) not in (int, float) and not (name == "softcap" and value is None):
            raise _errors.not_a_number(name, value)
    if not -math.inf < logit_scale < math.inf:  # math.isfinite would break the graph of torch.compile
        raise _errors.infinite_scale(logit_scale)
    if softcap is not None and not 0 < softcap < math.inf:
        raise _errors.wrong_cap(softcap)
    wanted = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not wanted or not set(wanted) <= set(NAMES):
        raise _errors.unknown_outputs(outputs, NAMES)
    if dtype is not None and dtype not in FLOATS:
        raise _errors.wrong_dtype(dtype)
    return tuple(name for name in NAMES if name in wanted)


known_options = functools.lru_cache(64, typed=True)(check_options)
"""check_options with a cache, as a training loop asks the same each time. torch.compile warns of caches."""


def cross_entropy_rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str] = NAMES,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> RowOutputs:
    r"""Loss, log-sum-exp, prediction and entropy of each row of logits, in one pass over them.

    .. math::
        x = \mathrm{softcap} \cdot \tanh(\mathrm{logit\_scale} \cdot z / \mathrm{softcap}), \quad
        \mathrm{logsumexp}_n = \log \sum_c \exp x_{nc}, \quad
        H_n = -\sum_c p_{nc} \log p_{nc}, \quad p_n = \mathrm{softmax}(x_n)

    `loss` is `cross_entropy(x, ..., reduction="none")`, `prediction` is the class of the largest logit. What `outputs`
    does not name is not computed and is None. Loss, logsumexp and entropy are differentiable; an ignored row has no
    loss, and the other outputs as any row.

    Args:
        input: Logits z (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64, any strides.
        target: Class indices, int64 of the input's shape without C, or class probabilities of the input's shape.
        weight: Weight of each class (C,), of the input's dtype.
        ignore_index: Class index whose rows have no loss.
        label_smoothing: Share of the target spread evenly over the classes, at most 1.
        logit_scale: What the logits are multiplied by.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        outputs: Names of the outputs wanted: "loss", "logsumexp", "prediction", "entropy".
        dtype: Type of loss, logsumexp and entropy; None for that of `cross_entropy`. float32 keeps the digits that
            16-bit logits would cut off.
        backend: "triton" for the kernels, "torch" for pure torch operations, "auto" for what suits the device.

    Returns:
        A :class:`RowOutputs` of tensors of the input's shape without C; `prediction` is int64.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss and gradient are NaN.
        ValueError: Unknown output or backend, a cap that is not positive, batch sizes that differ.
        RuntimeError: Shapes or dtypes that do not fit, kernels asked for where none can run.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> rows = cross_entropy_rows(logits, torch.tensor([0, 2]), outputs=("loss", "prediction"))
        >>> rows.loss
        tensor([0.1698, 1.5514])
        >>> rows.prediction
        tensor([0, 1])

    References:
        Zhang et al., Dive into Deep Learning, section 4.1. Chowdhery et al., PaLM, 2022 (z-loss). Gemma Team, Gemma 2,
        2024 (soft-capping of logits).
    """
    tensors = (input, target, weight)
    named = outputs if isinstance(outputs, (str, tuple)) else tuple(outputs)
    wanted = (check_options if is_compiling() else known_options)(logit_scale, softcap, named, dtype)
    check_backend(backend)
    if has_torch_function_variadic(*tensors) and not has_subclass(tensors):
        overridden: RowOutputs = handle_torch_function(
            cross_entropy_rows, tensors, *tensors, ignore_index, label_smoothing,
            logit_scale=logit_scale, softcap=softcap, outputs=outputs, dtype=dtype, backend=backend,
        )  # fmt: skip
        return overridden
    arguments = (*tensors, ignore_index, "none", label_smoothing)
    path = route(ROWS if "loss" in wanted else ROWS_WITHOUT_LOSS, backend, arguments)
    if path == "torch" and not supports_fused(*arguments):
        validate(*arguments, values=not is_compiling())
    spec = make_spec(input, target, "none", ignore_index, label_smoothing, dtype or loss_dtype(input, target))
    options = RowSpec(spec, float(logit_scale), None if softcap is None else float(softcap), wanted)
    if path != "backend":
        return composed(input, target, weight, options)
    operations = row_operations(get_backend(backend, input.device.type))
    if input.requires_grad and torch.is_grad_enabled():
        return RowOutputs(*CrossEntropyRows.apply(input, target, weight, options, operations))
    return operations.forward(input, target, weight, options, save=False)[0]


def composed(input: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec) -> RowOutputs:
    """Compute the outputs one by one, in torch operations that transforms, torch.compile and subclasses know."""
    spec = options.spec
    x, _ = effective(input, options)
    found: dict[str, Tensor] = {}
    if "loss" in options.outputs:
        w = None if weight is None else weight.to(x.dtype)
        found["loss"] = cross_entropy(
            x, target, w, ignore_index=spec.ignore_index, reduction="none", label_smoothing=spec.label_smoothing
        )
    others = tuple(name for name in options.outputs if name != "loss")
    rows = x.unsqueeze(0) if input.ndim == 1 else x
    log_p = torch.log_softmax(rows, 1) if needs_log_p(others) else None
    for name, values in statistics(rows, others, log_p).items():
        found[name] = values.squeeze(0) if input.ndim == 1 else values
    for name, values in found.items():
        found[name] = values.to(OUTPUTS[name].dtype or spec.dtype)
    return RowOutputs(*[found.get(name) for name in OUTPUTS])  # type: ignore[arg-type]  # None as the caller asked
