"""Log-probabilities of chosen classes, as a function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from softmax_fused import _errors
from softmax_fused._dispatch import (
    ROWS_WITHOUT_LOSS,
    can_read,
    check_backend,
    get_backend,
    loss_dtype,
    route,
    row_operations,
)
from softmax_fused._errors import TENSORS
from softmax_fused._spec import RowSpec, class_dim, row_shape
from softmax_fused.backends.torch.row_outputs import along_classes, effective
from softmax_fused.backends.torch.targets import make_spec, named_classes
from softmax_fused.functional.autograd import LogProb
from softmax_fused.functional.rows import check_options, cross_entropy_rows, expand_scale

if TYPE_CHECKING:
    from torch import Tensor


def log_prob(
    logits: Tensor,
    classes: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> Tensor:
    r"""Log-probabilities of one or several classes of each row, from one pass over the logits.

    .. math::
        \mathrm{log\_prob}_{nk} = x_{n c_{nk}} - \log \sum_c \exp x_{nc}, \quad
        x = \mathrm{softcap} \cdot \tanh(\mathrm{logit\_scale} \cdot z / \mathrm{softcap})

    With one class a row it is the output `log_prob` of :func:`cross_entropy_rows`, whose digits, and those of its
    gradient, are kept where the probability is near 1. With several it is the difference above, of logits in float32 at
    least and a log-sum-exp in float64: its error is a rounding of the logarithm of the sum, about 1e-7, also where the
    probability is nearer to 1 than that. The gradient takes one buffer of the logits' size; it can be differentiated
    again.

    Args:
        logits: Logits z (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64, any strides.
        classes: Class indices, int64: one a row, of the logits' shape without C, or K a row, of the logits' shape with
            K in the place of C. A class may be named more than once.
        ignore_index: Class index whose log-probability is 0, without a gradient.
        logit_scale: What the logits are multiplied by, the inverse of a temperature: a number, or a tensor that
            broadcasts to one number a row.
        softcap: Bound of the logits after scaling, by tanh; None for none.
        dtype: Type of the result; None for that of `cross_entropy`. float32 keeps the digits that 16-bit logits would
            cut off.
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.
        batch_invariant: A row's results and gradient are the same bits whatever other rows there are, as by
            `cross_entropy_rows`.

    Returns:
        A tensor of the shape of `classes`.

    Raises:
        IndexError: A class index lies outside [0, C), on the CPU; on a GPU its log-probability is NaN.
        ValueError: `classes` of another shape or type, an unknown backend, a cap that is not positive.
        RuntimeError: Kernels asked for where none can run.
        TypeError: An argument of the wrong type.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> log_prob(logits, torch.tensor([0, 2]))
        tensor([-0.1698, -1.5514])
        >>> log_prob(logits, torch.tensor([[0, 1], [2, 1]]))
        tensor([[-0.1698, -2.1698],
                [-1.5514, -0.5514]])
    """
    scales = logit_scale if isinstance(logit_scale, torch.Tensor) else None
    if has_torch_function_variadic(logits, classes, scales):
        overridden: Tensor = handle_torch_function(
            log_prob, (logits, classes, scales), logits, classes, ignore_index=ignore_index, logit_scale=logit_scale,
            softcap=softcap, dtype=dtype, backend=backend, batch_invariant=batch_invariant,
        )  # fmt: skip
        return overridden
    check_classes(logits, classes)
    dim = class_dim(logits.ndim)
    if classes.ndim < logits.ndim or classes.shape[dim] == 1:
        target = classes if classes.ndim < logits.ndim else classes.squeeze(dim)
        rows = cross_entropy_rows(
            logits, target, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap,
            outputs=("log_prob",), dtype=dtype, backend=backend, batch_invariant=batch_invariant,
        )  # fmt: skip
        return rows.log_prob.view(classes.shape)
    scale: Any = logit_scale if scales is None else 1.0
    check_options(scale, softcap, ("logsumexp",), dtype)
    row_scale = None if scales is None else expand_scale(scales, logits)
    check_backend(backend)
    label, valid, wrong = named_classes(classes, logits.shape[dim], ignore_index, can_read(classes))
    none = label.new_full((), -100).expand(row_shape(logits.shape))  # every class of a row is one of the others
    result = dtype or loss_dtype(logits, none)
    spec = make_spec(logits, none, "none", -100, 0.0, torch.promote_types(result, torch.float32), batch_invariant)
    transform = float(scale), None if softcap is None else float(softcap)
    path = route(ROWS_WITHOUT_LOSS, backend, (logits, none, None, -100, "none", 0.0))
    if path == "backend" and (row_scale is None or type(row_scale) in TENSORS):
        spec = spec._replace(dtype=torch.float64)  # of the log-sum-exp, for the digits of what is near it
        options = RowSpec(spec, *transform, ("logsumexp",))
        operations = row_operations(get_backend(backend, logits.device.type), spec)
        found: Tensor = LogProb.apply(logits, label, valid, none, row_scale, options, operations)
    else:
        x, _ = effective(logits, RowSpec(spec, *transform, ("logsumexp",)), along_classes(row_scale, logits))
        found = torch.log_softmax(x, dim).gather(dim, label).masked_fill(~valid, 0)
    return found.masked_fill(wrong, torch.nan).to(result)


def check_classes(logits: Tensor, classes: Tensor) -> None:
    """Refuse classes that are no class indices, one or K a row.

    Raises:
        ValueError: If so.
    """
    if not isinstance(logits, torch.Tensor) or logits.ndim == 0 or not isinstance(classes, torch.Tensor):
        raise _errors.wrong_classes(logits, classes)
    dim = class_dim(logits.ndim)
    rows = classes.shape if classes.ndim < logits.ndim else (*classes.shape[:dim], *classes.shape[dim + 1 :])
    if classes.dtype is not torch.int64 or tuple(rows) != row_shape(logits.shape):
        raise _errors.wrong_classes(logits, classes)
