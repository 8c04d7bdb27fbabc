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
    LOSS_OF_ROWS,
    ROWS,
    ROWS_WITHOUT_LOSS,
    SPARSE,
    Operation,
    check_backend,
    get_backend,
    has_subclass,
    loss_dtype,
    route,
    row_operations,
    supports_fused,
)
from softmax_fused._errors import TENSORS
from softmax_fused._fallback import validate
from softmax_fused._row_outputs import DEFAULT, OUTPUTS, RowOutputs, log_prob_of, rank_of
from softmax_fused._spec import FLOATS, RowSpec, row_shape
from softmax_fused.backends.torch.row_outputs import along_classes, effective, needs_log_p, scaled, statistics
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.functional import sparse
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


def check_target_class(wanted: tuple[str, ...], has_labels: bool, target: Tensor) -> None:
    """Refuse outputs that are those of a target class where there are class probabilities.

    Raises:
        ValueError: If so.
    """
    if not has_labels and any(OUTPUTS[name].needs_label for name in wanted):
        raise _errors.no_target_class([name for name in wanted if OUTPUTS[name].needs_label], target)


known_options = functools.lru_cache(64, typed=True)(check_options)
"""check_options with a cache, as a training loop asks the same each time. torch.compile warns of caches."""


def cross_entropy_rows(
    input: Tensor,
    target: Tensor | sparse.SparseTarget,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    outputs: Collection[str] = DEFAULT,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> RowOutputs:
    r"""Loss, log-sum-exp, prediction, entropy and more of each row of logits, in one pass over them.

    .. math::
        x = \mathrm{softcap} \cdot \tanh(\mathrm{logit\_scale} \cdot z / \mathrm{softcap}), \quad
        \mathrm{logsumexp}_n = \log \sum_c \exp x_{nc}, \quad
        H_n = -\sum_c p_{nc} \log p_{nc}, \quad \mathrm{log\_prob}_n = \log p_{n y_n}, \quad
        p_n = \mathrm{softmax}(x_n)

    `loss` is `cross_entropy(x, ..., reduction="none")`, `prediction` is the class of the largest logit. `log_prob` is
    the log-probability of the target class y, without class weights and smoothing; it keeps its digits where p is near
    1, and so does its gradient. What `outputs` does not name is not computed and is None. Loss, logsumexp, entropy and
    log_prob are differentiable, together. In an ignored row loss and log_prob are 0 and the rank is -1; the other
    outputs are as in any row.

    `rank` is the number of classes with a larger logit than the target's: 0 is a hit, and ``rank < k`` one among the
    first k; an equal logit is not larger. Logits are compared after scaling and before the cap, which changes no order
    but rounds large logits to equal ones. A NaN is larger than any number, and where the target's own logit is NaN, the
    rank is C.

    Args:
        input: Logits z (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64, any strides.
        target: Class indices, int64 of the input's shape without C, class probabilities of the input's shape, or a
            :func:`sparse_target`.
        weight: Weight of each class (C,), of the input's dtype or that of the outputs.
        ignore_index: Class index whose rows have no loss.
        label_smoothing: Share of the target spread evenly over the classes, at most 1.
        logit_scale: What the logits are multiplied by: a number or, where each row has its own, a tensor that
            broadcasts to the shape of class indices. It gets no gradient.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        outputs: Names of the outputs wanted: "loss", "logsumexp", "prediction", "entropy"; for class indices also
            "log_prob" and "rank". By default the first four.
        dtype: Type of the outputs other than prediction and rank; None for that of `cross_entropy`. float32 keeps the
            digits that 16-bit logits would cut off.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.
        batch_invariant: A row's outputs and gradient are the same bits whatever other rows there are, as by
            `cross_entropy`; not under torch.compile, where they are torch's own operations.

    Returns:
        A :class:`RowOutputs` of tensors of the input's shape without C; `prediction` and `rank` are int64.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU that row's loss, log_prob and
            gradient are NaN, its rank is -1.
        ValueError: Unknown output or backend, a cap that is not positive, batch sizes that differ, scales that are not
            one a row, an output that needs a target class where there are class probabilities.
        RuntimeError: Shapes or dtypes that do not fit, a scale that requires a gradient, kernels asked for where none
            can run.
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
    scales = logit_scale if isinstance(logit_scale, torch.Tensor) else None
    scale: Any = logit_scale if scales is None else 1.0
    named = outputs if isinstance(outputs, (str, tuple)) else tuple(outputs)
    wanted = (check_options if is_compiling() else known_options)(scale, softcap, named, dtype)
    check_backend(backend)
    if has_torch_function_variadic(*tensors, scales) and not has_subclass((*tensors, scales)):
        overridden: RowOutputs = handle_torch_function(
            cross_entropy_rows, (*tensors, scales), *tensors, ignore_index, label_smoothing,
            logit_scale=logit_scale, softcap=softcap, outputs=outputs, dtype=dtype, backend=backend,
            batch_invariant=batch_invariant,
        )  # fmt: skip
        return overridden
    given: Tensor = sparse.stand_in(input, target) if isinstance(target, sparse.SparseTarget) else target
    arguments = (input, given, weight, ignore_index, "none", label_smoothing)
    path = route(operation_of(wanted, target), backend, (*arguments, dtype), batch_invariant)
    if path != "backend" and not supports_fused(*arguments, dtype):
        validate(*arguments, values=not is_compiling())
    row_scale = None if scales is None else expand_scale(scales, input)
    fused = path == "backend" and (row_scale is None or type(row_scale) in TENSORS)
    if isinstance(target, sparse.SparseTarget):
        check_target_class(wanted, False, target.classes)
        dtype = dtype or loss_dtype(input, target.probabilities)
        fused = fused and sparse.can_pack(target)
        given = sparse.pack(target) if fused else given
    dtype = dtype or loss_dtype(input, given)
    spec = make_spec(input, given, "none", ignore_index, label_smoothing, dtype, batch_invariant)
    check_target_class(wanted, spec.target.has_labels, given)
    options = RowSpec(spec, float(scale), None if softcap is None else float(softcap), wanted)
    if not fused:
        return composed(input, target, weight, options, row_scale)
    operations = row_operations(get_backend(backend, input.device.type), spec)
    if input.requires_grad and torch.is_grad_enabled():
        return RowOutputs(*CrossEntropyRows.apply(input, given, weight, row_scale, options, operations))
    return operations.forward(input, given, weight, options, save=False, row_scale=row_scale)[0]


def operation_of(wanted: tuple[str, ...], target: Any) -> Operation:
    """Return as what the dispatcher is to look at these outputs."""
    if "loss" not in wanted:
        return ROWS_WITHOUT_LOSS
    if isinstance(target, sparse.SparseTarget):
        return SPARSE
    return LOSS_OF_ROWS if wanted in (("loss",), ("loss", "prediction")) else ROWS


def expand_scale(scale: Tensor, input: Tensor) -> Tensor:
    """Return the scales of rows in the rows' shape.

    Raises:
        ValueError: If they are not one a row.
        RuntimeError: If they require a gradient.
    """
    shape = row_shape(input.shape)
    if not scale.dtype.is_floating_point or scale.device != input.device or scale.ndim > len(shape):
        raise _errors.wrong_row_scale(scale, input)
    if any(size not in (1, of_rows) for size, of_rows in zip(scale.shape[::-1], shape[::-1], strict=False)):
        raise _errors.wrong_row_scale(scale, input)
    if scale.requires_grad and torch.is_grad_enabled():
        raise _errors.row_scale_with_gradient()
    return scale.detach().expand(shape)


def composed(
    input: Tensor,
    target: Tensor | sparse.SparseTarget,
    weight: Tensor | None,
    options: RowSpec,
    row_scale: Tensor | None = None,
) -> RowOutputs:
    """Compute the outputs one by one, in torch operations that transforms, torch.compile and subclasses know."""
    spec = options.spec
    scale = along_classes(row_scale, input)
    x, _ = effective(input, options, scale)
    found: dict[str, Tensor] = {}
    if "loss" in options.outputs:
        w = None if weight is None else weight.to(x.dtype)
        found["loss"] = cross_entropy(
            x, target, w, ignore_index=spec.ignore_index, reduction="none", label_smoothing=spec.label_smoothing
        )
    others = tuple(name for name in options.outputs if name != "loss")
    rows = x.unsqueeze(0) if input.ndim == 1 else x
    log_p = torch.log_softmax(rows, 1) if needs_log_p(others) else None
    for name, values in statistics(rows, others, log_p, spec.dtype).items():
        found[name] = values.squeeze(0) if input.ndim == 1 else values
    if isinstance(target, torch.Tensor):
        labels = target.unsqueeze(0) if input.ndim == 1 else target
        if "log_prob" in others and log_p is not None:
            found["log_prob"] = log_prob_of(log_p, labels, spec.ignore_index).view(row_shape(input.shape))
        if "rank" in others:
            y = scaled(input, options, scale).view_as(rows)
            found["rank"] = rank_of(y, labels, spec.ignore_index).view(row_shape(input.shape))
    for name, values in found.items():
        found[name] = values.to(OUTPUTS[name].dtype or spec.dtype)
    return RowOutputs(*[found.get(name) for name in OUTPUTS])  # type: ignore[arg-type]  # None as the caller asked
