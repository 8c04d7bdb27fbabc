"""The loss and its gradient by a compiled kernel.

The loss saves nothing: the gradient sums the exponentials again, to the same bits, while the row is in the cache.
`loss` returns tensors of the shapes that the torch backend saves all the same, as graphs that torch.compile keeps on
disk have been made for either and serve both.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors
from softmax_fused._spec import class_dim, row_shape
from softmax_fused.backends.numba import threads
from softmax_fused.backends.numba.call import FIELDS, WRITTEN_BY_KERNEL, Stage
from softmax_fused.backends.numba.pages import Scratch, empty_like
from softmax_fused.backends.numba.plan import NO_KERNEL, Plan, make_plan
from softmax_fused.backends.torch import cross_entropy as torch_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from softmax_fused._spec import Spec


SCRATCH = Scratch()
SCALARS = {dtype: torch.empty((), dtype=dtype) for dtype in (torch.float32, torch.float64)}
"""What a mean or sum is like: torch.empty_like takes half the time of torch.empty."""

WRONG_LABELS = FIELDS.wrong_labels


class NoKernelError(Exception):
    """There is no kernel for a call, or Numba cannot compile it and has said why: pure torch computes."""


def saved_shapes(logits: Tensor, weight: Tensor | None, spec: Spec) -> list[tuple[int, ...]]:
    """Return the shapes of what `loss` saves."""
    return torch_loss.saved_shapes(logits, weight, spec)


def loss(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss; with `save` also tensors of `saved_shapes`, which nobody reads."""
    try:
        result = compute(logits, target, weight, spec, with_loss=True)
    except NoKernelError:
        return torch_loss.loss(logits, target, weight, spec, save)
    return result, [logits.new_zeros(shape, dtype=spec.acc) for shape in saved_shapes(logits, weight, spec) if save]


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Compute the loss and the gradient for an upstream gradient of 1; nothing is saved.

    `grad`, where given, is filled and returned; it may be `logits`.
    """
    grad = empty_like(logits) if grad is None else grad
    try:
        return compute(logits, target, weight, spec, grad, with_loss=True), [], grad
    except NoKernelError:
        return torch_loss.loss_and_gradient(logits, target, weight, spec, grad)


def gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the logits; `upstream` is a scalar or has the rows' shape.

    `grad`, where given, is filled and returned; it may be `logits`. The result is to the bit what `loss_and_gradient`
    and `rescale_gradient` give.
    """
    grad = empty_like(logits) if grad is None else grad
    rescale = torch_loss.can_rescale(upstream, grad, spec)
    try:
        compute(logits, target, weight, spec, grad, None if rescale else upstream.to(spec.acc))
    except NoKernelError:
        return torch_loss.gradient(upstream, logits, target, weight, saved, spec, grad)
    return grad.mul_(upstream) if rescale and upstream.item() != 1 else grad


def rescale_gradient(
    upstream: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Sequence[Tensor],
    spec: Spec,
    grad: Tensor,
) -> Tensor:
    """Rescale `grad`, computed for an upstream gradient of 1, or compute it again where rounding would show."""
    if upstream.item() == 1 if upstream.ndim == 0 else bool((upstream == 1).all()):
        return grad
    if torch_loss.can_rescale(upstream, grad, spec):
        return grad.mul_(upstream)
    return gradient(upstream, logits, target, weight, saved, spec, grad)


def compute(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: Spec,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    with_loss: bool = False,
) -> Tensor:
    """Compute the loss, the gradient for an upstream gradient (None: 1), or both; return the loss, if any.

    Raises:
        IndexError: If a class index that is not ignored lies outside [0, C).
        NoKernelError: If no kernel can be had.
    """
    if spec.target.has_labels and target.dtype is not torch.int64:
        target = target.long()
    plan = make_plan(
        spec, logits.shape, logits.stride(), target.stride(), None if grad is None else grad.stride(),
        None if upstream is None else upstream.stride(), logits.dtype, target.dtype, with_loss, threads.available(),
    )  # fmt: skip
    if not isinstance(plan, Plan):
        if plan is NO_KERNEL:
            raise NoKernelError
        return compute_copies(logits, target, weight, spec, grad, upstream, with_loss)
    if weight is not None or plan.weighs_all:
        weight = weights(weight, plan.call[FIELDS.classes], spec)
    scratch = SCRATCH.take(plan.scratch, spec.acc)
    result = scratch
    if with_loss:
        result = torch.empty(plan.result, dtype=spec.acc) if plan.result else torch.empty_like(SCALARS[spec.acc])
    memory = scratch.data_ptr()
    found = result.data_ptr() if with_loss else 0
    call = plan.call + array(
        "q",
        (
            logits.data_ptr(), target.data_ptr(), 0 if weight is None else weight.data_ptr(),
            0 if upstream is None else upstream.data_ptr(), 0 if grad is None else grad.data_ptr(),
            *((memory, found) if plan.losses else (found, 0)), memory + plan.losses, *WRITTEN_BY_KERNEL,
        ),
    )  # fmt: skip
    run_stages(plan, call)
    return result if spec.dtype is spec.acc else result.to(spec.dtype)


def weights(weight: Tensor | None, classes: int, spec: Spec) -> Tensor:
    """Return the weights of all classes in the type of the arithmetic."""
    return torch.ones(classes, dtype=spec.acc) if weight is None else weight.to(spec.acc).contiguous()


def compute_copies(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: Spec,
    grad: Tensor | None,
    upstream: Tensor | None,
    with_loss: bool,
) -> Tensor:
    """Compute from copies (rows, C), where the tensors' own layout leads to no row, or to few at a time."""
    shape, dim = logits.shape, class_dim(logits.ndim)
    rows = logits.movedim(dim, -1).reshape(-1, shape[dim])
    t = target.reshape(-1) if spec.target.has_labels else target.movedim(dim, -1).reshape(rows.shape)
    result = None if grad is None else torch.empty_like(rows, memory_format=torch.contiguous_format)
    upstream = upstream.reshape(-1) if upstream is not None and upstream.ndim else upstream
    loss = compute(rows, t, weight, spec, result, upstream, with_loss)
    if grad is not None and result is not None:
        moved = grad.movedim(dim, -1)
        moved.copy_(result.view(moved.shape))
    return loss.view(row_shape(shape)) if with_loss and spec.reduction == "none" else loss


def run_stages(plan: Plan, call: array[int]) -> None:
    """Run a kernel that looks at the target first, then computes rows, which several threads share.

    Raises:
        IndexError: If a class index that is not ignored lies outside [0, C).
    """
    where, _ = call.buffer_info()
    plan.kernel.run(where)
    if call[WRONG_LABELS]:
        raise _errors.out_of_range(call[FIELDS.classes], call[FIELDS.ignore_index], call[FIELDS.wrong_label])
    if plan.team > 1:
        call[FIELDS.stage] = Stage.rows
        threads.run(plan.kernel, where, plan.team)
        call[FIELDS.stage] = Stage.reduce
        plan.kernel.run(where)
