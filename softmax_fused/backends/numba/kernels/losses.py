"""What a row's statistics make of it: its loss, and what its exponentials are multiplied by for the gradient.

a = w * ((1 - e) t + e / C),  A = sum(a),  loss = A * log s - <a, z - m>,  gradient = g * (A * p - a)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_fused.backends.numba.kernels.decorators import exact


def dense_function(real: Any) -> Any:
    """Return the loss of shares of the target with the sum `total` = A and the product d = <a, z - m>."""
    zero = real(0)

    @exact
    def dense_loss(total, log_s, d):
        """Return A log s - d; log s is 0 in rounded numbers only, or of a single class, and inf times that is inf."""
        return (total if log_s == zero and np.isinf(total) else total * log_s) - d

    return dense_loss


def label_functions(real: Any, log1p: Any) -> tuple[Any, Any]:
    """Return the loss, and the gradient at the label, of a row with a class index."""
    zero, one, infinity, dense_loss = real(0), real(1), real(np.inf), dense_function(real)

    @exact
    def label_loss(others, x_label, shifted, d, confidence, label_weight, per_class, weight_sum):
        """Return the loss of a row whose label has z - m = `shifted` and exp of that = `x_label`.

        `others` is the sum of the exponentials without the label's, which holds a 1 unless the label's is that 1.
        """
        log_s = log1p(others if shifted == zero else (others - one) + x_label)
        a = confidence * label_weight
        nll = log_s - shifted
        loss = zero if a == zero and nll == infinity else a * nll  # 0 * inf = 0
        if per_class != zero:
            loss += dense_loss(per_class * weight_sum, log_s, d)
        return loss

    @exact
    def label_gradient(others, x_label, g, confidence, label_weight, per_class, weight_sum):
        """Return what the exponentials are multiplied by, g * A / s, and the gradient at the label.

        That is g * (A - a - A * (1 - p)), where A - a is the share of the other classes: no digit cancels where the row
        is confident.
        """
        a = (confidence + per_class) * label_weight
        total = label_weight if per_class == zero else confidence * label_weight + per_class * weight_sum
        s = others + x_label
        rest = zero if per_class == zero else per_class * (weight_sum - label_weight)
        at_label = g * (rest - total * (others / s))
        if np.isinf(total) and per_class != zero:  # another class's weight: A - a and A * (1 - p) are both infinite
            at_label = g * (total * (x_label / s) - a)
        return g * total / s, at_label

    return label_loss, label_gradient
