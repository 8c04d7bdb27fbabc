r"""Information theory of probability distributions: how surprising outcomes are, how far apart two distributions lie.

Every function comes twice, for probabilities and, its name ending in `_from_logits`, for logits z with p = softmax(z);
the second is exact where probabilities would have been rounded to 0. What holds for all:

- Distributions lie along `dim`; other axes broadcast. That probabilities are not negative and sum to 1 is not checked:
  it would make the host wait for the device.
- float16 and bfloat16 are computed in float32; results have the arguments' dtype, the wider one of two.
- `unit` is "nats" (natural logarithm) or "bits" (base 2).
- 0 log 0 = 0: outcomes that P excludes count nothing. Where Q excludes what P allows, cross-entropy and divergence are
  infinite. Logits of -inf stand for probability 0.
- Everything is differentiable. Slopes that are infinite at p = 0, as the entropy's is, are infinite for probabilities;
  through logits they meet a factor of 0 and vanish, so masked distributions are to be given as logits.

References:
    Shannon, A mathematical theory of communication, 1948. Kullback and Leibler, On information and sufficiency, 1951.
    Zhang et al., Dive into Deep Learning, section 22.11 (information theory).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from softmax_fused import _errors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "cross_entropy",
    "cross_entropy_from_logits",
    "entropy",
    "entropy_from_logits",
    "information_content",
    "information_content_from_logits",
    "kl_divergence",
    "kl_divergence_from_logits",
    "perplexity",
    "perplexity_from_logits",
]

UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}


def information_content(p: Tensor, *, unit: str = "nats") -> Tensor:
    r"""Information in learning that an outcome of probability p occurred: :math:`I(p) = -\log p`.

    Args:
        p: Probabilities, any shape, floating point.
        unit: "nats" or "bits".

    Returns:
        A tensor of p's shape and dtype; infinite where p is 0.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not a floating point tensor.

    Example:
        >>> information_content(torch.tensor([1.0, 0.5, 0.125]), unit="bits")
        tensor([0., 1., 3.])

    References:
        Shannon 1948. Zhang et al., Dive into Deep Learning, section 22.11.1.
    """
    _check("p", p, dimensions=0)
    return _in_unit(0 - _wide(p).log(), unit, p.dtype)  # not -log, whose 0 would be -0


def information_content_from_logits(logits: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Information content of every outcome of softmax(z): :math:`I_c = \log \sum_k \exp z_k - z_c`.

    Args:
        logits: Logits, any shape of at least one dimension, floating point.
        dim: Axis of the outcomes.
        unit: "nats" or "bits".

    Returns:
        A tensor of the logits' shape and dtype; infinite where a logit is -inf.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not a floating point tensor, or one without dimensions.
        IndexError: No such axis.

    Example:
        >>> information_content_from_logits(torch.tensor([0.0, 0.0, -1e4]), unit="bits")
        tensor([1.0000e+00, 1.0000e+00, 1.4428e+04])

    References:
        Shannon 1948.
    """
    _check("logits", logits)
    return _in_unit(-_wide(logits).log_softmax(dim), unit, logits.dtype)


def entropy(p: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Entropy, the mean information content of an outcome: :math:`H(P) = -\sum_c p_c \log p_c`.

    Args:
        p: Probabilities, any shape of at least one dimension, floating point.
        dim: Axis that sums to 1.
        unit: "nats" or "bits".

    Returns:
        A tensor of p's shape without `dim`, from 0 (one outcome is certain) to log C (all are equally likely).

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not a floating point tensor, or one without dimensions.
        IndexError: No such axis.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0]]), unit="bits")
        tensor([1.5000, 0.0000])

    References:
        Shannon 1948. Zhang et al., Dive into Deep Learning, section 22.11.2.
    """
    _check("p", p)
    return _in_unit(torch.special.entr(_wide(p)).sum(dim), unit, p.dtype)


def entropy_from_logits(logits: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Entropy of softmax(z); its gradient is :math:`-p_c (\log p_c + H)`, finite everywhere.

    Args:
        logits: Logits, any shape of at least one dimension, floating point; a row that is -inf throughout gives NaN.
        dim: Axis of the outcomes.
        unit: "nats" or "bits".

    Returns:
        A tensor of the logits' shape without `dim`.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not a floating point tensor, or one without dimensions.
        IndexError: No such axis.

    Example:
        >>> entropy_from_logits(torch.tensor([1e4, 1e4, -torch.inf]), unit="bits")
        tensor(1.)

    References:
        Shannon 1948.
    """
    _check("logits", logits)
    log_p = _wide(logits).log_softmax(dim)
    return _in_unit(_mean(log_p, -log_p, dim), unit, logits.dtype)


def cross_entropy(p: Tensor, q: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Cross-entropy, what outcomes of P cost in a code made for Q: :math:`H(P, Q) = -\sum_c p_c \log q_c`.

    It equals H(P) + KL(P || Q), so it is smallest, H(P), where Q is P. The loss of classifiers is
    `softmax_fused.cross_entropy`, which takes logits for Q and class indices or probabilities for P.

    Args:
        p: Probabilities of what happens, floating point.
        q: Probabilities that the model gives; its shape and p's broadcast, with equal sizes along `dim`.
        dim: Axis that sums to 1, of the shape broadcast.
        unit: "nats" or "bits".

    Returns:
        A tensor of the broadcast shape without `dim`; infinite where q is 0 and p is not.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not floating point tensors, or shapes that do not fit.
        IndexError: No such axis.

    Example:
        >>> cross_entropy(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.0]))
        tensor(0.8370)

    References:
        Zhang et al., Dive into Deep Learning, section 22.11.5.
    """
    p, q, dtype = _pair("p", p, "q", q, dim)
    return _in_unit(0 - _p_log_q(p, q).sum(dim), unit, dtype)


def cross_entropy_from_logits(p_logits: Tensor, q_logits: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Cross-entropy of P = softmax(p_logits) and Q = softmax(q_logits).

    Args:
        p_logits: Logits of what happens (a teacher, say), floating point.
        q_logits: Logits of the model; its shape and p_logits' broadcast, with equal sizes along `dim`.
        dim: Axis of the outcomes, of the shape broadcast.
        unit: "nats" or "bits".

    Returns:
        A tensor of the broadcast shape without `dim`; infinite where a logit of Q is -inf and P's is not.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not floating point tensors, or shapes that do not fit.
        IndexError: No such axis.

    Example:
        >>> cross_entropy_from_logits(torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([0.0, 1e4, -torch.inf]))
        tensor(5000.)

    References:
        Zhang et al., Dive into Deep Learning, section 22.11.5.
    """
    p, q, dtype = _pair("p_logits", p_logits, "q_logits", q_logits, dim)
    return _in_unit(_mean(p.log_softmax(dim), -q.log_softmax(dim), dim), unit, dtype)


def kl_divergence(p: Tensor, q: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Kullback-Leibler divergence of Q from P: :math:`\mathrm{KL}(P \| Q) = \sum_c p_c \log (p_c / q_c)`.

    Args:
        p: Probabilities of what happens, floating point.
        q: Probabilities that the model gives; its shape and p's broadcast, with equal sizes along `dim`.
        dim: Axis that sums to 1, of the shape broadcast.
        unit: "nats" or "bits".

    Returns:
        A tensor of the broadcast shape without `dim`: 0 where P and Q are equal, else positive up to rounding; infinite
        where q is 0 and p is not. Not symmetric.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not floating point tensors, or shapes that do not fit.
        IndexError: No such axis.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> kl_divergence(p, q, unit="bits"), kl_divergence(q, p, unit="bits")
        (tensor(0.2075), tensor(0.1887))

    References:
        Kullback and Leibler 1951. Zhang et al., Dive into Deep Learning, section 22.11.4.
    """
    p, q, dtype = _pair("p", p, "q", q, dim)
    return _in_unit((torch.special.entr(p) + _p_log_q(p, q)).sum(dim).neg(), unit, dtype)


def kl_divergence_from_logits(p_logits: Tensor, q_logits: Tensor, dim: int = -1, *, unit: str = "nats") -> Tensor:
    r"""Kullback-Leibler divergence of Q = softmax(q_logits) from P = softmax(p_logits).

    Args:
        p_logits: Logits of what happens (a teacher, say), floating point.
        q_logits: Logits of the model; its shape and p_logits' broadcast, with equal sizes along `dim`.
        dim: Axis of the outcomes, of the shape broadcast.
        unit: "nats" or "bits".

    Returns:
        A tensor of the broadcast shape without `dim`; infinite where a logit of Q is -inf and P's is not.

    Raises:
        ValueError: Unknown unit.
        RuntimeError: Not floating point tensors, or shapes that do not fit.
        IndexError: No such axis.

    Example:
        >>> kl_divergence_from_logits(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0]), unit="bits")
        tensor(1.)

    References:
        Kullback and Leibler 1951.
    """
    p, q, dtype = _pair("p_logits", p_logits, "q_logits", q_logits, dim)
    log_p = p.log_softmax(dim)
    return _in_unit(_mean(log_p, log_p - q.log_softmax(dim), dim), unit, dtype)


def perplexity(p: Tensor, dim: int = -1) -> Tensor:
    r"""Perplexity, the number of equally likely outcomes that are as hard to predict: :math:`\exp H(P)`.

    That of a model on data, as language models report it, is `cross_entropy(...).mean().exp()`, in nats.

    Args:
        p: Probabilities, any shape of at least one dimension, floating point.
        dim: Axis that sums to 1.

    Returns:
        A tensor of p's shape without `dim`, from 1 to the number of outcomes. It has no unit.

    Raises:
        RuntimeError: Not a floating point tensor, or one without dimensions.
        IndexError: No such axis.

    Example:
        >>> perplexity(torch.tensor([0.25, 0.25, 0.25, 0.25]))
        tensor(4.)

    References:
        Jelinek et al., Perplexity: a measure of the difficulty of speech recognition tasks, 1977.
    """
    _check("p", p)
    return entropy(_wide(p), dim).exp().to(p.dtype)


def perplexity_from_logits(logits: Tensor, dim: int = -1) -> Tensor:
    r"""Perplexity of softmax(z).

    Args:
        logits: Logits, any shape of at least one dimension, floating point; a row that is -inf throughout gives NaN.
        dim: Axis of the outcomes.

    Returns:
        A tensor of the logits' shape without `dim`, from 1 to the number of outcomes. It has no unit.

    Raises:
        RuntimeError: Not a floating point tensor, or one without dimensions.
        IndexError: No such axis.

    Example:
        >>> perplexity_from_logits(torch.tensor([7.0, 7.0, 7.0, -torch.inf]))
        tensor(3.)

    References:
        Jelinek et al., Perplexity: a measure of the difficulty of speech recognition tasks, 1977.
    """
    _check("logits", logits)
    return entropy_from_logits(_wide(logits), dim).exp().to(logits.dtype)


def _p_log_q(p: Tensor, q: Tensor) -> Tensor:
    """Return p log q; where both are 0, xlogy's gradient 0 / 0 would be NaN, so there q stands aside."""
    product: Tensor = torch.special.xlogy(p, torch.where((p == 0) & (q == 0), 1.0, q))
    return product


def _mean(log_p: Tensor, values: Tensor, dim: int) -> Tensor:
    """Return the mean of values under P, never NaN by 0 times infinity.

    Probability 0 (log_p of -inf) leaves a value out whatever it is. A probability that exp merely rounds to 0 does not:
    an infinite value makes the mean infinite.
    """
    excluded, endless = log_p == -torch.inf, values == torch.inf
    terms = log_p.exp() * torch.where(excluded | endless, 0.0, values)
    return torch.where(endless & ~excluded, torch.inf, terms).sum(dim)


def _wide(x: Tensor) -> Tensor:
    """Return it in a type to compute in."""
    return x if x.dtype == torch.float64 else x.float()


def _in_unit(nats: Tensor, unit: str, dtype: torch.dtype) -> Tensor:
    if unit not in UNITS:
        raise _errors.unknown_unit(unit)
    return (nats if unit == "nats" else nats * UNITS[unit]).to(dtype)


def _check(name: str, x: Tensor, dimensions: int = 1) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < dimensions:
        raise _errors.no_distribution(name, x, with_axis=dimensions > 0)


def _pair(p_name: str, p: Tensor, q_name: str, q: Tensor, dim: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return both in one shape, in types to compute in, and the dtype of the result."""
    _check(p_name, p)
    _check(q_name, q)
    mismatch = _errors.different_outcomes((p_name, q_name), (p.shape, q.shape), dim)
    try:
        shape = torch.broadcast_shapes(p.shape, q.shape)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise mismatch from error
    if not -len(shape) <= dim < len(shape):
        raise _errors.no_such_axis(shape, dim)
    axis = dim % len(shape) - len(shape)  # from the right, as broadcasting counts
    if any(x.ndim < -axis or x.shape[axis] != shape[axis] for x in (p, q)):
        raise mismatch
    return _wide(p).expand(shape), _wide(q).expand(shape), torch.promote_types(p.dtype, q.dtype)
