"""Row-wise softmax and cross-entropy for PyTorch in fused Triton kernels, as the `kernels` package loads it."""

from softmax_fused import distributed, layers
from softmax_fused.functional import (
    RowOutputs,
    causal_lm_loss,
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    log_prob,
    log_softmax,
    softmax,
)
from softmax_fused.modules import CrossEntropyLoss, LinearCrossEntropyLoss, LogSoftmax, Softmax

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "RowOutputs",
    "Softmax",
    "causal_lm_loss",
    "cross_entropy",
    "cross_entropy_rows",
    "distributed",
    "layers",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "log_prob",
    "log_softmax",
    "softmax",
]
