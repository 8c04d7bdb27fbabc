"""Data sets, batches of them, and users' own pictures."""

from softmax_fused.training.data.datasets import data_root, load_dataset, to_input

__all__ = ["data_root", "load_dataset", "to_input"]
