"""Loss, logarithm of the sum of exponentials, prediction and entropy of each row, from one read of the logits."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors as _check
from softmax_fused.backends.torch import cross_entropy as _torch_path
from softmax_fused.backends.torch import row_outputs as _torch_row_outputs
from softmax_fused.functional.autograd import Spec, batched, make_spec
from softmax_fused.functional.loss import cross_entropy, operations, small_on_cpu, torch_cross_entropy, transformed

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]


class RowOutputs(NamedTuple):
    """What :func:`cross_entropy_rows` returns, each of the input's shape without C; None where it was not asked for."""

    loss: Tensor
    logsumexp: Tensor
    prediction: Tensor
    entropy: Tensor


FIELDS = RowOutputs._fields


class RowSpec(NamedTuple):
    """What a call asks for, beside its tensors."""

    spec: Spec
    scale: float
    softcap: float | None
    outputs: tuple[str, ...]

    def select(self, *found: Tensor | None) -> RowOutputs:
        """Return those of loss, logsumexp, prediction and entropy that are asked for."""
        kept = [it if name in self.outputs else None for name, it in zip(FIELDS, found, strict=True)]
        return RowOutputs(*kept)  # type: ignore[arg-type]  # None where the caller named no such output

    def allocate(self, logits: Tensor) -> RowOutputs:
        """Return memory for the outputs."""
        rows = (logits.shape[0], *logits.shape[2:]) if logits.ndim > 1 else ()
        dtypes = (self.spec.dtype, self.spec.dtype, torch.int64, self.spec.dtype)
        return self.select(
            *(
                logits.new_empty(rows, dtype=dtype) if name in self.outputs else None
                for name, dtype in zip(FIELDS, dtypes, strict=True)
            )
        )


def implementation(backend: str, device: torch.device) -> Any:
    """Return the module that computes."""
    if operations(backend, device) is _torch_path:
        return _torch_row_outputs
    from softmax_fused.backends.triton import row_outputs as _launch_row_outputs

    return _launch_row_outputs


class CrossEntropyRows(torch.autograd.Function):
    """Saves the logits and four numbers a row; an output whose gradient nobody asks for costs backward nothing."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec, module: Any
    ) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        out, stats = module.forward(logits, target, weight, options, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, stats)
        ctx.options, ctx.module = options, module
        if out.prediction is not None:
            ctx.mark_non_differentiable(out.prediction)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; where it will be differentiated or is batched, in torch operations."""
        loss, logsumexp, _, entropy = upstream
        given = [g for g in (loss, logsumexp, entropy) if g is not None]
        if not given:
            return None, None, None, None, None
        logits, target, weight, stats = ctx.saved_tensors
        arguments = ((loss, logsumexp, entropy), logits, target, weight)
        if torch.is_grad_enabled() or any(batched(g) for g in given):
            grad = _torch_row_outputs.differentiable_gradient(*arguments, ctx.options)
        else:
            grad = ctx.module.gradient(*arguments, stats, ctx.options)
        return grad, None, None, None, None


def check_options(logit_scale: Any, softcap: Any, outputs: Any, dtype: Any, backend: str) -> tuple[str, ...]:
    """Return the outputs' names.

    Raises:
        ValueError: An option has a value that means nothing.
        TypeError: A scale or cap is no number.
    """
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if type(value) not in (int, float) and not (name == "softcap" and value is None):
            raise TypeError(f"{name} must be a number; got {_check.describe(value)}: multiply the logits by a tensor")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite; got {logit_scale!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None; got {softcap!r}")
    wanted = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not wanted or not set(wanted) <= set(FIELDS):
        raise ValueError(f"outputs must name some of {', '.join(FIELDS)}; got {outputs!r}")
    if dtype is not None and dtype not in _check.FLOATS:
        raise ValueError(f"dtype must be a floating point type or None; got {dtype!r}")
    _check.backend(backend)
    return tuple(name for name in FIELDS if name in wanted)


known_options = functools.lru_cache(64, typed=True)(check_options)
"""The same, for a training loop; torch.compile warns of caches."""


def cross_entropy_rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str] = FIELDS,
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
    compiling = torch.compiler.is_compiling()
    check = check_options if compiling else known_options
    wanted = check(logit_scale, softcap, named, dtype, backend)
    if has_torch_function_variadic(*tensors):
        overridden: RowOutputs = handle_torch_function(
            cross_entropy_rows, tensors, *tensors, ignore_index, label_smoothing,
            logit_scale=logit_scale, softcap=softcap, outputs=outputs, dtype=dtype, backend=backend,
        )  # fmt: skip
        return overridden
    small = (
        backend == "auto"
        and not compiling  # which warns of caches, and composes the outputs anyway
        and "loss" in wanted
        and type(target) is torch.Tensor
        and small_on_cpu(input)
    )
    plain = small or _check.plain(input, target, weight, ignore_index, "none", label_smoothing)
    if not plain:  # torch's error, or a call that only torch covers
        torch_cross_entropy(input, target, weight, ignore_index, "none", label_smoothing)
    spec = make_spec(input, target, "none", ignore_index, label_smoothing, dtype or _check.loss_dtype(input, target))
    options = RowSpec(spec, float(logit_scale), None if softcap is None else float(softcap), wanted)
    if small or not plain or compiling or transformed():
        return composed(input, target, weight, options)
    module = implementation(backend, input.device)
    if input.requires_grad and torch.is_grad_enabled():
        return RowOutputs(*CrossEntropyRows.apply(input, target, weight, options, module))
    found: RowOutputs = module.forward(input, target, weight, options, save=False)[0]
    return found


def composed(input: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec) -> RowOutputs:
    """Compute the outputs by operations that torch.func, torch.compile and tensor subclasses know."""
    spec = options.spec
    x, _ = _torch_row_outputs.effective(input, options)
    loss = None
    if "loss" in options.outputs:
        w = None if weight is None else weight.to(x.dtype)
        loss = cross_entropy(
            x, target, w, ignore_index=spec.ignore_index, reduction="none", label_smoothing=spec.label_smoothing
        )
        loss = loss if loss.dtype is spec.dtype else loss.to(spec.dtype)
    if not {"logsumexp", "entropy"} & set(options.outputs):
        prediction = x.detach().argmax(min(x.ndim - 1, 1)) if "prediction" in options.outputs else None
        return RowOutputs(loss, None, prediction, None)  # type: ignore[arg-type]  # None as the caller asked
    rows = x.unsqueeze(0) if input.ndim == 1 else x
    found = _torch_row_outputs.statistics(rows, options, torch.log_softmax(rows, 1))
    rest = (found.logsumexp, found.prediction, found.entropy)  # torch 2.7 does not compile a slice of a NamedTuple
    others = [it if it is None or it.dtype is torch.int64 else it.to(spec.dtype) for it in rest]
    return options.select(loss, *(it if it is None or input.ndim > 1 else it.squeeze(0) for it in others))
