"""What ranks tell each other before they compute: the sizes of their slices, and whether their arguments agree."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from softmax_fused import _errors
from softmax_fused._dispatch import supports_fused, tensors_fit
from softmax_fused._errors import AGREED, REFUSALS
from softmax_fused._fallback import torch_cross_entropy
from softmax_fused._spec import class_dim
from softmax_fused.backends.torch.targets import kind_of

if TYPE_CHECKING:
    from torch import Tensor

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""The collective that gathers equal tensors into one: torch 2.14 deprecates the older of its two names."""


class Arguments(NamedTuple):
    """A call's arguments on one rank."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    dtype: torch.dtype | None = None  # asked of the result
    others: tuple[Any, ...] = ()  # what else must be the same on every rank


class CallSummary(NamedTuple):
    """What a rank tells the others of its arguments; the last four must be the same on every rank."""

    valid: int
    size: int  # classes of the slice
    low: int  # the lowest class index, or 0
    high: int  # the highest
    rows: int
    dtypes: int
    options: int
    target: int


def nonempty(value: Any) -> Any:
    """Give dimensions of size 0 the size 1, so that slices without classes are checked like others."""
    if not isinstance(value, torch.Tensor) or value.numel():
        return value
    return value.new_zeros(()).expand([max(1, size) for size in value.shape])


def validation_error(it: Arguments) -> Exception | None:
    """Return what is wrong with one rank's arguments, as far as that rank can tell, or None."""
    logits, target, weight = (nonempty(value) for value in it[:3])
    if isinstance(target, torch.Tensor) and isinstance(logits, torch.Tensor) and target.ndim < logits.ndim:
        target = torch.zeros_like(target)  # labels name classes of all slices: they are checked later
    if supports_fused(logits, target, weight, it.ignore_index, it.reduction, it.label_smoothing, it.dtype):
        return None
    try:
        torch_cross_entropy(logits, target, weight, it.ignore_index, it.reduction, it.label_smoothing)
    except REFUSALS as error:
        return error
    return _errors.unsupported_slice(it.logits, it.target, it.weight)


def layer_fits(input: Tensor, local_weight: Tensor, local_bias: Tensor | None) -> bool:
    """Whether the tensors of a slice of a linear layer go together; it may have no classes."""
    return tensors_fit(nonempty(input), nonempty(local_weight), nonempty(local_bias))


def digest(*values: Any) -> int:
    """Return a checksum of the values' texts."""
    return zlib.crc32(repr(values).encode())


def label_range(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest of 0 and the class indices that are not ignored."""
    label = target.long().masked_fill(target == ignore_index, 0)
    return torch.cat([label.flatten(), label.new_zeros(1)]).aminmax()


def summarize(it: Arguments) -> CallSummary:
    """Return what the other ranks need to know of valid arguments."""
    dim = class_dim(it.logits.ndim)
    has_labels = kind_of(it.logits, it.target).has_labels
    low = high = checksum = torch.zeros((), dtype=torch.int64)
    if has_labels:
        low, high = label_range(it.target, it.ignore_index)
        label = it.target.detach().flatten().long()
        checksum = (label * (2 * torch.arange(len(label), device=label.device) + 1)).sum()
    return CallSummary(
        1,
        it.logits.shape[dim],
        int(low),
        int(high),
        digest(tuple(it.logits.shape[:dim]), tuple(it.logits.shape[dim + 1 :])),
        digest(it.logits.dtype, it.target.dtype, has_labels, it.weight is None),
        digest(it.ignore_index, it.reduction, float(it.label_smoothing), it.dtype, *it.others),
        int(checksum),
    )


def gather(own: CallSummary, group: Any) -> list[CallSummary]:
    """Return every rank's summary, by one all-gather of 64 bytes a rank."""
    backend = dist.get_backend(group)
    on_gpu = "nccl" in backend and "cpu" not in backend  # NCCL takes GPU tensors alone
    mine = torch.tensor(own, device="cuda" if on_gpu else "cpu")
    everyone = mine.new_empty(dist.get_world_size(group) * len(own))
    getattr(dist, ALL_GATHER)(everyone, mine, group=group)
    return [CallSummary(*row) for row in everyone.view(-1, len(own)).tolist()]


def exchange(it: Arguments, problem: Exception | None, group: Any) -> list[int]:
    """Return the number of classes on every rank.

    Raises:
        Exception: On every rank, if the arguments of one are wrong or differ from another's.
    """
    everyone = gather(summarize(it) if problem is None else CallSummary(*[0] * len(CallSummary._fields)), group)
    if problem is not None:
        raise problem
    bad = [rank for rank, found in enumerate(everyone) if not found.valid]
    if bad:
        raise _errors.refused_elsewhere(bad)
    for name in AGREED:
        values = [getattr(found, name) for found in everyone]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise _errors.ranks_disagree(name, other)
    classes = sum(found.size for found in everyone)
    if not classes:
        raise _errors.no_classes()
    if it.logits.is_cpu and (everyone[0].low < 0 or everyone[0].high >= classes):
        wrong = everyone[0].low if everyone[0].low < 0 else everyone[0].high
        raise _errors.out_of_range(classes, it.ignore_index, wrong)
    return [found.size for found in everyone]
