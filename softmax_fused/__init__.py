"""Row-wise softmax and cross-entropy for PyTorch, forward and backward in fused Triton kernels."""

__version__ = "0.1.0"
