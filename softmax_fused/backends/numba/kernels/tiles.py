"""LANES rows at a time, where classes are few or do not lie side by side: every loop runs along the rows.

The tile is held class by class, so that neighbouring numbers belong to neighbouring rows: as images are in memory, and
a few classes side by side are not. Lanes beyond the last row hold zeros, and nobody reads their results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from softmax_fused.backends.numba.call import FIELDS, LANES
from softmax_fused.backends.numba.kernels.decorators import contracted, exact
from softmax_fused.backends.numba.kernels.memory import get, load, load_apart, store, store_apart


class TileFunctions(NamedTuple):
    """The sweeps over a tile x[c, lane], and over one number of each lane."""

    read: Any
    subtract_largest: Any
    smoothing_product: Any
    probability_sums: Any
    exponentials: Any
    sum_classes: Any
    write: Any
    write_tile: Any
    write_probabilities: Any


@exact
def locate_tile(p, number):
    """Return where the rows of a tile are: the outer number, the first of the inner ones, and how many there are."""
    inner = get(p, FIELDS.inner)
    tiles = (inner + LANES - 1) // LANES
    first = (number % tiles) * LANES
    return number // tiles, first, min(LANES, inner - first)


def tile_functions(logits_type: Any, target_type: Any, real: Any, exp: Any) -> TileFunctions:
    """Return the sweeps for logits, class probabilities and arithmetic of these types."""
    zero = real(0)

    @exact
    def read(z, by_lane, by_class, lanes, classes, x):
        """Fill the tile with the logits, which lie `by_lane` and `by_class` elements apart."""
        if by_lane == 1:
            for c in range(classes):
                for lane in range(lanes):
                    store(real, x, c * LANES + lane, real(load(logits_type, z, c * by_class + lane)))
        elif lanes == LANES:  # LLVM unrolls a loop of known length
            for c in range(classes):
                for lane in range(LANES):
                    store(real, x, c * LANES + lane, real(load_apart(logits_type, z, lane * by_lane + c * by_class)))
        else:
            for c in range(classes):
                for lane in range(lanes):
                    store(real, x, c * LANES + lane, real(load_apart(logits_type, z, lane * by_lane + c * by_class)))
        for c in range(classes):
            for lane in range(lanes, LANES):
                store(real, x, c * LANES + lane, zero)

    @exact
    def subtract_largest(x, classes, m):
        """Turn logits into z - m."""
        for lane in range(LANES):
            store(real, m, lane, load(real, x, lane))
        for c in range(1, classes):
            for lane in range(LANES):
                best, z = load(real, m, lane), load(real, x, c * LANES + lane)
                store(real, m, lane, best if best > z else z)
        for c in range(classes):
            for lane in range(LANES):
                i = c * LANES + lane
                store(real, x, i, load(real, x, i) - load(real, m, lane))

    @contracted
    def smoothing_product(x, classes, per_class, w, d):
        """Fill d with <w * e / C, z - m>, where 0 * -inf = 0 and inf * 0 = 0."""
        for lane in range(LANES):
            store(real, d, lane, zero)
        for c in range(classes):
            a = per_class * load(real, w, c)
            if a != zero:
                for lane in range(LANES):
                    difference = load(real, x, c * LANES + lane)
                    product = a * difference
                    store(real, d, lane, load(real, d, lane) + (zero if difference == zero else product))

    @contracted
    def probability_sums(x, classes, t, by_lane, by_class, lanes, confidence, per_class, w, total, d):
        """Fill `total` with A and d with <a, z - m>."""
        for lane in range(LANES):
            store(real, total, lane, zero)
            store(real, d, lane, zero)
        for c in range(classes):
            weight = load(real, w, c)
            for lane in range(lanes):
                a = weight * (confidence * real(load(target_type, t, lane * by_lane + c * by_class)) + per_class)
                difference = load(real, x, c * LANES + lane)
                product = a * difference
                store(real, total, lane, load(real, total, lane) + a)
                product = zero if (a == zero) | (difference == zero) else product
                store(real, d, lane, load(real, d, lane) + product)

    @exact
    def exponentials(x, classes):
        for i in range(classes * LANES):
            store(real, x, i, exp(load(real, x, i)))

    @exact
    def sum_classes(x, classes, s):
        for lane in range(LANES):
            store(real, s, lane, load(real, x, lane))
        for c in range(1, classes):
            for lane in range(LANES):
                store(real, s, lane, load(real, s, lane) + load(real, x, c * LANES + lane))

    @contracted
    def write(x, factor, g_per_class, w, grad, by_lane, by_class, lanes, classes):
        """Write the gradient of all classes but the labels'."""
        for c in range(classes):
            weight = load(real, w, c) if w else zero
            for lane in range(LANES):
                i = c * LANES + lane
                value = load(real, x, i) * load(real, factor, lane)
                store(real, x, i, value - load(real, g_per_class, lane) * weight if w else value)
        write_tile(x, grad, by_lane, by_class, lanes, classes)

    @exact
    def write_tile(x, grad, by_lane, by_class, lanes, classes):
        if by_lane == 1:
            for c in range(classes):
                for lane in range(lanes):
                    store(logits_type, grad, c * by_class + lane, load(real, x, c * LANES + lane))
        elif lanes == LANES:
            for c in range(classes):
                for lane in range(LANES):
                    store_apart(logits_type, grad, lane * by_lane + c * by_class, load(real, x, c * LANES + lane))
        else:
            for c in range(classes):
                for lane in range(lanes):
                    store_apart(logits_type, grad, lane * by_lane + c * by_class, load(real, x, c * LANES + lane))

    @contracted
    def write_probabilities(
        x, factor, g, t, t_by_lane, t_by_class, confidence, per_class, w, grad, by_lane, by_class, lanes, classes
    ):
        """Write the gradient g * (A * p - a)."""
        for c in range(classes):
            weight = load(real, w, c)
            for lane in range(lanes):
                i = c * LANES + lane
                a = weight * (confidence * real(load(target_type, t, lane * t_by_lane + c * t_by_class)) + per_class)
                store(real, x, i, load(real, x, i) * load(real, factor, lane) - load(real, g, lane) * a)
        write_tile(x, grad, by_lane, by_class, lanes, classes)

    return TileFunctions(
        read, subtract_largest, smoothing_product, probability_sums, exponentials, sum_classes, write, write_tile,
        write_probabilities,
    )  # fmt: skip
