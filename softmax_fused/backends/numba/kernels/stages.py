"""How threads share the rows; what comes before: labels checked and counted; and after: the losses' mean or sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_fused.backends.numba.call import FIELDS, MEAN, NONE
from softmax_fused.backends.numba.kernels.decorators import exact, reordered
from softmax_fused.backends.numba.kernels.memory import SIZES, get, get_real, load, next_ticket, store


def work_on_units(compute: Any, real: Any) -> Any:
    """Return the stage that threads share: each takes rows, or tiles, a chunk at a time, and has its own scratch."""
    real_size = SIZES[real]

    @exact
    def work(p):
        units, chunk = get(p, FIELDS.units), get(p, FIELDS.chunk)
        thread = next_ticket(p + 8 * FIELDS.next_thread)
        scratch = get(p, FIELDS.scratch) + real_size * thread * get(p, FIELDS.scratch_size)
        first = next_ticket(p + 8 * FIELDS.next_chunk) * chunk
        while first < units:
            for number in range(first, min(first + chunk, units)):
                compute(p, number, scratch)
            first = next_ticket(p + 8 * FIELDS.next_chunk) * chunk

    return work


def prepare_labels(real: Any) -> Any:
    """Return the first stage for class indices: are there such classes, and what does a mean divide by?"""

    @exact
    def count(p):
        """Return how many labels are valid, and how many are of no class."""
        ignore_index, classes = get(p, FIELDS.ignore_index), get(p, FIELDS.classes)
        stride, inner = get(p, FIELDS.target_inner), get(p, FIELDS.inner)
        valid = wrong = 0
        for n in range(get(p, FIELDS.outer)):
            labels = get(p, FIELDS.target) + 8 * n * get(p, FIELDS.target_outer)
            for i in range(inner):
                label = load(np.int64, labels, i * stride)
                counts = label != ignore_index
                valid += counts
                wrong += counts & ((label < 0) | (label >= classes))
        return valid, wrong

    @exact
    def find_wrong(p):
        for n in range(get(p, FIELDS.outer)):
            for i in range(get(p, FIELDS.inner)):
                where = n * get(p, FIELDS.target_outer) + i * get(p, FIELDS.target_inner)
                label = load(np.int64, get(p, FIELDS.target), where)
                if label != get(p, FIELDS.ignore_index) and (label < 0 or label >= get(p, FIELDS.classes)):
                    return label
        return 0

    @exact
    def sum_weights(p):
        """Return the weights of all labels."""
        total = 0.0
        for n in range(get(p, FIELDS.outer)):
            for i in range(get(p, FIELDS.inner)):
                where = n * get(p, FIELDS.target_outer) + i * get(p, FIELDS.target_inner)
                label = load(np.int64, get(p, FIELDS.target), where)
                if label != get(p, FIELDS.ignore_index):
                    total += load(real, get(p, FIELDS.weight), label)
        return total

    @exact
    def prepare(p):
        valid, wrong = count(p)
        denominator = float(valid)
        if wrong > 0:
            store(np.int64, p, FIELDS.wrong_labels, wrong)
            store(np.int64, p, FIELDS.wrong_label, find_wrong(p))
            return
        w = get(p, FIELDS.weight)
        if w:
            total = 0.0
            for c in range(get(p, FIELDS.classes)):
                total += load(real, w, c)
            store(np.float64, p, FIELDS.weight_sum, total)
            if get(p, FIELDS.reduction) == MEAN:
                denominator = sum_weights(p)
        store(np.float64, p, FIELDS.denominator, denominator)

    return prepare


@exact
def prepare_probabilities(p):
    """Store what a mean divides by: the number of rows."""
    store(np.float64, p, FIELDS.denominator, float(get(p, FIELDS.outer) * get(p, FIELDS.inner)))


@reordered
def sum_losses(real, losses, rows):
    """Return the sum of the rows' losses, in an order that does not depend on the threads."""
    total = 0.0
    for row in range(rows):
        total += load(real, losses, row)
    return total


def reduce_losses(real: Any) -> Any:
    """Return the last stage."""

    @exact
    def reduce(p):
        if get(p, FIELDS.reduction) != NONE and get(p, FIELDS.loss):
            total = sum_losses(real, get(p, FIELDS.losses), get(p, FIELDS.outer) * get(p, FIELDS.inner))
            if get(p, FIELDS.reduction) == MEAN:
                denominator = get_real(p, FIELDS.denominator)
                total = total / denominator if denominator != 0.0 else np.nan
            store(real, get(p, FIELDS.loss), 0, real(total))

    return reduce


def upstream_of(real: Any) -> Any:
    """Return a function for the number that a row's gradient is multiplied by."""

    @exact
    def upstream(p, outer, inner):
        g, where = 1.0, get(p, FIELDS.upstream)
        if where:
            g = float(load(real, where, outer * get(p, FIELDS.upstream_outer) + inner * get(p, FIELDS.upstream_inner)))
        if get(p, FIELDS.reduction) == MEAN:
            denominator = get_real(p, FIELDS.denominator)
            g = g / denominator if denominator != 0.0 else np.nan
        return real(g)

    return upstream
