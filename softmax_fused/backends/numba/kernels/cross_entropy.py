"""The kernel of the loss: its stages."""

from __future__ import annotations

from typing import Any

from softmax_fused.backends.numba.call import FIELDS, Stage
from softmax_fused.backends.numba.kernels.labels import label_row, label_tile
from softmax_fused.backends.numba.kernels.memory import Types, get
from softmax_fused.backends.numba.kernels.probabilities import probability_row, probability_tile
from softmax_fused.backends.numba.kernels.stages import (
    prepare_labels,
    prepare_probabilities,
    reduce_losses,
    work_on_units,
)


def make_kernel(types: Types, tiled: bool) -> Any:
    """Return the kernel, a function of a call's address. Threads that share the rows run it at the same time."""
    if types.target is None:
        prepare, compute = prepare_labels(types.real), (label_tile if tiled else label_row)(types)
    else:
        prepare, compute = prepare_probabilities, (probability_tile if tiled else probability_row)(types)
    work, reduce = work_on_units(compute, types.real), reduce_losses(types.real)

    def kernel(p):
        stage = get(p, FIELDS.stage)
        if stage == Stage.everything or stage == Stage.prepare:
            prepare(p)
            if get(p, FIELDS.wrong_labels):
                return
        if stage == Stage.everything or stage == Stage.rows:
            work(p)
        if stage == Stage.everything or stage == Stage.reduce:
            reduce(p)

    return kernel
