"""The operations in pure torch: for CPU tensors, and for GPU tensors where Triton is absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmax_fused._spec import Backend
from softmax_fused.backends.torch import cross_entropy, row_outputs, slice_rows, vocab_parallel

if TYPE_CHECKING:
    import torch

    from softmax_fused._spec import (
        CrossEntropyOperations,
        RowOutputsOperations,
        SliceRowsOperations,
        VocabParallelOperations,
    )


class TorchBackend(Backend):
    """Serves every device. Softmax alone is left to torch's own functions: no more can be had in torch operations."""

    name = "torch"
    cross_entropy: CrossEntropyOperations = cross_entropy
    row_outputs: RowOutputsOperations = row_outputs
    vocab_parallel: VocabParallelOperations = vocab_parallel
    slice_rows: SliceRowsOperations = slice_rows
    gradient_with_loss = ("cpu",)  # scaling the gradient costs less there than the softmax's exponentials once more


BACKEND = TorchBackend()


def suits(device: torch.device) -> tuple[bool, str]:
    """Return that it takes what no other backend does, and why."""
    if device.type == "cpu":
        return True, "CPU tensors take the pure-torch path"
    served = f"{device.type} tensors are served by torch.nn.functional.cross_entropy"
    return True, "" if device.type == "cuda" else served


def load() -> Backend:
    """Return the backend, which is there already: others fall back on it."""
    return BACKEND
