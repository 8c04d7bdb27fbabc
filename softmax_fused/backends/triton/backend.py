"""The kernels' operations as a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmax_fused import _errors
from softmax_fused._spec import Backend
from softmax_fused.backends.triton import cross_entropy, launch, row_outputs, slice_rows, softmax, vocab_parallel

if TYPE_CHECKING:
    from softmax_fused._spec import (
        CrossEntropyOperations,
        RowOutputsOperations,
        SliceRowsOperations,
        SoftmaxOperations,
        VocabParallelOperations,
    )


class TritonBackend(Backend):
    """Serves GPUs and, in Triton's interpreter, the CPU."""

    name = "triton"
    cross_entropy: CrossEntropyOperations = cross_entropy
    row_outputs: RowOutputsOperations = row_outputs
    softmax: SoftmaxOperations = softmax
    vocab_parallel: VocabParallelOperations = vocab_parallel
    slice_rows: SliceRowsOperations = slice_rows

    def refusal(self, device_type: str) -> str | None:
        """Say what CPU tensors need."""
        return _errors.CPU_TENSORS_FOR_KERNELS if device_type == "cpu" and not launch.INTERPRETED else None


BACKEND = TritonBackend()
