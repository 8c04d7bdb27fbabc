"""What a row's statistics make of it: its loss, and what its exponentials are multiplied by for the gradient.

a = w * ((1 - e) t + e / C),  A = sum(a),  loss = A * log s - <a, z - m>,  gradient = g * (A * p - a)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softmax_fused.backends.numba.kernels.decorators import exact


def label_functions(real: Any, log1p: Any) -> tuple[Any, Any]:
    """Return the loss, and the gradient at the label, of a row with a class index."""
    zero, one, infinity = real(0), real(1), real(np.inf)

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
            loss += per_class * weight_sum * log_s - d
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
