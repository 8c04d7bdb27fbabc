"""Rows with a class index, one by one or in tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_fused.backends.numba.call import FIELDS, LANES
from softmax_fused.backends.numba.kernels.decorators import exact
from softmax_fused.backends.numba.kernels.losses import label_functions
from softmax_fused.backends.numba.kernels.math import functions
from softmax_fused.backends.numba.kernels.memory import (
    SIZES,
    Types,
    get,
    get_real,
    load,
    load_apart,
    store,
    store_apart,
)
from softmax_fused.backends.numba.kernels.rows import row_functions
from softmax_fused.backends.numba.kernels.stages import upstream_of
from softmax_fused.backends.numba.kernels.tiles import locate_tile, tile_functions


def label_row(types: Types) -> Any:
    """Return a function that computes a row with a class index."""
    logits_type, _, real = types
    exp, log1p = functions(real)
    row = row_functions(logits_type, real, real, exp)
    label_loss, label_gradient = label_functions(real, log1p)
    upstream, size, zero = upstream_of(real), SIZES[logits_type], real(0)

    @exact
    def compute(p, number, scratch):
        inner, classes = get(p, FIELDS.inner), get(p, FIELDS.classes)
        n, i = number // inner, number % inner
        z = get(p, FIELDS.logits) + size * (n * get(p, FIELDS.logits_outer) + i * get(p, FIELDS.logits_inner))
        grad, losses = get(p, FIELDS.grad), get(p, FIELDS.losses)
        if grad:
            grad += size * (n * get(p, FIELDS.grad_outer) + i * get(p, FIELDS.grad_inner))
        label = load(np.int64, get(p, FIELDS.target), n * get(p, FIELDS.target_outer) + i * get(p, FIELDS.target_inner))
        if label == get(p, FIELDS.ignore_index):
            if losses:
                store(real, losses, number, zero)
            if grad:
                for c in range(classes):
                    store(logits_type, grad, c, zero)
            return
        smoothing, w = get_real(p, FIELDS.smoothing), get(p, FIELDS.weight)
        confidence, per_class = real(1 - smoothing), real(smoothing / classes)
        weight_sum = real(get_real(p, FIELDS.weight_sum))
        label_weight = load(real, w, label) if w else real(1)
        m = row.largest(z, classes)
        shifted = real(load(logits_type, z, label)) - m
        x_label, d = exp(shifted), zero
        if per_class != zero and losses:
            d = row.smoothing_product(z, m, classes, per_class, w)
        others = row.sum_others(z, scratch, m, classes, label, grad != 0)
        if grad:
            g = upstream(p, n, i)
            factor, at_label = label_gradient(others, x_label, g, confidence, label_weight, per_class, weight_sum)
            if per_class != zero:
                row.scale_smoothed(scratch, classes, factor, g * per_class, w, grad)
            else:
                row.scale(scratch, classes, factor, grad)
            store(logits_type, grad, label, at_label)
        if losses:
            loss = label_loss(others, x_label, shifted, d, confidence, label_weight, per_class, weight_sum)
            store(real, losses, number, loss)

    return compute


def label_tile(types: Types) -> Any:
    """Return a function that computes a tile of rows with class indices."""
    logits_type, _, real = types
    exp, log1p = functions(real)
    tile = tile_functions(logits_type, real, real, exp)
    label_loss, label_gradient = label_functions(real, log1p)
    upstream, size, real_size, zero, one = upstream_of(real), SIZES[logits_type], SIZES[real], real(0), real(1)
    minus_infinity = real(-np.inf)

    @exact
    def take_labels(p, x, n, first, lanes, shifted, x_label, label_weight):
        """Move what belongs to the labels out of the tile; ignored rows give theirs of class 0, for nobody."""
        ignore_index, w, stride = get(p, FIELDS.ignore_index), get(p, FIELDS.weight), get(p, FIELDS.target_inner)
        labels = get(p, FIELDS.target) + 8 * (n * get(p, FIELDS.target_outer) + first * stride)
        for lane in range(LANES):
            label = 0
            if lane < lanes:
                label = load(np.int64, labels, lane * stride)
                label = 0 if label == ignore_index else label
            store(real, shifted, lane, load_apart(real, x, label * LANES + lane))
            store(real, x, label * LANES + lane, minus_infinity)
            store(real, label_weight, lane, load(real, w, label) if w else one)
        for lane in range(LANES):
            store(real, x_label, lane, exp(load(real, shifted, lane)))

    @exact
    def finish(p, n, first, lanes, others, shifted, x_label, label_weight, d):
        """Turn statistics into losses, `others` into factors and `x_label` into gradients at the labels."""
        smoothing = get_real(p, FIELDS.smoothing)
        confidence, per_class = real(1 - smoothing), real(smoothing / get(p, FIELDS.classes))
        weight_sum = real(get_real(p, FIELDS.weight_sum))
        losses = get(p, FIELDS.losses)
        if losses:
            losses += real_size * (n * get(p, FIELDS.inner) + first)
            for lane in range(LANES):
                loss = label_loss(
                    load(real, others, lane), load(real, x_label, lane), load(real, shifted, lane),
                    load(real, d, lane), confidence, load(real, label_weight, lane), per_class, weight_sum,
                )  # fmt: skip
                store(real, shifted, lane, loss)
            for lane in range(lanes):
                store(real, losses, lane, load(real, shifted, lane))
        if get(p, FIELDS.grad):
            if get(p, FIELDS.upstream):
                for lane in range(lanes):
                    store(real, d, lane, upstream(p, n, first + lane))
            else:
                g = upstream(p, n, first)
                for lane in range(LANES):
                    store(real, d, lane, g)
            for lane in range(LANES):
                g = load(real, d, lane)
                factor, at_label = label_gradient(
                    load(real, others, lane), load(real, x_label, lane), g, confidence,
                    load(real, label_weight, lane), per_class, weight_sum,
                )  # fmt: skip
                store(real, others, lane, factor)
                store(real, x_label, lane, at_label)
                store(real, d, lane, g * per_class)

    @exact
    def write_labels(p, n, first, lanes, grad, at_label):
        """Write the gradients at the labels, and the zeros of ignored rows."""
        ignore_index, stride = get(p, FIELDS.ignore_index), get(p, FIELDS.target_inner)
        labels = get(p, FIELDS.target) + 8 * (n * get(p, FIELDS.target_outer) + first * stride)
        by_lane, by_class, classes = get(p, FIELDS.grad_inner), get(p, FIELDS.grad_class), get(p, FIELDS.classes)
        losses = get(p, FIELDS.losses)
        for lane in range(lanes):
            label = load(np.int64, labels, lane * stride)
            if label != ignore_index:
                if grad:
                    store_apart(logits_type, grad, lane * by_lane + label * by_class, load(real, at_label, lane))
                continue
            if grad:
                for c in range(classes):
                    store_apart(logits_type, grad, lane * by_lane + c * by_class, zero)
            if losses:
                store(real, losses, n * get(p, FIELDS.inner) + first + lane, zero)

    @exact
    def compute(p, number, x):
        classes, (n, first, lanes) = get(p, FIELDS.classes), locate_tile(p, number)
        step = real_size * LANES
        m = x + step * classes
        shifted, x_label, label_weight, d = m + step, m + 2 * step, m + 3 * step, m + 4 * step
        by_lane, by_class = get(p, FIELDS.logits_inner), get(p, FIELDS.logits_class)
        tile.read(
            get(p, FIELDS.logits) + size * (n * get(p, FIELDS.logits_outer) + first * by_lane),
            by_lane, by_class, lanes, classes, x,
        )  # fmt: skip
        tile.subtract_largest(x, classes, m)
        smoothing, w = get_real(p, FIELDS.smoothing), get(p, FIELDS.weight)
        smoothed = w if smoothing != 0.0 else 0
        if smoothed:
            tile.smoothing_product(x, classes, real(smoothing / classes), w, d)
        take_labels(p, x, n, first, lanes, shifted, x_label, label_weight)
        tile.exponentials(x, classes)
        tile.sum_classes(x, classes, m)
        finish(p, n, first, lanes, m, shifted, x_label, label_weight, d)
        grad = get(p, FIELDS.grad)
        if grad:
            grad += size * (n * get(p, FIELDS.grad_outer) + first * get(p, FIELDS.grad_inner))
            tile.write(x, m, d, smoothed, grad, get(p, FIELDS.grad_inner), get(p, FIELDS.grad_class), lanes, classes)
        write_labels(p, n, first, lanes, grad, x_label)

    return compute
