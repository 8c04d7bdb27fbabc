"""The kernel of each operation: a function of a call's address. Threads that share the rows run it at the same time."""

from __future__ import annotations

from typing import Any

from softmax_fused.backends.numba.call import FIELDS, LOSS, OF_SOFTMAX, ROWS, Stage
from softmax_fused.backends.numba.kernels.labels import label_row, label_tile
from softmax_fused.backends.numba.kernels.memory import Types, get
from softmax_fused.backends.numba.kernels.probabilities import probability_row, probability_tile
from softmax_fused.backends.numba.kernels.row_tiles import gradient_of_tile, outputs_of_tile
from softmax_fused.backends.numba.kernels.single_rows import gradient_of_row, outputs_of_row
from softmax_fused.backends.numba.kernels.softmax import gradient_row, gradient_tile, softmax_row, softmax_tile
from softmax_fused.backends.numba.kernels.stages import (
    prepare_labels,
    prepare_probabilities,
    reduce_losses,
    work_on_units,
)


def make_kernel(operation: str, types: Types, tiled: bool) -> Any:
    """Return the kernel of an operation, for rows in tiles or one by one."""
    if operation in OF_SOFTMAX:
        of_row, of_tile = (gradient_row, gradient_tile) if "gradient" in operation else (softmax_row, softmax_tile)
        return one_stage((of_tile if tiled else of_row)(types, "log" in operation), types.real)
    if operation == LOSS:
        of_row, of_tile = (label_row, label_tile) if types.target is None else (probability_row, probability_tile)
        return all_stages((of_tile if tiled else of_row)(types), types)
    of_row, of_tile = (outputs_of_row, outputs_of_tile) if operation == ROWS else (gradient_of_row, gradient_of_tile)
    return all_stages((of_tile if tiled else of_row)(types), types)


def one_stage(compute: Any, real: Any) -> Any:
    """Return a kernel without a target that would have to be checked first."""
    work = work_on_units(compute, real)

    def kernel(p):
        work(p)

    return kernel


def all_stages(compute: Any, types: Types) -> Any:
    """Return a kernel that does what the call's stage says."""
    prepare = prepare_labels(types.real) if types.target is None else prepare_probabilities
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
