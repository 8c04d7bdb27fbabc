"""From the losses of rows to their sum or mean, over all programs in a fixed order."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import convert
from .rows import count_rows, program_rows
from .targets import denominator_share, read_labels


class LossOutputs(NamedTuple):
    """What a kernel of the loss fills, as the host passes it; None where it is not wanted."""

    loss_ptr: Any = None  # None: only the parts of rows are wanted, see store_partials
    scratch_ptr: Any = None
    saves: Any = None  # 1: what backward needs is kept, the first of the scratch memory
    ticket_ptr: Any = None  # 0, and 0 again at the end: the program that takes the last ticket does what is left
    weights_ptr: Any = None  # parts of a mean's denominator, from cross_entropy_weights


@triton.jit
def statistics_size(count, SAVES_TOTAL: tl.constexpr, KIND: tl.constexpr):
    """Return how many numbers of all rows are kept for backward: m, log s[, log p of the target class][, A] of each."""
    size = count * 2
    if KIND != "probabilities":
        size += count
    if SAVES_TOTAL:
        size += count
    return size


@triton.jit
def scratch_sums(out, count, SAVES_TOTAL: tl.constexpr, REDUCTION: tl.constexpr, KIND: tl.constexpr):
    """Return the address behind what scratch memory keeps for backward: the statistics, and a mean's denominator.

    What only this launch needs lies there: sums of programs, or parts of rows.
    """
    kept = tl.zeros((), tl.int64)
    if out.saves is not None:
        kept += statistics_size(count, SAVES_TOTAL, KIND)
        if REDUCTION == "mean":
            kept += 1
    return out.scratch_ptr + kept


@triton.jit
def takes_last_ticket(ticket_ptr):
    """Return whether this program is the last of its launch to get here; the ticket is then 0 again for the next one.

    The atomic acquires and releases: what the other programs stored before it is visible to this program's loads from
    then on, if they bypass the L1 cache.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def store_reduced(
    out, loss, weight, count, SAVES_TOTAL: tl.constexpr, REDUCTION: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Store the reduced loss; for a mean, divided by its weights: NaN where they sum to 0, as torch has it."""
    if REDUCTION == "mean":
        weight = tl.where(weight == 0.0, float("nan"), weight)
        loss = loss / weight
        if out.saves is not None:
            denominator_ptr = out.scratch_ptr + statistics_size(count, SAVES_TOTAL, KIND)
            tl.store(denominator_ptr, convert(weight, denominator_ptr.dtype.element_ty))
    tl.store(out.loss_ptr, convert(loss, out.loss_ptr.dtype.element_ty))


@triton.jit
def add_sums(sums_ptr, programs, BLOCK: tl.constexpr):
    """Return the sum of a number of each program in a fixed order, in float64: means of 10**6 rows stay exact."""
    total = tl.zeros((), tl.float64)
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        numbers = tl.load(sums_ptr + i, mask=i < programs, other=0.0, cache_modifier=".cg")
        total += tl.sum(numbers.to(tl.float64), axis=0)
    return total


@triton.jit
def reduce_losses(
    out, loss, weight, row_mask, count,
    SAVES_TOTAL: tl.constexpr, REDUCTION: tl.constexpr, KIND: tl.constexpr, LONE: tl.constexpr,
):  # fmt: skip
    """Store the sum or mean of all rows: a lone program's, or by the last program the sum of all programs' sums.

    They lie in scratch memory, (2, programs): of losses, and of shares of a mean's denominator.
    """
    loss_sum = tl.sum(tl.where(row_mask, loss, 0.0), axis=0)
    weight_sum = tl.sum(tl.where(row_mask, weight, 0.0), axis=0)
    if LONE:
        store_reduced(out, loss_sum, weight_sum, count, SAVES_TOTAL, REDUCTION, KIND)
    else:
        programs = tl.num_programs(0)
        sums_ptr = scratch_sums(out, count, SAVES_TOTAL, REDUCTION, KIND)
        tl.store(sums_ptr + tl.program_id(0), loss_sum)
        if REDUCTION == "mean":
            tl.store(sums_ptr + programs + tl.program_id(0), weight_sum)
        if takes_last_ticket(out.ticket_ptr):
            total = add_sums(sums_ptr, programs, 512)
            total_weight = total
            if REDUCTION == "mean":
                total_weight = add_sums(sums_ptr + programs, programs, 512)
            store_reduced(out, total, total_weight, count, SAVES_TOTAL, REDUCTION, KIND)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_weights(
    weights_ptr, target, rows, ignore_index, ACC: tl.constexpr, LANES: tl.constexpr
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
    tl.store(weights_ptr + tl.program_id(0), tl.sum(weights, axis=0))


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
