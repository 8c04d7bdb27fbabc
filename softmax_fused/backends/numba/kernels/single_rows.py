"""Outputs of rows one by one, where classes lie side by side and are many: every loop runs along the classes.

The row is copied to scratch memory in whole blocks, so that no loop has classes left over which would be computed one
by one. Sums may be taken in any order ("reassoc"), so that each lane of a vector has its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from softmax_fused.backends.numba.call import BLOCK, FIELDS, ROW_FIELDS
from softmax_fused.backends.numba.kernels.decorators import contracted, exact, reordered
from softmax_fused.backends.numba.kernels.math import functions, hyperbolic_tangent
from softmax_fused.backends.numba.kernels.memory import SIZES, Types, get, get_real, load, load_apart, store
from softmax_fused.backends.numba.kernels.row_outputs import (
    LEAST_DIFFERENCE,
    Statistics,
    address_functions,
    gradient_factors,
    outputs_writer,
    reads_shares,
)
from softmax_fused.backends.numba.kernels.rows import row_functions


class Sweeps(NamedTuple):
    """What outputs and gradient have in common."""

    read: Any
    statistics: Any


def sweeps_of(types: Types) -> Sweeps:
    """Return the sweeps over a row in scratch memory: x its logits, e their exponentials, a the target's shares."""
    logits_type, target_type, real = types
    exp, _ = functions(real)
    tanh, row = hyperbolic_tangent(real), row_functions(real, real, real, exp)
    addresses, dense, has_labels = address_functions(types), reads_shares(types), target_type is None
    zero, one, minus_infinity, least = real(0), real(1), real(-np.inf), real(LEAST_DIFFERENCE)

    @exact
    def read(z, classes, count, scale, softcap, x, t):
        """Fill x with the scaled and capped logits, -inf beyond the last, and t with tanh if there is a cap."""
        for c in range(classes):
            store(real, x, c, real(load(logits_type, z, c)))
        for c in range(classes, count):
            store(real, x, c, zero)
        if scale != one:
            for c in range(count):
                store(real, x, c, load(real, x, c) * scale)
        if softcap != zero:
            for c in range(count):
                store(real, t, c, tanh(load(real, x, c) / softcap))
                store(real, x, c, softcap * load(real, t, c))
        for c in range(classes, count):
            store(real, x, c, minus_infinity)

    @contracted
    def read_shares(p, t, by_class, classes, count, a):
        """Fill `a` with the share of the target that each class has, beside the label's; 0 beyond the last."""
        w, smoothing = get(p, FIELDS.weight), get_real(p, FIELDS.smoothing)
        confidence, per_class = real(1 - smoothing), real(smoothing / classes)
        if has_labels:
            for c in range(classes):
                store(real, a, c, load(real, w, c) * per_class)
        elif by_class == 1:
            for c in range(classes):
                store(real, a, c, load(real, w, c) * (confidence * real(load(target_type, t, c)) + per_class))
        else:
            for c in range(classes):
                t_c = real(load_apart(target_type, t, c * by_class))
                store(real, a, c, load(real, w, c) * (confidence * t_c + per_class))
        for c in range(classes, count):
            store(real, a, c, zero)

    @reordered
    def share_sums(a, x, m, count):
        """Return A and <a, x - m>, where 0 * -inf = 0 and inf * 0 = 0."""
        total, d = zero, zero
        for c in range(count):
            share, difference = load(real, a, c), load(real, x, c) - m
            product = share * difference
            total += share
            d += zero if (share == zero) | (difference == zero) else product
        return total, d

    @exact
    def first_of(x, m, count):
        """Return the first class of NaN, where there is one, or else of m."""
        first = first_nan = np.int32(count)
        for c in range(count):
            value, here = load(real, x, c), np.int32(c)
            first = min(first, here if value == m else np.int32(count))
            first_nan = min(first_nan, here if value != value else np.int32(count))
        return np.int64(first_nan if first_nan < count else first)

    @reordered
    def exponentials(x, e, m, count):
        """Fill e; return r and u."""
        r, u = zero, zero
        for c in range(count):
            difference = load(real, x, c) - m
            value = exp(difference)
            store(real, e, c, value)
            r += value
            u += value * (least if difference < least else difference)
        return r, u

    @exact
    def statistics(p, n, i, label, classes, count, x, e, a):
        """Return what x says of the row; e and, where there are shares, `a` are filled."""
        total, d = zero, zero
        top = first_of(x, row.largest(x, count), count)
        m = load(real, x, top)
        if dense(p):
            by_class = get(p, FIELDS.target_class)
            read_shares(p, addresses.target(p, n, i), by_class, classes, count, a)
            total, d = share_sums(a, x, m, count)
        store(real, x, top, minus_infinity)
        r, u = exponentials(x, e, m, count)
        store(real, x, top, m)
        store(real, e, top, one)
        label = max(label, 0)
        x_label = load(real, x, label) - m
        return Statistics(m, top, r + (m - m), u, x_label, load(real, e, label), total, d)  # NaN where m is not finite

    return Sweeps(read, statistics)


def outputs_of_row(types: Types) -> Any:
    """Return a function that computes the outputs of a row that the call has an address for."""
    logits_type, _, real = types
    addresses, sweeps, write_outputs = address_functions(types), sweeps_of(types), outputs_writer(types)
    real_size = SIZES[real]

    @exact
    def count_larger(z, classes, scale, label):
        """Return how many scaled logits are larger than the label's: the cap rounds large ones to equal ones."""
        at_label, others = real(load(logits_type, z, label)) * scale, np.int32(0)
        for c in range(classes):
            others += np.int32(real(load(logits_type, z, c)) * scale <= at_label)
        return classes - others

    @exact
    def compute(p, number, x):
        inner, classes = get(p, FIELDS.inner), get(p, FIELDS.classes)
        n, i = number // inner, number % inner
        count = (classes + BLOCK - 1) // BLOCK * BLOCK
        e, a = x + real_size * count, x + 2 * real_size * count
        z, scale, label = addresses.logits(p, n, i), addresses.row_scale(p, number), addresses.label(p, n, i)
        sweeps.read(z, classes, count, scale, real(get_real(p, ROW_FIELDS.softcap)), x, e)
        row = sweeps.statistics(p, n, i, label, classes, count, x, e, a)
        larger = 0
        if get(p, ROW_FIELDS.rank) and label >= 0:
            larger = count_larger(z, classes, scale, label)
        write_outputs(p, number, label, row, larger)

    return compute


def gradient_of_row(types: Types) -> Any:
    """Return a function that computes the gradient of a row from those of its outputs that have one."""
    logits_type, _, real = types
    addresses, sweeps, find_factors = address_functions(types), sweeps_of(types), gradient_factors(types)
    dense, real_size, zero, one, least = reads_shares(types), SIZES[real], real(0), real(1), real(LEAST_DIFFERENCE)

    @contracted
    def multiply(x, e, m, count, of_e, by_entropy):
        """Turn exponentials into the gradient by x but for the target's shares."""
        if by_entropy == zero:
            for c in range(count):
                store(real, e, c, load(real, e, c) * of_e)
        else:
            for c in range(count):
                difference = load(real, x, c) - m
                difference = least if difference < least else difference
                store(real, e, c, load(real, e, c) * (of_e - by_entropy * difference))

    @exact
    def subtract_shares(e, a, of_share, count):
        """Subtract what is exactly e where the softmax is exactly the target, as where there is one class."""
        for c in range(count):
            store(real, e, c, load(real, e, c) - of_share * load(real, a, c))

    @contracted
    def undo_change(t, e, count, scale, capped):
        """Turn the gradient by x into that by the logits."""
        if capped:
            for c in range(count):
                tanh = load(real, t, c)
                store(real, e, c, load(real, e, c) * (scale * (one - tanh * tanh)))
        elif scale != one:
            for c in range(count):
                store(real, e, c, load(real, e, c) * scale)

    @exact
    def compute(p, number, x):
        inner, classes = get(p, FIELDS.inner), get(p, FIELDS.classes)
        n, i = number // inner, number % inner
        count = (classes + BLOCK - 1) // BLOCK * BLOCK
        e, a, t = x + real_size * count, x + 2 * real_size * count, x + 3 * real_size * count
        softcap = real(get_real(p, ROW_FIELDS.softcap))
        grad, scale, label = addresses.grad(p, n, i), addresses.row_scale(p, number), addresses.label(p, n, i)
        sweeps.read(addresses.logits(p, n, i), classes, count, scale, softcap, x, t)
        row = sweeps.statistics(p, n, i, label, classes, count, x, e, a)
        factors = find_factors(p, number, label, row)
        if factors.of_e == zero and factors.by_entropy == zero and factors.of_share == zero:
            for c in range(classes):
                store(logits_type, grad, c, zero)
            return
        multiply(x, e, row.m, count, factors.of_e, factors.by_entropy)
        if dense(p) and factors.of_share != zero:
            subtract_shares(e, a, factors.of_share, count)
        if label >= 0:
            store(real, e, label, factors.at_label)
        undo_change(t, e, count, scale, softcap != zero)
        for c in range(classes):
            store(logits_type, grad, c, load(real, e, c))

    return compute
