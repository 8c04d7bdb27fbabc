"""From the losses of rows to their sum or mean, over all programs in a fixed order."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import convert
from .rows import count_rows, program_rows
from .targets import denominator_share, read_labels


class LossOutputs(NamedTuple):
    """What a kernel of the loss fills, as the host passes it; None where it is not wanted."""

    loss_ptr: Any = None
    stats_ptr: Any = None  # (numbers, rows): m, log s[, log p of the target class][, A] of each row, for backward
    sums_ptr: Any = None  # (2, programs): each program's sum of losses and of shares of the denominator
    denominator_ptr: Any = None  # of a mean
    ticket_ptr: Any = None  # 0: the program that takes the last ticket adds up the sums
    weights_ptr: Any = None  # parts of the denominator, from cross_entropy_weights
    partials_ptr: Any = None  # (3 or 5, rows, parts), see store_partials: of parts of rows, instead of all the others


@triton.jit
def store_reduced(out, loss, weight):
    """Store the reduced loss; for the mean also its denominator, NaN where the weights sum to 0, as torch has it."""
    if out.denominator_ptr is not None:
        weight = tl.where(weight == 0.0, float("nan"), weight)
        loss = loss / weight
        tl.store(out.denominator_ptr, convert(weight, out.denominator_ptr.dtype.element_ty))
    tl.store(out.loss_ptr, convert(loss, out.loss_ptr.dtype.element_ty))


@triton.jit
def reduce_sums(out, programs, BLOCK: tl.constexpr):
    """Add up the programs' sums in a fixed order, in float64: means of 10**6 rows stay exact."""
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < programs
        loss += tl.load(out.sums_ptr + i, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
        weight += tl.load(out.sums_ptr + programs + i, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
    store_reduced(out, tl.sum(loss, axis=0), tl.sum(weight, axis=0))


@triton.jit
def cross_entropy_reduce(out, programs, BLOCK: tl.constexpr):
    """Reduce the loss in a second launch, of one program."""
    reduce_sums(out, programs, BLOCK)


@triton.jit
def reduce_losses(out, loss, weight, row_mask):
    """Store the sum or mean of a lone program's rows, or the program's sums.

    Sums are added up by a second launch or, with a ticket, by the last program to get here.
    """
    loss_sum = tl.sum(tl.where(row_mask, loss, 0.0), axis=0)
    weight_sum = tl.sum(tl.where(row_mask, weight, 0.0), axis=0)
    if out.sums_ptr is None:
        store_reduced(out, loss_sum, weight_sum)
    else:
        tl.store(out.sums_ptr + tl.program_id(0), loss_sum)
        tl.store(out.sums_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)
        if out.ticket_ptr is not None:
            tl.debug_barrier()
            if tl.atomic_add(out.ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                reduce_sums(out, tl.num_programs(0), 256)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_weights(
    out, target, rows, ignore_index, ACC: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Sum of the target classes' weights over every num_programs-th tile of rows: parts of a mean's denominator."""
    inner = rows.sizes[len(rows.sizes) - 1]
    tiles = count_rows(rows) // inner * tl.cdiv(inner, LANES)
    KIND: tl.constexpr = "indices"  # other kinds of targets do not weigh a mean
    weights = tl.zeros((LANES,), tl.float64)
    for tile in range(tl.program_id(0), tiles.to(tl.int32), tl.num_programs(0)):
        outer, row, row_mask, _ = program_rows(rows, tile, LANES, 0)
        label, valid = read_labels(target, outer, row, row_mask, rows, ignore_index, KIND, ACC)
        weights += tl.where(row_mask, denominator_share(label, valid, target, ACC), 0.0).to(tl.float64)
    tl.store(out.weights_ptr + tl.program_id(0), tl.sum(weights, axis=0))
    if tl.program_id(0) == 0:
        tl.store(out.ticket_ptr, 0)


@triton.jit
def mean_factor(
    out, weight, row_mask, rows, REDUCTION: tl.constexpr, KIND: tl.constexpr, WEIGHT_PARTS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return 1 / denominator of the mean, 1 for others.

    It is known before other programs finish, so that the kernel of the loss can scale the gradient: the number of rows,
    or the sum of weights, in WEIGHT_PARTS parts from cross_entropy_weights or, in a lone program, its own.
    """
    if REDUCTION != "mean":
        denominator = tl.full((), 1.0, ACC)
    elif KIND == "probabilities":
        denominator = count_rows(rows).to(ACC)
    else:
        if out.weights_ptr is None:
            denominator = tl.sum(tl.where(row_mask, weight, 0.0), axis=0)
        else:
            denominator = tl.sum(tl.load(out.weights_ptr + tl.arange(0, WEIGHT_PARTS)), axis=0).to(ACC)
        denominator = tl.where(denominator == 0.0, float("nan"), denominator)
    return 1.0 / denominator
