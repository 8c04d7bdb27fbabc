"""The loss of rows whose classes are divided among ranks: statistics of the slices, brought together by all-reduces.

m = max over slices,  s = sum of the slices' s * exp(m_slice - m),  A and <a, z - m> likewise
loss = A * log s - <a, z - m>,  gradient of a slice = g * (A * exp(z - m - log s) - a)

The true class stays out of s until the end, as in the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from softmax_fused import _check, _torch_path, _torch_slices
from softmax_fused._torch_slices import ELSEWHERE, IGNORED, UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._autograd import Operations, Spec


class Slice(NamedTuple):
    """Which classes this rank holds, from `first` on, and the ranks that hold the others; None for a world of one."""

    first: int
    group: Any


def statistics_of(operations: Operations) -> Any:
    """Return the module that computes statistics and gradient of a slice."""
    if operations is _torch_path:
        return _torch_slices
    from softmax_fused import _launch_slices

    return _launch_slices


def local_labels(target: Tensor, first: int, size: int, spec: Spec) -> Tensor:
    """Return class indices relative to a slice: ELSEWHERE on another, IGNORED, or UNKNOWN where there is no such class.

    Raises:
        IndexError: For a CPU tensor, if there is no such class.
    """
    label = target.long()
    here = label - first
    known = (label >= 0) & (label < spec.classes)
    found = torch.where((here >= 0) & (here < size), here, torch.where(known, ELSEWHERE, UNKNOWN))
    found.masked_fill_(label == spec.ignore_index, IGNORED)
    if label.is_cpu:
        wrong = label[found == UNKNOWN]
        if wrong.numel():
            raise IndexError(_check.out_of_range(spec.classes, spec.ignore_index, int(wrong[0])))
    return found


def all_reduce(tensor: Tensor, operation: str, group: Any) -> None:
    """Reduce in place over the ranks; nothing to do in a world of one or without rows."""
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=group)


def true_terms(logits: Tensor, label: Tensor, weight: Tensor | None, m: Tensor, spec: Spec) -> list[Tensor]:
    """Return z - m and, with weights, w of each row's true class; 0 where another rank holds it."""
    here = label >= 0
    if not logits.shape[min(logits.ndim - 1, 1)]:
        return [torch.zeros_like(m)] * (1 if weight is None else 2)
    index = label.clamp(min=0)
    dim = min(logits.ndim - 1, 1)
    z = logits.detach().gather(dim, index.unsqueeze(dim)).squeeze(dim).to(spec.acc)
    terms = [z - m] if weight is None else [z - m, weight.to(spec.acc)[index]]
    return [torch.where(here, term, 0) for term in terms]


class Joined(NamedTuple):
    """What every rank knows of each row after the all-reduces."""

    m: Tensor
    log_s: Tensor
    total: Tensor
    loss: Tensor
    weight: Tensor  # share of a mean's denominator


def join(logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, group: Any, module: Any) -> Joined:
    """Bring the slices' statistics together by two all-reduces: of m, and of all else, packed."""
    spreads = not spec.indices or spec.label_smoothing > 0
    local_m, s, *spread = module.statistics(logits, target, weight, spec)
    m = local_m.clone()
    all_reduce(m, "MAX", group)
    delta = local_m - m
    terms = [s * delta.exp()]
    if spreads:
        total, dot = spread
        terms += [total, dot + torch.where(total == 0, 0, total * delta)]
    if spec.indices:
        terms += true_terms(logits, target, weight, m, spec)
    packed = torch.stack(terms)
    all_reduce(packed, "SUM", group)
    s, *rest = packed.unbind()
    total, dot = (rest.pop(0), rest.pop(0)) if spreads else (torch.zeros_like(s), torch.zeros_like(s))
    if not spec.indices:
        log_s = s.log()
        return Joined(m, log_s, total, total * log_s - dot, torch.ones_like(s))
    z_true = rest.pop(0)
    w_true = rest.pop(0) if rest else torch.ones_like(s)
    return close(m, s, total, dot, z_true, w_true, target, spec)


def close(
    m: Tensor, s: Tensor, total: Tensor, dot: Tensor, z_true: Tensor, w_true: Tensor, label: Tensor, spec: Spec
) -> Joined:
    """Join the true class to the others; ignored rows have no loss, rows without a true class the loss NaN."""
    e_true = z_true.exp()
    log_s = torch.where(e_true == 1, s.log1p(), (s + e_true).log())
    a_true = (1 - spec.label_smoothing) * w_true
    total = (total + a_true).masked_fill_(label == UNKNOWN, torch.nan)
    loss = total * log_s - dot - torch.where(a_true == 0, 0, a_true * z_true)
    ignored = label == IGNORED
    return Joined(
        m,
        log_s,
        total.masked_fill_(ignored, 0),
        loss.masked_fill_(ignored, 0),
        w_true.masked_fill((label == UNKNOWN) | ignored, 0),
    )


def reduced(rows: Joined, spec: Spec) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the denominator of a mean; sums are taken in float64, the same on every rank."""
    if spec.reduction == "none":
        return rows.loss.to(spec.dtype), []
    total = rows.loss.sum(dtype=torch.float64)
    if spec.reduction == "sum":
        return total.to(spec.dtype), []
    denominator = rows.weight.sum(dtype=torch.float64)
    denominator = denominator.masked_fill(denominator == 0, torch.nan)
    return (total / denominator).to(spec.dtype), [denominator.to(spec.acc).view(1)]


class SliceCrossEntropy(torch.autograd.Function):
    """Saves the logits and two or three numbers a row; backward communicates nothing."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, part: Slice, module: Any
    ) -> Tensor:
        """Compute the loss."""
        if spec.indices:
            target = local_labels(target, part.first, logits.shape[min(logits.ndim - 1, 1)], spec)
        rows = join(logits, target, weight, spec, part.group, module)
        loss, denominator = reduced(rows, spec)
        kept = [rows.m, rows.log_s] if spec.indices and weight is None else [rows.m, rows.log_s, rows.total]
        ctx.save_for_backward(logits, target, weight, torch.stack(kept, -1), *denominator)
        ctx.spec, ctx.module = spec, module
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of this rank's logits.

        Raises:
            RuntimeError: If it is to be differentiated: its derivative would need the other ranks.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported where logits are divided among ranks")
        logits, target, weight, *saved = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if grad.numel():
            ctx.module.gradient(upstream, logits, target, weight, saved, ctx.spec, grad)
        return grad, None, None, None, None, None


def slice_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, spec: Spec, part: Slice, operations: Operations
) -> Tensor:
    """Compute the loss of logits of which this rank holds the slice `part`; every rank must call it."""
    loss: Tensor = SliceCrossEntropy.apply(logits, target, weight, spec, part, statistics_of(operations))
    return loss
