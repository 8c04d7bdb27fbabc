"""Sparse targets, K classes a row, by any backend's operations for outputs of rows.

a_k = (1 - e) w t of a class that the target names,  U = -1/C sum_c w_c log p_c
loss = sum_k a_k (logsumexp - x_k) + e U,  gradient = g (sum_k a_k p - a) + e g (sum_c w_c / C p - w / C)

The backend reads the logits: it computes logsumexp, the other outputs that are asked for and, with label smoothing, U.
What is done here takes K numbers a row. The gradient at the named classes is computed apart, in the accumulation type,
and written over the backend's: where student and teacher agree, p - a would otherwise be the difference of two rounded
numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused._row_outputs import DIFFERENTIABLE, OUTPUTS, finite_log
from softmax_fused._spec import class_dim, row_shape
from softmax_fused.backends.torch.chunks import pieces, sum_classes
from softmax_fused.backends.torch.row_outputs import along_classes, effective
from softmax_fused.backends.torch.targets import ClassIndices, SparseProbabilities

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._row_outputs import RowOutputs
    from softmax_fused._spec import RowOutputsOperations, RowSpec, Spec, Upstream

IGNORED = -1
"""The ignored index of the class indices that stand in for the target."""

MOST_PAIRS = 2**22
"""Pairs of named classes that are compared at a time."""


def without_target(options: RowSpec) -> RowSpec:
    """Return what is asked of the backend, whose target is `labels`."""
    spec = options.spec
    wanted = {*options.outputs, "logsumexp"} - {"loss"}
    if spec.label_smoothing and "loss" in options.outputs:
        wanted.add("loss")  # with all of the target spread evenly, it is U
    of_labels = spec._replace(
        target=ClassIndices,
        ignore_index=IGNORED,
        label_smoothing=1.0 if spec.label_smoothing else 0.0,
        dtype=torch.float64,  # of logsumexp, for the digits of what is near it
    )
    return options._replace(spec=of_labels, outputs=tuple(name for name in OUTPUTS if name in wanted))


def labels(valid: Tensor, dim: int) -> Tensor:
    """Return class 0 for rows that name a class, and the ignored index for the others."""
    return valid.any(dim).long() - 1


def sum_of_same_class(label: Tensor, share: Tensor, dim: int) -> Tensor:
    """Return, for each class that a row names, the sum of its shares: it may be named more than once."""
    if label.shape[dim] == 1:
        return share
    label, share = label.movedim(dim, -1), share.movedim(dim, -1)
    found = torch.empty_like(share)
    for part in pieces(label.shape[-1], label.numel(), MOST_PAIRS):
        same = label[..., part].unsqueeze(-1) == label.unsqueeze(-2)
        found[..., part] = torch.where(same, share.unsqueeze(-2), 0).sum(-1)
    return found.movedim(-1, dim)


def log_probs(logits: Tensor, label: Tensor, logsumexp: Tensor, options: RowSpec, scale: Tensor | None) -> Tensor:
    """Return log p of named classes, from the logsumexp (N, 1, d1..dk) in float64: no digit is lost to its size."""
    x, _ = effective(logits.gather(class_dim(logits.ndim), label), options, scale)
    return (x - logsumexp).to(options.spec.acc)


def sum_named(x: Tensor, dim: int, spec: Spec) -> Tensor:
    """Return the sums over the named classes."""
    return sum_classes(x, spec).squeeze(1) if dim else sum_classes(x.unsqueeze(0), spec).view(())


def split_double(values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return float64 numbers as the sum of two of `dtype`."""
    high = values.to(dtype)
    return [high, (values - high).masked_fill(~high.isfinite(), 0).to(dtype)]


class SparseRows:
    """Operations for outputs of rows whose target is sparse."""

    def __init__(self, operations: RowOutputsOperations) -> None:
        self.operations = operations

    def saved_shape(self, logits: Tensor) -> tuple[int, int]:
        """Return the shape of what `forward` saves: the backend's numbers, then logsumexp in two and the entropy."""
        saved = self.operations.saved_shape(logits)
        return 3 + (0 if saved is None else saved[0]), logits.numel() // logits.shape[class_dim(logits.ndim)]

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: RowSpec,
        save: bool,
        row_scale: Tensor | None = None,
    ) -> tuple[RowOutputs, Tensor | None]:
        """Compute the outputs asked for and, with `save`, what `gradient` needs."""
        dim, spec = class_dim(logits.ndim), options.spec
        label, share, valid = SparseProbabilities.entries(target, logits.shape[dim], weight, spec, dim)
        uniform = weight if spec.label_smoothing else None
        out, stats = self.operations.forward(
            logits, labels(valid, dim), uniform, without_target(options), save, row_scale=row_scale
        )
        found = {name: getattr(out, name) if name in options.outputs else None for name in OUTPUTS}
        if "loss" in options.outputs:
            log_p = log_probs(logits, label, out.logsumexp.unsqueeze(dim), options, along_classes(row_scale, logits))
            loss = -sum_named((share * log_p).masked_fill(share == 0, 0), dim, spec)
            if spec.label_smoothing:
                loss += spec.label_smoothing * out.loss
            found["loss"] = loss.masked_fill(~valid.any(dim), 0)
        saved = None
        if save:
            saved = logits.new_empty(self.saved_shape(logits), dtype=spec.acc)
            if stats is not None:
                saved[:-3] = stats
            saved[-3], saved[-2] = split_double(out.logsumexp.flatten(), spec.acc)
            if out.entropy is not None:
                saved[-1] = out.entropy.flatten()
        typed = {name: it.to(OUTPUTS[name].dtype or spec.dtype) for name, it in found.items() if it is not None}
        return out._replace(**{**found, **typed}), saved

    def gradient(
        self,
        upstream: Upstream,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        stats: Tensor | None,
        options: RowSpec,
        row_scale: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the logits from those of the differentiable outputs, None where there is none."""
        assert stats is not None
        dim, spec, scale = class_dim(logits.ndim), options.spec, along_classes(row_scale, logits)
        rows = row_shape(logits.shape)
        given = {name: g.to(spec.acc) for name, g in zip(DIFFERENTIABLE, upstream, strict=True) if g is not None}
        label, share, valid = SparseProbabilities.entries(target, logits.shape[dim], weight, spec, dim)
        high, low, entropy = (it.view(rows).unsqueeze(dim) for it in stats[-3:])
        logsumexp = high.double() + low
        log_p = log_probs(logits, label, logsumexp, options, scale)  # before the logits are written over
        _, slope = effective(logits.gather(dim, label), options, scale)
        p = log_p.exp()
        at_label = torch.zeros_like(p)
        if "loss" in given:
            g = given.pop("loss").masked_fill(~valid.any(dim), 0)
            total = sum_named(share, dim, spec)
            given["logsumexp"] = given.get("logsumexp", 0) + total * g
            at_label -= sum_of_same_class(label, share, dim) * g.unsqueeze(dim)
            if spec.label_smoothing:
                given["loss"] = spec.label_smoothing * g
                weights = p.new_ones(logits.shape[dim]) if weight is None else weight.to(spec.acc)
                of_class = weights.sum() * p - weights[label]
                at_label += of_class * (given["loss"] / logits.shape[dim]).unsqueeze(dim)
        if "logsumexp" in given:
            at_label += p * given["logsumexp"].unsqueeze(dim)
        if "entropy" in given:
            at_label -= p * (finite_log(log_p) + entropy) * given["entropy"].unsqueeze(dim)
        inner = stats[:-3] if len(stats) > 3 else None
        uniform = weight if spec.label_smoothing else None
        grad = self.operations.gradient(
            [given.get(name) for name in DIFFERENTIABLE], logits, labels(valid, dim), uniform, inner,
            without_target(options), row_scale, grad,
        )  # fmt: skip
        unused = torch.stack([g == 0 for g in given.values()]).all(0).unsqueeze(dim)
        return write_chosen(grad, label, at_label * slope, unused, logsumexp, dim)


def write_chosen(grad: Tensor, label: Tensor, at_label: Tensor, unused: Tensor, logsumexp: Tensor, dim: int) -> Tensor:
    """Write the gradient of some classes of each row over `grad`, which is 0 in rows that nothing is asked of."""
    grad.scatter_(dim, label, at_label.masked_fill(unused, 0).to(grad.dtype))
    bad = unused & ~logsumexp.isfinite()  # kernels do not read such rows; in torch operations 0 meets NaN
    if grad.is_cpu and bool(bad.any()):
        grad.masked_fill_(bad, 0)
    return grad
