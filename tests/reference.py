"""Cross-entropy in float64, written from the maths and not from torch's operator: the truth of every test.

a = w * ((1 - e) t + keep * e / C),  A = sum(a),  m = max z,  s = sum exp(z - m)
loss = A * log s - <a, z - m>,       d loss / d z = g * (A * softmax(z) - a)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    loss: Tensor
    grad: Tensor


def target_rows(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return t, class dimension last, and keep."""
    if target.shape == logits.shape:
        t = target.double().movedim(min(target.ndim - 1, 1), -1)
        return t, torch.ones(t.shape[:-1], dtype=torch.float64, device=t.device)
    classes = logits.shape[min(logits.ndim - 1, 1)]
    keep = (target != ignore_index).double()
    t = (torch.arange(classes, device=target.device) == target.unsqueeze(-1)).double() * keep.unsqueeze(-1)
    return t, keep


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    upstream: Tensor | float = 1.0,
) -> Truth:
    """Return the loss, and its gradient with respect to the logits times `upstream`, both in float64."""
    class_dim = min(logits.ndim - 1, 1)
    z = logits.detach().double().movedim(class_dim, -1)
    t, keep = target_rows(logits, target, ignore_index)
    classes = z.shape[-1]
    w = torch.ones(classes, dtype=torch.float64, device=z.device) if weight is None else weight.detach().double()
    a = w * ((1 - label_smoothing) * t + keep.unsqueeze(-1) * label_smoothing / classes)
    total = a.sum(-1)
    m = z.amax(-1, keepdim=True)
    exp = torch.exp(z - m)
    s = exp.sum(-1, keepdim=True)
    losses = total * s.squeeze(-1).log() - torch.where(a == 0, 0, a * (z - m)).sum(-1)
    losses = torch.where(keep == 0, 0, losses)
    g = torch.as_tensor(upstream, dtype=torch.float64, device=z.device)
    if reduction == "none":
        loss = losses
    elif reduction == "sum":
        loss = losses.sum()
    else:
        indices = target.shape != logits.shape
        denominator = ((t * w).sum(-1) * keep).sum() if indices else torch.tensor(float(keep.numel()))
        denominator = denominator if denominator else torch.tensor(torch.nan)
        loss, g = losses.sum() / denominator, g / denominator
    grad = g.expand(losses.shape).unsqueeze(-1) * (total.unsqueeze(-1) * exp / s - a)
    grad = torch.where(keep.unsqueeze(-1) == 0, 0, grad)
    return Truth(loss, grad.movedim(-1, class_dim))
