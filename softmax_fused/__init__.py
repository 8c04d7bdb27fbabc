"""Row-wise softmax and cross-entropy for PyTorch, forward and backward in fused Triton kernels."""

from softmax_fused import information
from softmax_fused.functional import cross_entropy
from softmax_fused.linear import linear_cross_entropy
from softmax_fused.modules import CrossEntropyLoss, LinearCrossEntropyLoss

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "__version__",
    "cross_entropy",
    "information",
    "linear_cross_entropy",
]
