"""The outputs of rows from the statistics of slices of their classes, by two all-reduces, three with the prediction.

m = max over slices,  e = exp(m_slice - m + log s_slice) of each slice,  P = e / sum e is its share of the softmax
log sum exp = m + log s with s = sum e,  log p = (x - m) - log s of the label
H = sum P (H_slice - log e) + log s,  -<a, log p> = sum (loss_slice - A_slice log e) + A log s

As in the loss of slices, the label's class is added to s last, so that confident rows keep all digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from softmax_fused._row_outputs import OUTPUTS, RowOutputs
from softmax_fused.distributed.autograd import all_reduce

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import RowSpec, RowStatistics, Spec

KNOWN = ("loss", "logsumexp", "prediction", "entropy", "log_prob")
"""The outputs that there are of divided rows. The rank needs the label's logit first, which is an all-reduce more."""


class Merged(NamedTuple):
    """What all slices together know of each row, the same on every rank; rows are numbered flat."""

    outputs: RowOutputs  # of the accumulation type
    stats: Tensor  # (5, rows): m, log s, A, H, log p of the label, for the gradient
    label_weight: Tensor | None  # of the label's class, where there are weights and a loss


class Labels(NamedTuple):
    """Which rows have which class: masks of rows, and the index in the slice."""

    ignored: Tensor
    known: Tensor
    own: Tensor  # in this slice
    local: Tensor  # its index in the slice; a valid one also where it is another's

    @staticmethod
    def of(label: Tensor, spec: Spec, held: int) -> Labels:
        """Compare class indices with the classes that the slice holds."""
        ignored = label == spec.ignore_index
        known = (label >= 0) & (label < spec.classes) & ~ignored
        index = label - spec.first
        own = known & (index >= 0) & (index < held)
        return Labels(ignored, known, own, index.masked_fill(~own, 0))


def product(a: Tensor, log: Tensor) -> Tensor:
    """Return a * log with 0 * inf = 0, whichever is 0."""
    return torch.where((a == 0) | (log == 0), 0, a * log)


def merge(
    local: RowStatistics, target: Tensor, weight: Tensor | None, options: RowSpec, held: int, group: Any
) -> Merged:
    """Return the outputs from one slice's statistics; `held` is how many classes it has. A lone slice has no group."""
    spec, wanted = options.spec, options.outputs
    labels = Labels.of(target.flatten().long(), spec, held) if spec.target.has_labels else None
    tops = [local.m, local.top] if "prediction" in wanted else [local.m]
    largest = all_reduce(torch.stack(tops).nan_to_num_(torch.inf, torch.inf, -torch.inf), "MAX", group)
    m = largest[0].clamp(min=torch.finfo(spec.acc).min)
    sums = summed(local, labels, weight, options, m, held, group)
    s, e_label = sums["s"], torch.zeros_like(m)
    if labels is not None:
        e_label = torch.where(labels.known, sums["label"].exp(), 0)
    log_s = torch.where(e_label == 1, s.log1p(), (s + e_label).log())
    unbounded = s == torch.inf  # a logit is, and none is NaN
    log_s = log_s.masked_fill(unbounded, torch.nan)
    log_prob = sums["label"] - log_s if labels is not None else torch.zeros_like(m)
    loss, target_sum = loss_of(sums, labels, log_prob, log_s)
    found = {"logsumexp": torch.where(unbounded, torch.inf, m + log_s), "loss": loss}
    entropy = sums["entropy"] / (s + e_label) + log_s if "entropy" in wanted else torch.zeros_like(m)
    found["entropy"] = entropy
    if labels is not None:
        found["log_prob"] = log_prob.masked_fill(~labels.known, torch.nan).masked_fill(labels.ignored, 0)
    if "prediction" in wanted:
        found["prediction"] = first_of_largest(local, largest[1], spec, held, group)
    outputs = RowOutputs(*(found[name] if name in wanted else None for name in OUTPUTS))  # type: ignore[arg-type]
    return Merged(outputs, torch.stack([m, log_s, target_sum, entropy, log_prob]), sums.get("weight"))


def summed(
    local: RowStatistics,
    labels: Labels | None,
    weight: Tensor | None,
    options: RowSpec,
    m: Tensor,
    held: int,
    group: Any,
) -> dict[str, Tensor]:
    """Return the sums over slices, by one all-reduce: s without the label's class, its x - m, and the others."""
    spec, wanted = options.spec, options.outputs
    log_e = (local.m.clamp(min=torch.finfo(spec.acc).min) - m + local.log_s).masked_fill(
        local.m == torch.inf, torch.inf
    )
    e = log_e.exp()
    terms = {"s": e}
    if labels is not None:
        others = torch.where((e == 0) | (e == torch.inf), e, -e * local.log_prob.expm1())
        terms["s"] = torch.where(labels.own, others, e)
        x_label = (local.log_prob + log_e).masked_fill(log_e == -torch.inf, -torch.inf)
        terms["label"] = torch.where(labels.own, x_label, 0)
        if weight is not None and "loss" in wanted:
            w = weight.to(spec.acc)[labels.local] if held else torch.zeros_like(m)
            terms["weight"] = torch.where(labels.own, w, 0)
    if spec.has_dense_target and "loss" in wanted:
        dense = local.dense_loss - product(local.target_sum, log_e)
        impossible = product(local.target_sum, m.new_full((), torch.inf))
        terms["dense"] = torch.where(log_e == -torch.inf, impossible, dense)
        if weight is not None or labels is None:
            terms["target sum"] = local.target_sum
    if "entropy" in wanted:
        terms["entropy"] = torch.where(e == 0, 0, e * (local.entropy - log_e))
    return dict(zip(terms, all_reduce(torch.stack([*terms.values()]), "SUM", group), strict=True))


def loss_of(sums: dict[str, Tensor], labels: Labels | None, log_prob: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and A of each row; zeros where there is no loss."""
    nothing, one = torch.zeros_like(log_s), torch.ones_like(log_s)
    if "dense" in sums:
        target_sum = sums.get("target sum", one)
        loss = sums["dense"] + product(target_sum, log_s)
        # where a weight makes A infinite and the logits are finite, the sum may be inf - inf
        loss = torch.where(target_sum.isinf() & loss.isnan() & log_s.isfinite(), target_sum, loss)
    elif labels is not None:
        target_sum = sums.get("weight", one)
        loss = torch.where(target_sum == 0, 0, -target_sum * log_prob)
    else:
        return nothing, nothing
    if labels is None:
        return loss, target_sum
    unknown = ~labels.known & ~labels.ignored
    loss = loss.masked_fill(unknown, torch.nan).masked_fill(labels.ignored, 0)
    return loss, target_sum.masked_fill(unknown, torch.nan).masked_fill(labels.ignored, 0)


def first_of_largest(local: RowStatistics, top: Tensor, spec: Spec, held: int, group: Any) -> Tensor:
    """Return the first class of the largest logit, NaN being larger than any number, by an all-reduce.

    What is reduced by the minimum is the class, in an order of three: those of a NaN, of the largest logit, the others.
    """
    assert local.prediction is not None
    order = torch.where(local.top.isnan(), 0, torch.where((local.top == top) & (held > 0), 1, 2))
    place = local.prediction + spec.first + order * spec.classes
    return all_reduce(place, "MIN", group) % spec.classes
