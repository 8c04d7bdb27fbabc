"""The operations in pure torch: for CPU tensors, and for GPU tensors where Triton is absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmax_fused._spec import Backend
from softmax_fused.backends.torch import cross_entropy, row_outputs, slice_rows, vocab_parallel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from softmax_fused._spec import (
        CrossEntropyOperations,
        RowOutputsOperations,
        RowsKind,
        SliceRowsOperations,
        VocabParallelOperations,
    )

SMALL_CPU_NUMEL = 2**20
"""On the CPU, fewer logits than this go to torch's own operator. Below this size malloc reuses pages and chunking gains
nothing: (60000, 10) took 1.0 to 1.5 times as long on the chunked path."""

SMALL_CPU_BYTES = 2**25
"""The same in bytes of logits, for the loss alone, as torch allocates one buffer of that size: (4096, 1000) took 1.2
times as long in float32, (512, 32000) in bfloat16. From 32 MiB on, glibc returns a freed buffer to the system. With the
gradient, too, for 16-bit logits: converting chunks to float32 and back takes what one buffer instead of three saves."""


class TorchBackend(Backend):
    """Serves every device. Softmax alone is left to torch's own functions: no more can be had in torch operations."""

    name = "torch"
    cross_entropy: CrossEntropyOperations = cross_entropy
    row_outputs: RowOutputsOperations = row_outputs
    vocab_parallel: VocabParallelOperations = vocab_parallel
    slice_rows: SliceRowsOperations = slice_rows
    gradient_with_loss = ("cpu",)  # scaling the gradient costs less there than the softmax's exponentials once more

    least_numel = SMALL_CPU_NUMEL

    def leaves_to_torch(self, logits: Tensor, with_gradient: bool) -> bool:
        """Whether the logits are so few that torch's own operator is faster than the chunked path."""
        numel = logits.numel()
        if numel < SMALL_CPU_NUMEL:
            return True
        return numel * logits.itemsize < SMALL_CPU_BYTES and (logits.itemsize == 2 or not with_gradient)

    def leaves_rows_to_torch(self, logits: Tensor, with_gradient: bool, kind: RowsKind) -> bool:  # noqa: ARG002
        """Whether the same holds for several outputs of each row, of which the loss is one."""
        return self.leaves_to_torch(logits, with_gradient) and (logits.numel() < SMALL_CPU_NUMEL or not with_gradient)


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
