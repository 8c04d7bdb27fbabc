"""Losses of logits that ranks hold parts of: classes divided among them, and DTensors."""

from softmax_fused.distributed.linear import linear_cross_entropy, linear_cross_entropy_rows
from softmax_fused.distributed.rows import cross_entropy_rows
from softmax_fused.distributed.vocab_parallel import cross_entropy

__all__ = ["cross_entropy", "cross_entropy_rows", "linear_cross_entropy", "linear_cross_entropy_rows"]
