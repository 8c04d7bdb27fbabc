"""Losses of logits that ranks hold parts of: classes divided among them, and DTensors."""

from softmax_fused.distributed.vocab_parallel import cross_entropy

__all__ = ["cross_entropy"]
