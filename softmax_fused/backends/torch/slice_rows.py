"""The outputs of rows whose logits are a slice of the classes, in pure torch: a slice's statistics, and its gradient.

m = max x,  s = sum exp(x - m),  H = log s - sum exp(x - m) (x - m) / s  of the slice's effective logits x;
gradient by x = p * (g_loss * A + g_lse - g_log_prob - g_H * (log p + H)) - g_loss * a + g_log_prob * t with
p = exp(x - m - log s), and with m, s, A and H of all slices together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softmax_fused._row_outputs import finite_log
from softmax_fused._spec import RowStatistics, row_shape
from softmax_fused.backends.torch import chunks
from softmax_fused.backends.torch.chunks import with_classes
from softmax_fused.backends.torch.cross_entropy import canonicalize
from softmax_fused.backends.torch.row_outputs import coefficients, effective, named, plain
from softmax_fused.backends.torch.targets import accumulated, kind, product
from softmax_fused.backends.torch.vocab_parallel import IGNORED, by_label
from softmax_fused.backends.torch.vocab_parallel import prepare as prepare

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import RowSpec, Spec, Upstream


def statistics(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowSpec) -> RowStatistics:
    """Return what a slice knows of each row."""
    z, t, _ = canonicalize(logits.detach(), target, None)
    spec, shape, indices = options.spec, row_shape(z.shape), options.spec.target.has_labels
    found = RowStatistics.allocate(logits, options)
    w = accumulated(weight, z.ndim, spec)
    for part in chunks.row_chunks(z, chunks.CHUNK) if z.numel() else []:
        at = with_classes(part)
        kinds = (slice(None), *part)
        here = RowStatistics(found.numbers.view(-1, *shape)[kinds], None)
        x, _ = effective(z[at], options)
        top, prediction = x.max(1, keepdim=True)
        shifted = x - top.clamp(min=torch.finfo(spec.acc).min)  # -inf where the slice's logits all are
        e = shifted.exp()
        others = e.scatter(1, prediction, 0).sum(1, keepdim=True)
        log_s = others.log1p().masked_fill_(top == -torch.inf, -torch.inf).masked_fill_(top == torch.inf, torch.nan)
        here.m.copy_(top.squeeze(1))
        here.top.copy_(here.m)
        here.log_s.copy_(log_s.squeeze(1))
        if found.prediction is not None:
            found.prediction.view(shape)[part] = prediction.squeeze(1)
        label = t[part].unsqueeze(1) if indices else None
        log_p = None
        if label is not None:  # where another slice has the label, log p means nothing
            log_p = shifted.gather(1, label.clamp(min=0)).sub_(log_s)
            here.log_prob.copy_(log_p.squeeze(1))
        if spec.has_dense_target:
            a = kind(spec).smoothed_target(t[part if indices else at], shifted, w, spec)
            dot = product(a, shifted).masked_fill_(shifted == 0, 0).sum(1, keepdim=True)  # also for infinite weights
            total = a.sum(1, keepdim=True)
            loss = total * log_s - dot
            if label is not None and log_p is not None:
                a_label = share_of_label(label, w, spec)
                total, loss = total + a_label, loss - product(a_label, log_p)
            here.target_sum.copy_(total.squeeze(1))
            here.dense_loss.copy_(loss.squeeze(1))
        if "entropy" in options.outputs:
            u = shifted.mul_(e).masked_fill_(e == 0, 0).sum(1)
            here.entropy.copy_(here.log_s - u / (1 + others.squeeze(1)))
    return found


def share_of_label(label: Tensor, w: Tensor | None, spec: Spec) -> Tensor:
    """Return what a has at the label's class alone; 0 where another slice has it."""
    confidence = label.new_full((), 1 - spec.label_smoothing, dtype=spec.acc)
    a = confidence if w is None else confidence * w.flatten()[label.clamp(min=0)]
    return torch.where((label >= 0) & (confidence != 0), a, 0)


def gradient(
    upstream: Upstream,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    options: RowSpec,
    grad: Tensor,
) -> None:
    """Fill `grad`, which may be the logits, with the gradient of the slice from the statistics of all slices."""
    z, t, out = canonicalize(logits, target, grad)
    assert out is not None
    spec, indices = options.spec, options.spec.target.has_labels
    given = named(upstream, options, row_shape(z.shape))
    m, log_s, total, entropy, _ = (it.view(row_shape(z.shape)).unsqueeze(1) for it in stats)
    w = accumulated(weight, z.ndim, spec)
    for part in chunks.row_chunks(z, chunks.CHUNK):
        at = with_classes(part)
        x, slope = effective(z[at], options)
        log_p = torch.sub(x, m[at]).sub_(log_s[at])
        g = {name: values[part].unsqueeze(1) for name, values in given.items()}
        target_of_part = t[part].unsqueeze(1) if indices else t[at]
        found = by_loss(log_p, g, target_of_part, w, total[at], spec)
        if "logsumexp" in g or "entropy" in g:
            found.append(by_softmax(log_p, g, entropy[at], target_of_part if indices else None))
        by_x = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        out[at] = by_x.mul_(slope) if options.changes_logits else by_x


def by_softmax(log_p: Tensor, g: dict[str, Tensor], entropy: Tensor, label: Tensor | None) -> Tensor:
    """Return the gradient by x from those of log-sum-exp and entropy.

    Rows that ask for neither have none, also where their logits are not finite, if they are ignored.
    """
    given = {name: it for name, it in g.items() if name in ("logsumexp", "entropy")}
    c, d = coefficients(given, entropy)
    by_x: Tensor = log_p.exp() * (c + d * finite_log(log_p) if isinstance(d, torch.Tensor) else c)
    if label is not None:
        unused = label == IGNORED
        for values in given.values():
            unused = unused & (values == 0)
        by_x.masked_fill_(unused, 0)
    return by_x


def by_loss(
    log_p: Tensor, g: dict[str, Tensor], target: Tensor, w: Tensor | None, total: Tensor, spec: Spec
) -> list[Tensor]:
    """Return the gradients by x from those of the loss and of log p of the label."""
    found = []
    if "loss" in g and spec.target.has_labels:
        found.append(log_p.clone())
        by_label(found[-1], g["loss"], target, w, total, spec)
    elif "loss" in g:
        a = kind(spec).smoothed_target(target, log_p, w, spec)
        found.append(log_p.exp().mul_(total).sub_(a).mul_(g["loss"]))
    if "log_prob" in g:
        found.append(log_p.clone())
        by_label(found[-1], -g["log_prob"], target, None, None, plain(spec))
    return found
