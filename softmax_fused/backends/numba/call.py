"""What a kernel is told: addresses, strides and numbers in one array of int64, as one pointer is the cheapest argument.

The loss needs labels checked and counted first, then the rows, which threads may share, then the sum of their losses. A
call asks for one of these stages, or for all where one thread does it. Strides count elements.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

LOSS = "loss"
ROWS, GRADIENT_OF_ROWS = OF_ROWS = ("outputs of rows", "gradient of outputs of rows")
SOFTMAX, LOG_SOFTMAX, GRADIENT_OF_SOFTMAX, GRADIENT_OF_LOG_SOFTMAX = OF_SOFTMAX = (
    "softmax", "log softmax", "gradient of softmax", "gradient of log softmax",
)  # fmt: skip
"""What there are kernels for."""


class Stages(NamedTuple):
    """What a kernel does when it is called."""

    everything: int
    prepare: int
    rows: int
    reduce: int


Stage = Stages(0, 1, 2, 3)

MEAN, SUM, NONE = 0, 1, 2
REDUCTIONS = {"mean": MEAN, "sum": SUM, "none": NONE}

LANES = 64
"""Rows in a tile: those that are worked on side by side where classes are few, or do not lie side by side."""

BLOCK = 64
"""Classes of a row are worked on in whole blocks: four vectors of 16 float32, as many as LLVM has in flight."""

LANE_VECTORS = 10
"""Numbers that a tile keeps at most of each of its rows, behind its C x LANES exponentials."""

ROW_COPIES = 4
"""Of a row or tile, for outputs of rows: its logits, their exponentials, the target's shares, the cap's tanh."""


class Signature(NamedTuple):
    """What the plan of a call says. Rows are outer x inner."""

    outer: int
    inner: int
    classes: int
    logits_outer: int  # strides
    logits_inner: int
    logits_class: int
    target_outer: int
    target_inner: int
    target_class: int
    grad_outer: int
    grad_inner: int
    grad_class: int
    upstream_outer: int
    upstream_inner: int
    scratch_size: int  # of one thread, in numbers
    units: int  # rows or tiles
    chunk: int  # how many of them a thread takes at a time
    reduction: int
    ignore_index: int
    smoothing: int  # the bits of a float64
    stage: int


class Addresses(NamedTuple):
    """Where the tensors lie, 0 for what is absent, and what the kernel writes."""

    logits: int
    target: int
    weight: int  # of each class; never absent where every class has a share of the target
    upstream: int
    grad: int
    losses: int  # of each row, contiguous
    loss: int  # their mean or sum
    scratch: int
    next_chunk: int = 0
    next_thread: int = 0
    denominator: int = 0  # of a mean: the bits of a float64
    weight_sum: int = 0  # the same
    wrong_labels: int = 0  # how many class indices there are that no class has
    wrong_label: int = 0  # the first of them


WRITTEN_BY_KERNEL = (0,) * len(Addresses._field_defaults)


class RowFields(NamedTuple):
    """What a call for outputs of rows says after that: each address leads to one number a row, side by side."""

    scale: int  # the bits of a float64
    softcap: int  # the same; those of 0 where there is none
    result_type: int  # of outputs that are no integers: a place in RESULT_TYPES
    row_scale: int
    loss: int  # outputs
    logsumexp: int
    prediction: int
    entropy: int
    log_prob: int
    rank: int
    by_loss: int  # upstream gradients, in the type of the arithmetic
    by_logsumexp: int
    by_entropy: int
    by_log_prob: int


RESULT_TYPES = ("float32", "float64", "float16", "uint16")
"""As compilation.NAMES has them."""

CALL = (*Signature._fields, *Addresses._fields)
FIELDS: Any = namedtuple("Fields", CALL)(*range(len(CALL)))
"""Where in the array each field is."""

ROW_FIELDS = RowFields(*range(len(CALL), len(CALL) + len(RowFields._fields)))
