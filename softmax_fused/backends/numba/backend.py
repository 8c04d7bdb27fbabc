"""The compiled operations as a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softmax_fused import _errors
from softmax_fused._spec import Backend
from softmax_fused.backends.numba import cross_entropy, row_outputs, softmax
from softmax_fused.backends.numba.compilation import FAILED
from softmax_fused.backends.numba.pages import FRESH_BYTES
from softmax_fused.backends.torch import BACKEND as TORCH

if TYPE_CHECKING:
    from torch import Tensor

    from softmax_fused._spec import CrossEntropyOperations, RowOutputsOperations, RowsKind, SoftmaxOperations


LEAST_SOFTMAX_BYTES = FRESH_BYTES
"""From so many bytes on softmax is faster than torch's, which wins below by its vectors, and loses here by page faults:
(16384, 1000) took 0.4 times as long with its gradient, (1000, 100) 1.5 times."""

VECTOR = 16
"""Fewer classes than this fill no vector of 512 bits, and torch computes them one by one."""

LEAST_NUMEL = {(True, True): 2**11, (True, False): 2**16, (False, True): 2**10, (False, False): 2**20}
"""How many logits there are at least for the compiled code to be faster, by whether the gradient is wanted and whether
the classes are that few. Loss and gradient of (256, 10) took 0.8 times as long as in torch, of (64, 1000) 0.8 times, of
(256, 100) 1.3 times; the loss alone of (1000, 100) 1.5 times."""


class NumbaBackend(Backend):
    """Serves the CPU."""

    name = "numba"
    cross_entropy: CrossEntropyOperations = cross_entropy
    row_outputs: RowOutputsOperations = row_outputs
    softmax: SoftmaxOperations = softmax
    gradient_with_loss = ("cpu",)  # while a row is in the cache

    def refusal(self, device_type: str) -> str | None:
        """Say what other tensors need."""
        return None if device_type == "cpu" else _errors.OTHER_TENSORS_FOR_NUMBA

    least_numel = min(LEAST_NUMEL.values())

    def leaves_to_torch(self, logits: Tensor, with_gradient: bool) -> bool:
        """Whether there are so few logits that torch's operator is faster: a call takes less time there, a row more."""
        if FAILED:
            return TORCH.leaves_to_torch(logits, with_gradient)
        few_classes = logits.shape[1 if logits.ndim > 1 else 0] < VECTOR
        return logits.numel() < LEAST_NUMEL[with_gradient, few_classes]

    def leaves_rows_to_torch(self, logits: Tensor, with_gradient: bool, kind: RowsKind) -> bool:
        """Whether torch's operators are faster: not for several outputs, which take a pass each there.

        A loss alone takes two passes here, as the gradient of each row waits for its upstream gradient: (1000, 1000)
        took 1.2 times as long as torch's, with the prediction 0.7 times.
        """
        return bool(FAILED or kind != "several") and TORCH.leaves_rows_to_torch(logits, with_gradient, kind)

    def leaves_softmax_to_torch(self, input: Tensor, dim: int) -> bool:
        """Whether the numbers are few, and the classes, if they lie side by side, are not: torch's is faster then."""
        if FAILED or input.nbytes >= LEAST_SOFTMAX_BYTES:
            return bool(FAILED)
        few_side_by_side = input.shape[dim] < VECTOR and input.stride(dim) == 1
        return not few_side_by_side or input.numel() < LEAST_NUMEL[True, True]


BACKEND = NumbaBackend()
