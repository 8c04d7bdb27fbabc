"""One row at a time, where its classes lie side by side and are many: every loop runs along the classes.

m = max z,  x = exp(z - m),  s = sum x,  d = <a, z - m>

`s` leaves out the label's class: where that is the most probable one, no digit of the others is lost beside it. Sums
may be taken in any order ("reassoc"), so that each lane of a vector has its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from softmax_fused.backends.numba.call import BLOCK
from softmax_fused.backends.numba.kernels.decorators import contracted, exact, reordered
from softmax_fused.backends.numba.kernels.memory import from_order, load, load_order, store


class RowFunctions(NamedTuple):
    """The sweeps over a row."""

    largest: Any
    sum_others: Any
    smoothing_product: Any
    scale: Any
    scale_smoothed: Any
    probability_sums: Any
    probability_gradient: Any


def row_functions(logits_type: Any, target_type: Any, real: Any, exp: Any) -> RowFunctions:
    """Return the sweeps for logits, class probabilities and arithmetic of these types."""
    zero, minus_infinity = real(0), real(-np.inf)

    @exact
    def largest(z, classes):
        """Return m; NaN may be left out of it, as it comes back with the exponentials."""
        best = load_order(logits_type, z, 0)
        for c in range(1, classes):
            order = load_order(logits_type, z, c)
            best = order if order > best else best
        return real(from_order(logits_type, best))

    @exact
    def copy_block(z, x, first, classes):
        """Copy a block of logits that is to be changed before its exponentials are taken, -inf beyond the last."""
        last = min(first + BLOCK, classes)
        for c in range(first, last):
            store(real, x, c, real(load(logits_type, z, c)))
        for c in range(last, first + BLOCK):
            store(real, x, c, minus_infinity)

    @reordered
    def exponentials_of_copy(x, m, first):
        """Turn the copy of a block into exponentials; return their sum."""
        s = zero
        for c in range(first, first + BLOCK):
            value = exp(load(real, x, c) - m)
            store(real, x, c, value)
            s += value
        return s

    @reordered
    def exponentials(z, x, m, first, last):
        """Fill whole blocks of x with the exponentials; return their sum."""
        s = zero
        for c in range(first, last):
            value = exp(real(load(logits_type, z, c)) - m)
            store(real, x, c, value)
            s += value
        return s

    @reordered
    def sum_of_exponentials(z, m, first, last):
        s = zero
        for c in range(first, last):
            s += exp(real(load(logits_type, z, c)) - m)
        return s

    @exact
    def sum_others(z, x, m, classes, label, keep):
        """Return the sum of the exponentials of all classes but the label's, -1 for none; with `keep` x is filled.

        All loops are over whole blocks, which leave no classes over whose exponentials would be computed one by one.
        Blocks without the label are read where they are; the label's, and the last if it is not full, from copies.
        """
        whole = classes // BLOCK * BLOCK
        special = label // BLOCK * BLOCK if label >= 0 else whole
        s = zero
        if special < classes:
            copy_block(z, x, special, classes)
            if label >= 0:
                store(real, x, label, minus_infinity)
            s += exponentials_of_copy(x, m, special)
        if whole < classes and special < whole:
            copy_block(z, x, whole, classes)
            s += exponentials_of_copy(x, m, whole)
        if keep:
            return s + exponentials(z, x, m, 0, min(special, whole)) + exponentials(z, x, m, special + BLOCK, whole)
        return s + sum_of_exponentials(z, m, 0, min(special, whole)) + sum_of_exponentials(z, m, special + BLOCK, whole)

    @reordered
    def smoothing_product(z, m, classes, per_class, w):
        """Return <w * e / C, z - m>, where 0 * -inf = 0 and inf * 0 = 0: the infinite weight meets log s, too."""
        d = zero
        for c in range(classes):
            a, difference = per_class * load(real, w, c), real(load(logits_type, z, c)) - m
            product = a * difference
            d += zero if (a == zero) | (difference == zero) else product
        return d

    @exact
    def scale(x, classes, factor, grad):
        for c in range(classes):
            store(logits_type, grad, c, load(real, x, c) * factor)

    @contracted
    def scale_smoothed(x, classes, factor, g_per_class, w, grad):
        for c in range(classes):
            store(logits_type, grad, c, load(real, x, c) * factor - g_per_class * load(real, w, c))

    @reordered
    def probability_sums(z, m, classes, t, confidence, per_class, w):
        """Return A and d."""
        total, d = zero, zero
        for c in range(classes):
            a = load(real, w, c) * (confidence * real(load(target_type, t, c)) + per_class)
            difference = real(load(logits_type, z, c)) - m
            product = a * difference
            total += a
            d += zero if (a == zero) | (difference == zero) else product
        return total, d

    @contracted
    def probability_gradient(x, classes, factor, g, t, confidence, per_class, w, grad):
        for c in range(classes):
            a = load(real, w, c) * (confidence * real(load(target_type, t, c)) + per_class)
            store(logits_type, grad, c, load(real, x, c) * factor - g * a)

    return RowFunctions(
        largest, sum_others, smoothing_product, scale, scale_smoothed,
        probability_sums, probability_gradient,
    )  # fmt: skip
