"""Row-wise softmax and cross-entropy for PyTorch, forward and backward in fused Triton kernels."""

from softmax_fused import distributed, information
from softmax_fused.functional import (
    RowOutputs,
    SparseTarget,
    causal_lm_loss,
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    log_prob,
    log_softmax,
    softmax,
    sparse_target,
)
from softmax_fused.modules import CrossEntropyLoss, LinearCrossEntropyLoss, LogSoftmax, Softmax
from softmax_fused.patching import patch

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "RowOutputs",
    "Softmax",
    "SparseTarget",
    "__version__",
    "causal_lm_loss",
    "cross_entropy",
    "cross_entropy_rows",
    "distributed",
    "information",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "log_prob",
    "log_softmax",
    "patch",
    "softmax",
    "sparse_target",
]
