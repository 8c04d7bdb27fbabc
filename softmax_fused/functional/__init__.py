"""The documented functions, their autograd functions and custom operators."""

from softmax_fused._dispatch import explain_backend
from softmax_fused._row_outputs import RowOutputs
from softmax_fused.functional.activation import log_softmax, softmax
from softmax_fused.functional.causal_lm import causal_lm_loss
from softmax_fused.functional.likelihood import log_prob
from softmax_fused.functional.linear import linear_cross_entropy
from softmax_fused.functional.linear_rows import linear_cross_entropy_rows
from softmax_fused.functional.loss import cross_entropy
from softmax_fused.functional.rows import cross_entropy_rows
from softmax_fused.functional.sparse import SparseTarget, sparse_target

__all__ = [
    "RowOutputs",
    "SparseTarget",
    "causal_lm_loss",
    "cross_entropy",
    "cross_entropy_rows",
    "explain_backend",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "log_prob",
    "log_softmax",
    "softmax",
    "sparse_target",
]
