"""Outputs of LANES rows at a time, where classes are few or do not lie side by side: every loop runs along the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from softmax_fused.backends.numba.call import FIELDS, LANES, ROW_FIELDS
from softmax_fused.backends.numba.kernels.decorators import contracted, exact
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
from softmax_fused.backends.numba.kernels.tiles import locate_tile, tile_functions


class Sweeps(NamedTuple):
    """What outputs and gradient have in common."""

    fill_scales: Any
    read: Any
    scale: Any
    statistics: Any
    row: Any


def sweeps_of(types: Types) -> Sweeps:
    """Return the sweeps over a tile, and over the numbers of its rows, a vector of LANES for each.

    x[c, lane] are the logits, e their exponentials, `a` the target's shares; the vectors that `v` leads to are m, its
    class, r, u, A and <a, x - m>.
    """
    logits_type, target_type, real = types
    exp, _ = functions(real)
    tanh, tile = hyperbolic_tangent(real), tile_functions(logits_type, real, real, exp)
    addresses, dense, has_labels = address_functions(types), reads_shares(types), target_type is None
    zero, step, least = real(0), SIZES[real] * LANES, real(LEAST_DIFFERENCE)

    @exact
    def fill_scales(p, number, lanes, scales):
        """Fill a vector with what the rows from `number` on are multiplied by."""
        for lane in range(LANES):
            store(real, scales, lane, addresses.row_scale(p, number + min(lane, lanes - 1)))

    @exact
    def scale(x, classes, scales):
        for c in range(classes):
            for lane in range(LANES):
                store(real, x, c * LANES + lane, load(real, x, c * LANES + lane) * load(real, scales, lane))

    @exact
    def cap(x, t, count, softcap):
        for k in range(count):
            store(real, t, k, tanh(load(real, x, k) / softcap))
            store(real, x, k, softcap * load(real, t, k))

    @exact
    def read(p, n, first, lanes, classes, scales, x, t):
        """Fill x with the scaled and capped logits, and t with tanh if there is a cap."""
        z, by_lane = addresses.logits(p, n, first), get(p, FIELDS.logits_inner)
        tile.read(z, by_lane, get(p, FIELDS.logits_class), lanes, classes, x)
        scale(x, classes, scales)
        softcap = real(get_real(p, ROW_FIELDS.softcap))
        if softcap != zero:
            cap(x, t, classes * LANES, softcap)

    @contracted
    def read_shares(p, n, first, lanes, classes, a):
        """Fill `a` with the share of the target that each class has, beside the label's."""
        w, smoothing = get(p, FIELDS.weight), get_real(p, FIELDS.smoothing)
        confidence, per_class = real(1 - smoothing), real(smoothing / classes)
        t, by_lane, by_class = addresses.target(p, n, first), get(p, FIELDS.target_inner), get(p, FIELDS.target_class)
        for c in range(classes):
            weight = load(real, w, c)
            for lane in range(LANES):
                store(real, a, c * LANES + lane, weight * per_class)
            if not has_labels:
                if by_lane == 1:
                    for lane in range(lanes):
                        share = confidence * real(load(target_type, t, c * by_class + lane)) + per_class
                        store(real, a, c * LANES + lane, weight * share)
                else:
                    for lane in range(lanes):
                        t_c = real(load_apart(target_type, t, c * by_class + lane * by_lane))
                        store(real, a, c * LANES + lane, weight * (confidence * t_c + per_class))

    @exact
    def find_largest(x, classes, m, top):
        """Fill m, NaN being the largest, and its first class."""
        for lane in range(LANES):
            store(real, m, lane, load(real, x, lane))
            store(real, top, lane, zero)
        for c in range(1, classes):
            for lane in range(LANES):
                best, value = load(real, m, lane), load(real, x, c * LANES + lane)
                better = (value > best) | ((value != value) & (best == best))
                store(real, m, lane, value if better else best)
                store(real, top, lane, real(c) if better else load(real, top, lane))

    @contracted
    def share_sums(a, x, classes, m, total, d):
        """Fill `total` with A and d with <a, x - m>, where 0 * -inf = 0 and inf * 0 = 0."""
        for lane in range(LANES):
            store(real, total, lane, zero)
            store(real, d, lane, zero)
        for c in range(classes):
            for lane in range(LANES):
                share = load(real, a, c * LANES + lane)
                difference = load(real, x, c * LANES + lane) - load(real, m, lane)
                product = share * difference
                store(real, total, lane, load(real, total, lane) + share)
                product = zero if (share == zero) | (difference == zero) else product
                store(real, d, lane, load(real, d, lane) + product)

    @contracted
    def exponentials(x, e, classes, m, top, r, u):
        """Fill e, and r and u, which are NaN where m is not finite."""
        for lane in range(LANES):
            largest = load(real, m, lane)
            store(real, r, lane, largest - largest)
            store(real, u, lane, zero)
        for c in range(classes):
            for lane in range(LANES):
                difference = load(real, x, c * LANES + lane) - load(real, m, lane)
                value = exp(difference)
                store(real, e, c * LANES + lane, value)
                product = value * (least if difference < least else difference)
                store(real, u, lane, load(real, u, lane) + product)
                store(real, r, lane, load(real, r, lane) + (zero if load(real, top, lane) == real(c) else value))

    @exact
    def statistics(p, n, first, lanes, classes, x, e, a, v):
        """Fill the vectors from x, and e and, where there are shares, `a`."""
        find_largest(x, classes, v, v + step)
        if dense(p):
            read_shares(p, n, first, lanes, classes, a)
            share_sums(a, x, classes, v, v + 4 * step, v + 5 * step)
        exponentials(x, e, classes, v, v + step, v + 2 * step, v + 3 * step)

    @exact
    def row(p, lane, label, x, e, v):
        """Return what is known of one row."""
        m, place, sums = load(real, v, lane), max(label, 0) * LANES + lane, dense(p)
        return Statistics(
            m, np.int64(load(real, v + step, lane)), load(real, v + 2 * step, lane), load(real, v + 3 * step, lane),
            load(real, x, place) - m, load(real, e, place),
            load(real, v + 4 * step, lane) if sums else zero, load(real, v + 5 * step, lane) if sums else zero,
        )  # fmt: skip

    return Sweeps(fill_scales, read, scale, statistics, row)


def outputs_of_tile(types: Types) -> Any:
    """Return a function that computes the outputs of a tile of rows that the call has an address for."""
    logits_type, _, real = types
    exp, _ = functions(real)
    addresses, sweeps, write_outputs = address_functions(types), sweeps_of(types), outputs_writer(types)
    tile, step, zero, one = tile_functions(logits_type, real, real, exp), SIZES[real] * LANES, real(0), real(1)

    @exact
    def count_larger(y, classes, at_label, larger):
        """Fill `larger` with how many scaled logits y are larger than the label's."""
        for lane in range(LANES):
            store(real, larger, lane, zero)
        for c in range(classes):
            for lane in range(LANES):
                more = zero if load(real, y, c * LANES + lane) <= load(real, at_label, lane) else one
                store(real, larger, lane, load(real, larger, lane) + more)

    @exact
    def rank(p, n, first, lanes, classes, scales, y, at_label, larger):
        """Rank the labels among the scaled logits: the cap rounds large ones to equal ones."""
        by_lane, by_class = get(p, FIELDS.logits_inner), get(p, FIELDS.logits_class)
        tile.read(addresses.logits(p, n, first), by_lane, by_class, lanes, classes, y)
        sweeps.scale(y, classes, scales)
        for lane in range(lanes):
            label = addresses.label(p, n, first + lane)
            store(real, at_label, lane, load(real, y, max(label, 0) * LANES + lane))
        count_larger(y, classes, at_label, larger)

    @exact
    def compute(p, number, x):
        classes, (n, first, lanes) = get(p, FIELDS.classes), locate_tile(p, number)
        inner = get(p, FIELDS.inner)
        e, a, v = x + step * classes, x + 2 * step * classes, x + 4 * step * classes
        scales, at_label, larger = v + 6 * step, v + 7 * step, v + 8 * step
        sweeps.fill_scales(p, n * inner + first, lanes, scales)
        ranked = get(p, ROW_FIELDS.rank)
        if ranked:
            rank(p, n, first, lanes, classes, scales, x, at_label, larger)
        sweeps.read(p, n, first, lanes, classes, scales, x, e)
        sweeps.statistics(p, n, first, lanes, classes, x, e, a, v)
        for lane in range(lanes):
            label = addresses.label(p, n, first + lane)
            row = sweeps.row(p, lane, label, x, e, v)
            write_outputs(p, n * inner + first + lane, label, row, np.int64(load(real, larger, lane)) if ranked else 0)

    return compute


def gradient_of_tile(types: Types) -> Any:
    """Return a function that computes the gradient of a tile of rows from those of their outputs that have one."""
    logits_type, _, real = types
    exp, _ = functions(real)
    addresses, sweeps, find_factors = address_functions(types), sweeps_of(types), gradient_factors(types)
    tile, dense = tile_functions(logits_type, real, real, exp), reads_shares(types)
    step, zero, one, least = SIZES[real] * LANES, real(0), real(1), real(LEAST_DIFFERENCE)

    @contracted
    def multiply(x, e, classes, m, of_e, by_entropy):
        """Turn exponentials into the gradient by x but for the target's shares, 0 where nothing is asked for."""
        for c in range(classes):
            for lane in range(LANES):
                k = c * LANES + lane
                difference = load(real, x, k) - load(real, m, lane)
                difference = least if difference < least else difference
                factor, by_difference = load(real, of_e, lane), load(real, by_entropy, lane)
                value = load(real, e, k) * (factor - by_difference * difference)
                store(real, e, k, zero if (factor == zero) & (by_difference == zero) else value)

    @exact
    def subtract_shares(e, a, classes, of_share):
        """Subtract what is exactly e where the softmax is exactly the target, as where there is one class."""
        for c in range(classes):
            for lane in range(LANES):
                k, factor = c * LANES + lane, load(real, of_share, lane)
                product = factor * load(real, a, k)
                store(real, e, k, load(real, e, k) - (zero if factor == zero else product))

    @contracted
    def undo_cap(t, e, count):
        for k in range(count):
            tanh = load(real, t, k)
            store(real, e, k, load(real, e, k) * (one - tanh * tanh))

    @exact
    def compute(p, number, x):
        classes, (n, first, lanes) = get(p, FIELDS.classes), locate_tile(p, number)
        inner = get(p, FIELDS.inner)
        e, a, t = x + step * classes, x + 2 * step * classes, x + 3 * step * classes
        v = x + 4 * step * classes
        scales, of_e, by_entropy, of_share = v + 6 * step, v + 7 * step, v + 8 * step, v + 9 * step
        sweeps.fill_scales(p, n * inner + first, lanes, scales)
        sweeps.read(p, n, first, lanes, classes, scales, x, t)
        sweeps.statistics(p, n, first, lanes, classes, x, e, a, v)
        at_label = v + 5 * step  # <a, x - m> is not needed
        for lane in range(lanes):
            label = addresses.label(p, n, first + lane)
            factors = find_factors(p, n * inner + first + lane, label, sweeps.row(p, lane, label, x, e, v))
            store(real, of_e, lane, factors.of_e)
            store(real, by_entropy, lane, factors.by_entropy)
            store(real, of_share, lane, factors.of_share)
            store(real, at_label, lane, factors.at_label)
        multiply(x, e, classes, v, of_e, by_entropy)
        if dense(p):
            subtract_shares(e, a, classes, of_share)
        for lane in range(lanes):
            label = addresses.label(p, n, first + lane)
            if label >= 0:
                store(real, e, label * LANES + lane, load(real, at_label, lane))
        if get_real(p, ROW_FIELDS.softcap) != 0.0:
            undo_cap(t, e, classes * LANES)
        sweeps.scale(e, classes, scales)
        by_lane, by_class = get(p, FIELDS.grad_inner), get(p, FIELDS.grad_class)
        tile.write_tile(e, addresses.grad(p, n, first), by_lane, by_class, lanes, classes)

    return compute
