"""The loss of causal language models, as Hugging Face's transformers defines it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from softmax_fused import _errors
from softmax_fused.functional.linear import linear_cross_entropy
from softmax_fused.functional.loss import cross_entropy
from softmax_fused.functional.rows import cross_entropy_rows

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def causal_lm_loss(
    logits: Tensor | None,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    hidden_states: Tensor | None = None,
    lm_head_weight: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> Tensor:
    r"""Cross-entropy between each token's logits and the next token, as transformers' `ForCausalLMLoss`.

    .. math::
        \ell = -\frac{1}{M} \sum_{b,\, t:\, y_{b,t+1} \ne \mathrm{ignore\_index}}
        \log \mathrm{softmax}(z_{b,t})_{y_{b,t+1}}

    with M the number of terms, or `num_items_in_batch`. Takes the arguments of `ForCausalLMLoss` in its order, so that
    it can be the `loss_function` of a transformers model. The kernels read 16-bit logits as they are and sum in
    float32, where transformers copies the logits to float32 first.

    Args:
        logits: Logits (..., T, V); None where `hidden_states` and `lm_head_weight` are given.
        labels: Tokens (..., T), int64, which are shifted by one here; not read where `shift_labels` is given.
        vocab_size: Number of classes V.
        num_items_in_batch: What the sum is divided by; None for the number of labels that are not ignored. The number
            of labels in all micro-batches makes gradient accumulation exact.
        ignore_index: Label whose positions have no loss.
        shift_labels: The label of each position (..., T), already shifted.
        hidden_states: Input of the model's last linear layer (..., T, D). Its logits are then computed here, one chunk
            of rows at a time, by :func:`linear_cross_entropy`.
        lm_head_weight: Weight of that layer (V, D).
        lm_head_bias: Bias of that layer (V,).
        backend: "triton" for the kernels, "numba" for CPU code compiled by Numba, "torch" for pure torch operations,
            "auto" for what suits the device.
        kwargs: Not read. A model hands its loss whatever it was called with.

    Returns:
        A scalar; float32 for 16-bit logits, otherwise of their dtype.

    Raises:
        ValueError: Neither logits nor hidden states with a weight are given, or both are, or no labels are.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 4, 8), torch.tensor([[3, 1, 4, -100]])
        >>> causal_lm_loss(logits, labels, vocab_size=8)
        tensor(2.0794)
        >>> causal_lm_loss(logits, labels, vocab_size=8, num_items_in_batch=4)
        tensor(1.0397)
    """
    del kwargs
    if (logits is None) == (hidden_states is None) or (hidden_states is None) != (lm_head_weight is None):
        raise _errors.logits_or_hidden_states()
    if shift_labels is None:
        if labels is None:
            raise _errors.no_labels()
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    if hidden_states is not None and lm_head_weight is not None:
        target = shift_labels.reshape(-1).to(hidden_states.device)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        with float32_loss(rows):
            loss = linear_cross_entropy(
                rows,
                lm_head_weight,
                target,
                linear_bias=lm_head_bias,
                reduction=reduction,
                ignore_index=ignore_index,
                backend=backend,
            )
    else:
        assert logits is not None
        target = shift_labels.reshape(-1).to(logits.device)
        loss = loss_of_logits(logits.reshape(-1, vocab_size), target, ignore_index, reduction, backend)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def loss_of_logits(logits: Tensor, target: Tensor, ignore_index: int, reduction: str, backend: str) -> Tensor:
    """Return the mean or sum of the rows' losses, in float32 where the logits are 16-bit."""
    if logits.dtype not in HALF:
        return cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction, backend=backend)
    rows = cross_entropy_rows(
        logits, target, ignore_index=ignore_index, outputs=("loss",), dtype=torch.float32, backend=backend
    )
    total = rows.loss.sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total


def float32_loss(rows: Tensor) -> AbstractContextManager[None]:
    """Have the loss of 16-bit features computed in float32: autocast to their own type changes nothing else."""
    device = rows.device.type
    if rows.dtype not in HALF or torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=rows.dtype)
