"""Several outputs of each row, and their gradient, by compiled kernels.

Forward saves nothing: the gradient computes the exponentials again, in the cache. It returns a tensor of the shape that
the torch backend saves all the same, as cross_entropy.py says.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from softmax_fused._row_outputs import DIFFERENTIABLE
from softmax_fused.backends.numba import threads
from softmax_fused.backends.numba.call import (
    FIELDS,
    GRADIENT_OF_ROWS,
    RESULT_TYPES,
    ROWS,
    WRITTEN_BY_KERNEL,
    RowFields,
)
from softmax_fused.backends.numba.compilation import NAMES
from softmax_fused.backends.numba.cross_entropy import SCRATCH, run_stages, weights
from softmax_fused.backends.numba.pages import empty_like
from softmax_fused.backends.numba.plan import NO_STRIDES, Plan, bits, covers, make_rows_plan
from softmax_fused.backends.torch import row_outputs as torch_rows

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowSpec, Upstream

saved_shape = torch_rows.saved_shape


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: RowSpec,
    save: bool,
    row_scale: Tensor | None = None,
) -> tuple[RowOutputs, Tensor | None]:
    """Compute the outputs asked for; with `save` also a tensor of `saved_shape`, which nobody reads."""
    out = options.allocate(logits)
    numbers = {name: it for name, it in out._asdict().items() if it is not None}
    if not compute(ROWS, logits, target, weight, options, row_scale, None, numbers):
        return torch_rows.forward(logits, target, weight, options, save, row_scale)
    return out, logits.new_zeros(saved_shape(logits), dtype=options.spec.acc) if save else None


def gradient(
    upstream: Upstream,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    options: RowSpec,
    row_scale: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits from those of the differentiable outputs, None where there is none.

    It is written to `grad` where given, which may be the logits themselves.
    """
    spec = options.spec
    grad = empty_like(logits) if grad is None else grad
    given = zip(DIFFERENTIABLE, upstream, strict=True)
    numbers = {f"by_{name}": g.to(spec.acc).contiguous() for name, g in given if g is not None}
    if compute(GRADIENT_OF_ROWS, logits, target, weight, options, row_scale, grad, numbers):
        return grad
    if covers(spec):  # the kernel of the outputs could be compiled, and saved nothing
        _, stats = torch_rows.forward(logits, target, weight, options, save=True, row_scale=row_scale)
    return torch_rows.gradient(upstream, logits, target, weight, stats, options, row_scale, grad)


def compute(
    operation: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: RowSpec,
    row_scale: Tensor | None,
    grad: Tensor | None,
    numbers: dict[str, Tensor],
) -> bool:
    """Compute one of OF_ROWS from or into `numbers`, named as in RowFields, and return whether there is a kernel.

    Raises:
        IndexError: If a class index that is not ignored lies outside [0, C).
    """
    spec = options.spec
    if spec.target.has_labels and target.dtype is not torch.int64:
        target = target.long()
    plan = make_rows_plan(
        operation, options, logits.shape, logits.stride(), target.stride(), None if grad is None else grad.stride(),
        logits.dtype, target.dtype, threads.available(),
    )  # fmt: skip
    if plan is NO_STRIDES:
        copy = None if grad is None else torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows = logits.contiguous(), target.contiguous(), weight, options, row_scale, copy, numbers
        found = compute(operation, *rows)
        if grad is not None and copy is not None and found:
            grad.copy_(copy)
        return found
    if not isinstance(plan, Plan):
        return False
    if weight is not None or plan.weighs_all:
        weight = weights(weight, plan.call[FIELDS.classes], spec)
    scratch = SCRATCH.take(plan.scratch, spec.acc)
    scales = None if row_scale is None else row_scale.to(spec.acc).contiguous()
    said = {
        "scale": bits(options.scale if scales is None else 1.0),
        "softcap": bits(options.softcap or 0.0),
        "result_type": RESULT_TYPES.index(NAMES[spec.dtype]),
        "row_scale": 0 if scales is None else scales.data_ptr(),
    }
    said.update((name, it.data_ptr()) for name, it in numbers.items())
    call = plan.call + array(
        "q",
        (
            logits.data_ptr(), target.data_ptr(), 0 if weight is None else weight.data_ptr(), 0,
            0 if grad is None else grad.data_ptr(), 0, 0, scratch.data_ptr(), *WRITTEN_BY_KERNEL,
            *(said.get(name, 0) for name in RowFields._fields),
        ),
    )  # fmt: skip
    run_stages(plan, call)
    return True
