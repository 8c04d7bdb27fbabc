"""Data sets, batches of them, and pictures of one's own."""

from softmax_fused.training.data.datasets import data_root, load_dataset, to_input

__all__ = ["data_root", "load_dataset", "to_input"]
