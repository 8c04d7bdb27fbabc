"""Row-wise softmax and cross-entropy for PyTorch, forward and backward in fused Triton kernels."""

from softmax_fused import information
from softmax_fused.functional import cross_entropy
from softmax_fused.modules import CrossEntropyLoss
from softmax_fused.patching import patch

__version__ = "0.1.0"

__all__ = ["CrossEntropyLoss", "__version__", "cross_entropy", "information", "patch"]
