"""Softmax, its logarithm, and their gradients, row by row or in tiles.

m = max z,  s = sum exp(z - m),  p = exp(z - m) / s,  log p = z - m - log s
gradients from the output and the upstream gradient g:  p (g - sum p g)  and  g - exp(log p) sum g

A call names its tensors as the loss does: "logits" are what is read, the input or for gradients the output; "target" is
the upstream gradient, of the same type; "grad" is what is written.
"""

from __future__ import annotations

from typing import Any

from softmax_fused.backends.numba.call import FIELDS, LANES
from softmax_fused.backends.numba.kernels.decorators import contracted, exact, reordered
from softmax_fused.backends.numba.kernels.math import functions
from softmax_fused.backends.numba.kernels.memory import SIZES, Types, get, load, store
from softmax_fused.backends.numba.kernels.rows import row_functions
from softmax_fused.backends.numba.kernels.tiles import locate_tile, tile_functions


def addresses_of(size: int) -> Any:
    """Return a function for the addresses of a row's numbers: what is read, the upstream gradient, what is written."""

    @exact
    def addresses(p, n, i):
        z = get(p, FIELDS.logits) + size * (n * get(p, FIELDS.logits_outer) + i * get(p, FIELDS.logits_inner))
        g = get(p, FIELDS.target) + size * (n * get(p, FIELDS.target_outer) + i * get(p, FIELDS.target_inner))
        out = get(p, FIELDS.grad) + size * (n * get(p, FIELDS.grad_outer) + i * get(p, FIELDS.grad_inner))
        return z, g, out

    return addresses


def softmax_row(types: Types, log: bool) -> Any:
    """Return a function that computes a row whose classes lie side by side."""
    dtype, _, real = types
    exp, log1p = functions(real)
    row, addresses, one = row_functions(dtype, real, real, exp), addresses_of(SIZES[dtype]), real(1)

    @exact
    def divide(x, classes, s, out):
        for c in range(classes):
            store(dtype, out, c, load(real, x, c) / s)

    @exact
    def subtract(z, m, log_s, classes, out):
        for c in range(classes):
            store(dtype, out, c, (real(load(dtype, z, c)) - m) - log_s)

    @exact
    def compute(p, number, scratch):
        inner, classes = get(p, FIELDS.inner), get(p, FIELDS.classes)
        z, _, out = addresses(p, number // inner, number % inner)
        m = row.largest(z, classes)
        s = row.sum_others(z, scratch, m, classes, -1, not log)
        if log:
            subtract(z, m, log1p(s - one), classes, out)
        else:
            divide(scratch, classes, s, out)

    return compute


def gradient_row(types: Types, log: bool) -> Any:
    """Return a function that computes the gradient of a row whose classes lie side by side."""
    dtype, _, real = types
    exp, _ = functions(real)
    addresses, zero = addresses_of(SIZES[dtype]), real(0)

    @reordered
    def sum_upstream(y, g, classes):
        total = zero
        for c in range(classes):
            if log:
                total += real(load(dtype, g, c))
            else:
                total += real(load(dtype, y, c)) * real(load(dtype, g, c))
        return total

    @contracted
    def write(y, g, total, classes, out):
        for c in range(classes):
            value, upstream = real(load(dtype, y, c)), real(load(dtype, g, c))
            store(dtype, out, c, upstream - exp(value) * total if log else value * (upstream - total))

    @exact
    def compute(p, number, scratch):
        inner, classes = get(p, FIELDS.inner), get(p, FIELDS.classes)
        y, g, out = addresses(p, number // inner, number % inner)
        write(y, g, sum_upstream(y, g, classes), classes, out)

    return compute


def softmax_tile(types: Types, log: bool) -> Any:
    """Return a function that computes a tile of rows."""
    dtype, _, real = types
    exp, log1p = functions(real)
    tile, addresses = tile_functions(dtype, real, real, exp), addresses_of(SIZES[dtype])
    real_size, zero, one = SIZES[real], real(0), real(1)

    @exact
    def log_sums(x, classes, s):
        """Fill s with log s."""
        for lane in range(LANES):
            store(real, s, lane, zero)
        for c in range(classes):
            for lane in range(LANES):
                store(real, s, lane, load(real, s, lane) + exp(load(real, x, c * LANES + lane)))
        for lane in range(LANES):
            store(real, s, lane, log1p(load(real, s, lane) - one))

    @exact
    def subtract(x, classes, s):
        for c in range(classes):
            for lane in range(LANES):
                i = c * LANES + lane
                store(real, x, i, load(real, x, i) - load(real, s, lane))

    @exact
    def divide(x, classes, s):
        for c in range(classes):
            for lane in range(LANES):
                i = c * LANES + lane
                store(real, x, i, load(real, x, i) / load(real, s, lane))

    @exact
    def compute(p, number, x):
        classes, (n, first, lanes) = get(p, FIELDS.classes), locate_tile(p, number)
        s = x + real_size * LANES * classes
        z, _, out = addresses(p, n, first)
        tile.read(z, get(p, FIELDS.logits_inner), get(p, FIELDS.logits_class), lanes, classes, x)
        tile.subtract_largest(x, classes, s)
        if log:
            log_sums(x, classes, s)
            subtract(x, classes, s)
        else:
            tile.exponentials(x, classes)
            tile.sum_classes(x, classes, s)
            divide(x, classes, s)
        tile.write_tile(x, out, get(p, FIELDS.grad_inner), get(p, FIELDS.grad_class), lanes, classes)

    return compute


def gradient_tile(types: Types, log: bool) -> Any:
    """Return a function that computes the gradient of a tile of rows."""
    dtype, _, real = types
    exp, _ = functions(real)
    tile, addresses = tile_functions(dtype, real, real, exp), addresses_of(SIZES[dtype])
    real_size, zero = SIZES[real], real(0)

    @contracted
    def differentiate(y, g, classes, total):
        """Write the gradient over y."""
        for lane in range(LANES):
            store(real, total, lane, zero)
        for c in range(classes):
            for lane in range(LANES):
                i = c * LANES + lane
                part = load(real, g, i) if log else load(real, y, i) * load(real, g, i)
                store(real, total, lane, load(real, total, lane) + part)
        for c in range(classes):
            for lane in range(LANES):
                i = c * LANES + lane
                value, upstream, sum_of_row = load(real, y, i), load(real, g, i), load(real, total, lane)
                store(real, y, i, upstream - exp(value) * sum_of_row if log else value * (upstream - sum_of_row))

    @exact
    def compute(p, number, x):
        classes, (n, first, lanes) = get(p, FIELDS.classes), locate_tile(p, number)
        upstream = x + real_size * LANES * classes
        y, g, out = addresses(p, n, first)
        tile.read(y, get(p, FIELDS.logits_inner), get(p, FIELDS.logits_class), lanes, classes, x)
        tile.read(g, get(p, FIELDS.target_inner), get(p, FIELDS.target_class), lanes, classes, upstream)
        differentiate(x, upstream, classes, upstream + real_size * LANES * classes)
        tile.write_tile(x, out, get(p, FIELDS.grad_inner), get(p, FIELDS.grad_class), lanes, classes)

    return compute
