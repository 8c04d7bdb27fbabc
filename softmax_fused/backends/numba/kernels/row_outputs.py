"""Several outputs of a row, and their gradient: what rows one by one and in tiles have in common.

x = softcap * tanh(scale * z / softcap),  m = max x,  e = exp(x - m),  r = sum e without the class of m,  s = 1 + r
log s = log1p(r),  u = sum e (x - m),  log-sum-exp = m + log s,  log p = x - m - log s,  entropy H = log s - u / s
gradient by x: e / s * (g_loss A + g_lse - g_log_prob - g_H (x - m - u / s)) - g_loss a, and + g_log_prob at the label;
by z: that times scale * (1 - tanh^2)

`r` leaves the largest logit out: where that is most of the softmax, no digit of the others is lost beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from softmax_fused.backends.numba.call import FIELDS, RESULT_TYPES, ROW_FIELDS
from softmax_fused.backends.numba.kernels.decorators import exact
from softmax_fused.backends.numba.kernels.losses import dense_function, label_functions
from softmax_fused.backends.numba.kernels.math import functions
from softmax_fused.backends.numba.kernels.memory import SIZES, Types, get, get_real, load, store

LEAST_DIFFERENCE = -1e4
"""Less than every x - m whose exponential is not 0; -inf times that 0 would be NaN."""


class Statistics(NamedTuple):
    """What is known of a row before its outputs, or factors of its gradient."""

    m: Any
    top: Any  # class of m
    r: Any
    u: Any
    x_label: Any  # of the label: x - m
    e_label: Any  # its exponential
    total: Any  # A, if the target is dense
    d: Any  # <a, x - m>, if the target is dense


class Addresses(NamedTuple):
    """Functions of a call's address and, all but the last, of a row's two numbers."""

    logits: Any
    grad: Any
    target: Any
    label: Any  # what lies there, -1 where it is ignored or there are class probabilities
    row_scale: Any  # of the row's one number


def address_functions(types: Types) -> Addresses:
    """Return where the tensors of a row lie, and what its logits are multiplied by."""
    logits_type, target_type, real = types
    has_labels = target_type is None
    size, target_size = SIZES[logits_type], 8 if has_labels else SIZES[target_type]

    @exact
    def logits(p, n, i):
        return get(p, FIELDS.logits) + size * (n * get(p, FIELDS.logits_outer) + i * get(p, FIELDS.logits_inner))

    @exact
    def grad(p, n, i):
        return get(p, FIELDS.grad) + size * (n * get(p, FIELDS.grad_outer) + i * get(p, FIELDS.grad_inner))

    @exact
    def target(p, n, i):
        return get(p, FIELDS.target) + target_size * (n * get(p, FIELDS.target_outer) + i * get(p, FIELDS.target_inner))

    @exact
    def label(p, n, i):
        if not has_labels:
            return -1
        found = load(np.int64, target(p, n, i), 0)
        return -1 if found == get(p, FIELDS.ignore_index) else found

    @exact
    def row_scale(p, number):
        scale, of_rows = real(get_real(p, ROW_FIELDS.scale)), get(p, ROW_FIELDS.row_scale)
        return scale * load(real, of_rows, number) if of_rows else scale

    return Addresses(logits, grad, target, label, row_scale)


def reads_shares(types: Types) -> Any:
    """Return whether every class has a share of the target of a call, and something asks for it."""
    has_labels = types.target is None

    @exact
    def dense(p):
        asked = get(p, ROW_FIELDS.loss) or get(p, ROW_FIELDS.by_loss)
        return asked and (not has_labels or get_real(p, FIELDS.smoothing) != 0.0)

    return dense


def others_function(real: Any) -> Any:
    """Return a function for the sum of the exponentials of all classes but the label's, and the label's."""
    zero, one = real(0), real(1)

    @exact
    def others_and_label(r, e_label, is_top):
        if is_top:
            return r, one
        rest = r - e_label
        return one + (zero if rest < zero else rest), e_label

    return others_and_label


def result_writer() -> Any:
    """Return a function that writes an output of a row, which is float64, in the type of the call's results."""
    single, double, half, brain = (getattr(np, name) for name in RESULT_TYPES)

    @exact
    def write(p, where, number, value):
        kind = get(p, ROW_FIELDS.result_type)
        if kind == 0:
            store(single, where, number, np.float32(value))
        elif kind == 1:
            store(double, where, number, value)
        elif kind == 2:
            store(half, where, number, value)
        else:
            store(brain, where, number, value)

    return write


def outputs_writer(types: Types) -> Any:
    """Return a function that writes the outputs of a row that the call has an address for."""
    real, has_labels = types.real, types.target is None
    _, log1p = functions(real)
    label_loss, _ = label_functions(real, log1p)
    others_and_label, write, one, dense_loss = others_function(real), result_writer(), real(1), dense_function(real)

    @exact
    def write_of_softmax(p, number, row, log_s):
        if get(p, ROW_FIELDS.logsumexp):
            value = np.float64(row.m) + (np.float64(0) if np.isinf(row.m) else np.float64(log_s))
            write(p, get(p, ROW_FIELDS.logsumexp), number, value)
        if get(p, ROW_FIELDS.prediction):
            store(np.int64, get(p, ROW_FIELDS.prediction), number, row.top)
        if get(p, ROW_FIELDS.entropy):
            write(p, get(p, ROW_FIELDS.entropy), number, np.float64(log_s - row.u / (one + row.r)))

    @exact
    def write_ignored(p, number):
        if get(p, ROW_FIELDS.loss):
            write(p, get(p, ROW_FIELDS.loss), number, 0.0)
        if get(p, ROW_FIELDS.log_prob):
            write(p, get(p, ROW_FIELDS.log_prob), number, 0.0)
        if get(p, ROW_FIELDS.rank):
            store(np.int64, get(p, ROW_FIELDS.rank), number, -1)

    @exact
    def write_of_label(p, number, label, row, log_s, larger):
        smoothing, w = get_real(p, FIELDS.smoothing), get(p, FIELDS.weight)
        if get(p, ROW_FIELDS.loss):
            others, e_label = others_and_label(row.r, row.e_label, label == row.top)
            loss = label_loss(
                others, e_label, row.x_label, row.d, real(1 - smoothing), load(real, w, label) if w else one,
                real(smoothing / get(p, FIELDS.classes)), real(get_real(p, FIELDS.weight_sum)),
            )  # fmt: skip
            write(p, get(p, ROW_FIELDS.loss), number, np.float64(loss))
        if get(p, ROW_FIELDS.log_prob):
            write(p, get(p, ROW_FIELDS.log_prob), number, np.float64(row.x_label - log_s))
        if get(p, ROW_FIELDS.rank):
            store(np.int64, get(p, ROW_FIELDS.rank), number, larger)

    @exact
    def write_outputs(p, number, label, row, larger):
        """Write the outputs; `label` is -1 in ignored rows, `larger` the label's rank."""
        log_s = log1p(row.r)
        write_of_softmax(p, number, row, log_s)
        if not has_labels:
            if get(p, ROW_FIELDS.loss):
                write(p, get(p, ROW_FIELDS.loss), number, np.float64(dense_loss(row.total, log_s, row.d)))
        elif label < 0:
            write_ignored(p, number)
        else:
            write_of_label(p, number, label, row, log_s, larger)

    return write_outputs


class Factors(NamedTuple):
    """The gradient by x is e * (of_e - by_entropy * (x - m)) - of_share * a, and `at_label` at the label.

    All are 0 in a row of which nothing is asked; its logits may be NaN.
    """

    of_e: Any
    by_entropy: Any
    of_share: Any
    at_label: Any


def gradient_factors(types: Types) -> Any:
    """Return a function for the factors of a row's gradient."""
    real, has_labels = types.real, types.target is None
    _, log1p = functions(real)
    _, label_gradient = label_functions(real, log1p)
    others_and_label, zero, one, least = others_function(real), real(0), real(1), real(LEAST_DIFFERENCE)

    @exact
    def upstream(p, field, number):
        where = get(p, field)
        return load(real, where, number) if where else zero

    @exact
    def factors(p, number, label, row):
        """Return the factors; `label` is -1 in ignored rows."""
        g, g_log_prob = upstream(p, ROW_FIELDS.by_loss, number), upstream(p, ROW_FIELDS.by_log_prob, number)
        g_logsumexp, g_entropy = (
            upstream(p, ROW_FIELDS.by_logsumexp, number),
            upstream(p, ROW_FIELDS.by_entropy, number),
        )
        if has_labels and label < 0:
            g, g_log_prob = zero, zero
        if g == zero and g_log_prob == zero and g_logsumexp == zero and g_entropy == zero:
            return Factors(zero, zero, zero, zero)
        s = one + row.r
        by_entropy = g_entropy / s
        of_softmax = (g_logsumexp + by_entropy * row.u) / s
        of_e, at_label = of_softmax - g_log_prob / s, zero
        if not has_labels:
            of_e += zero if g == zero else g * row.total / s
        elif label >= 0:
            others, e_label = others_and_label(row.r, row.e_label, label == row.top)
            difference = least if row.x_label < least else row.x_label
            at_label = e_label * (of_softmax - by_entropy * difference) + g_log_prob * (others / s)
            if g != zero:
                w, smoothing = get(p, FIELDS.weight), get_real(p, FIELDS.smoothing)
                by_loss, of_loss = label_gradient(
                    others, e_label, g, real(1 - smoothing), load(real, w, label) if w else one,
                    real(smoothing / get(p, FIELDS.classes)), real(get_real(p, FIELDS.weight_sum)),
                )  # fmt: skip
                of_e, at_label = of_e + by_loss, at_label + of_loss
        return Factors(of_e, by_entropy, g, at_label)

    return factors
