"""Rows with class probabilities, one by one or in tiles.

a = w * ((1 - e) t + e / C),  A = sum(a),  loss = A * log s - <a, z - m>,  gradient = g * (A * p - a)
"""

from __future__ import annotations

from typing import Any

from softmax_fused.backends.numba.call import FIELDS, LANES
from softmax_fused.backends.numba.kernels.decorators import exact
from softmax_fused.backends.numba.kernels.losses import dense_function
from softmax_fused.backends.numba.kernels.math import functions
from softmax_fused.backends.numba.kernels.memory import SIZES, Types, get, get_real, load, store
from softmax_fused.backends.numba.kernels.rows import row_functions
from softmax_fused.backends.numba.kernels.stages import upstream_of
from softmax_fused.backends.numba.kernels.tiles import locate_tile, tile_functions


def probability_row(types: Types) -> Any:
    """Return a function that computes a row with class probabilities."""
    logits_type, target_type, real = types
    exp, log1p = functions(real)
    dense_loss = dense_function(real)
    row = row_functions(logits_type, target_type, real, exp)
    upstream, size, target_size, one = upstream_of(real), SIZES[logits_type], SIZES[target_type], real(1)

    @exact
    def compute(p, number, scratch):
        inner, classes = get(p, FIELDS.inner), get(p, FIELDS.classes)
        n, i = number // inner, number % inner
        z = get(p, FIELDS.logits) + size * (n * get(p, FIELDS.logits_outer) + i * get(p, FIELDS.logits_inner))
        t = get(p, FIELDS.target) + target_size * (n * get(p, FIELDS.target_outer) + i * get(p, FIELDS.target_inner))
        grad, losses, w = get(p, FIELDS.grad), get(p, FIELDS.losses), get(p, FIELDS.weight)
        smoothing = get_real(p, FIELDS.smoothing)
        confidence, per_class = real(1 - smoothing), real(smoothing / classes)
        m = row.largest(z, classes)
        total, d = row.probability_sums(z, m, classes, t, confidence, per_class, w)
        s = row.sum_others(z, scratch, m, classes, -1, grad != 0)
        if grad:
            g = upstream(p, n, i)
            grad += size * (n * get(p, FIELDS.grad_outer) + i * get(p, FIELDS.grad_inner))
            row.probability_gradient(scratch, classes, g * total / s, g, t, confidence, per_class, w, grad)
        if losses:
            store(real, losses, number, dense_loss(total, log1p(s - one), d))

    return compute


def probability_tile(types: Types) -> Any:
    """Return a function that computes a tile of rows with class probabilities."""
    logits_type, target_type, real = types
    exp, log1p = functions(real)
    dense_loss = dense_function(real)
    tile = tile_functions(logits_type, target_type, real, exp)
    upstream, size, target_size, real_size = upstream_of(real), SIZES[logits_type], SIZES[target_type], SIZES[real]
    one = real(1)

    @exact
    def compute(p, number, x):
        classes, (n, first, lanes) = get(p, FIELDS.classes), locate_tile(p, number)
        inner = get(p, FIELDS.inner)
        step = real_size * LANES
        m = x + step * classes
        total, d, g = m + step, m + 2 * step, m + 3 * step
        by_lane, by_class = get(p, FIELDS.logits_inner), get(p, FIELDS.logits_class)
        tile.read(
            get(p, FIELDS.logits) + size * (n * get(p, FIELDS.logits_outer) + first * by_lane),
            by_lane, by_class, lanes, classes, x,
        )  # fmt: skip
        tile.subtract_largest(x, classes, m)
        smoothing, w = get_real(p, FIELDS.smoothing), get(p, FIELDS.weight)
        confidence, per_class = real(1 - smoothing), real(smoothing / classes)
        t_by_lane, t_by_class = get(p, FIELDS.target_inner), get(p, FIELDS.target_class)
        t = get(p, FIELDS.target) + target_size * (n * get(p, FIELDS.target_outer) + first * t_by_lane)
        tile.probability_sums(x, classes, t, t_by_lane, t_by_class, lanes, confidence, per_class, w, total, d)
        tile.exponentials(x, classes)
        tile.sum_classes(x, classes, m)
        losses, grad = get(p, FIELDS.losses), get(p, FIELDS.grad)
        if losses:
            for lane in range(lanes):
                log_s = log1p(load(real, m, lane) - one)
                loss = dense_loss(load(real, total, lane), log_s, load(real, d, lane))
                store(real, losses, n * inner + first + lane, loss)
        if grad:
            grad += size * (n * get(p, FIELDS.grad_outer) + first * get(p, FIELDS.grad_inner))
            for lane in range(lanes):
                g_row = upstream(p, n, first + lane)
                store(real, g, lane, g_row)
                store(real, m, lane, g_row * load(real, total, lane) / load(real, m, lane))
            tile.write_probabilities(
                x, m, g, t, t_by_lane, t_by_class, confidence, per_class, w,
                grad, get(p, FIELDS.grad_inner), get(p, FIELDS.grad_class), lanes, classes,
            )  # fmt: skip

    return compute
