"""exp, log1p and tanh in arithmetic alone, so that LLVM vectorises the loops around them.

Errors are below one unit in the last place, tanh's below 2.5. All keep NaN. Multiplications and additions may be
fused, which changes no value class ("contract"); no other liberty is taken. They are made for float32 or float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import intrinsic

from softmax_fused.backends.numba.kernels.decorators import contracted
from softmax_fused.backends.numba.kernels.memory import reinterpret

LOG2_E = 1.4426950408889634


class Constants(NamedTuple):
    """What differs between float32 and float64."""

    real: Any
    integer: Any
    mantissa: int  # bits of it
    magic: float  # 1.5 * 2**mantissa and the exponent's bias: adding it rounds, and has n + bias in the lowest bits
    smallest: float  # exp of less is no normal number
    log_2: tuple[float, float]  # high part, of so few bits that its product with an exponent is exact, and the rest
    exponential: tuple[float, ...]  # (exp(r) - 1 - r) / r^2, highest power first; the others are 1
    logarithm: tuple[float, ...]  # (log((1 + s) / (1 - s)) - 2 s) / s^3, in powers of s^2, highest first


SINGLE = Constants(
    np.float32, np.int32, 23, 1.5 * 2**23 + 127, -87.3365447,
    (0.693359375, -2.12194440e-4),
    (0.00139050066095, 0.00836625213485, 0.041666862934, 0.166665454125, 0.49999999062),
    (0.24279078841, 0.28498786688, 0.40000972152, 0.66666662693),
)  # fmt: skip
DOUBLE = Constants(
    np.float64, np.int64, 52, 1.5 * 2**52 + 1023, -708.39641853226408,
    (6.93147180369123816490e-01, 1.90821492927058770002e-10),
    (
        2.5000061183251387353e-8, 2.7630248473168030493e-7, 2.7557586375678645834e-6, 2.4801493098635329606e-5,
        1.9841269506575745492e-4, 1.3888888943630379832e-3, 8.3333333334944636818e-3, 4.1666666666530157572e-2,
        1.6666666666666412518e-1, 5.0000000000000106272e-1,
    ),
    (
        1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
        2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01,
    ),
)  # fmt: skip
"""Coefficients of the logarithm: FreeBSD's e_log.c and e_logf.c. Of exp: those of the least relative error for
|r| <= log(2) / 2, by Remez' algorithm: 6.5e-9 and 3.6e-18."""


def polynomial(coefficients: tuple[float, ...]) -> Any:
    """Return a function that evaluates a polynomial by Horner's scheme, without a loop."""

    @intrinsic
    def evaluate(typing_context, x):
        def generate(context, builder, signature, arguments):
            (x,) = arguments
            y = x.type(coefficients[0])
            for coefficient in coefficients[1:]:
                y = builder.fmul(y, x, flags=("contract",))
                y = builder.fadd(y, x.type(coefficient), flags=("contract",))
            return y

        return x(x), generate

    return evaluate


def functions(real: Any) -> tuple[Any, Any]:
    """Return exp, for arguments up to 0, and log1p, for arguments from 0 on, in the type `real`."""
    constants = SINGLE if real is np.float32 else DOUBLE
    integer, mantissa = constants.integer, constants.mantissa
    magic, smallest, log2_e = real(constants.magic), real(constants.smallest), real(LOG2_E)
    high, low = (real(part) for part in constants.log_2)
    one, half, zero = real(1), real(0.5), real(0)
    sqrt_half, mantissa_mask = integer(np.sqrt(real(0.5)).view(integer)), integer((1 << mantissa) - 1)
    exp_of_rest, log_rest = polynomial((*constants.exponential, 1.0, 1.0)), polynomial(constants.logarithm)

    @contracted
    def exp(x):
        shifted = x * log2_e + magic
        n = shifted - magic
        r = (x - n * high) - n * low
        scale = reinterpret(real, integer(reinterpret(integer, shifted) << mantissa))
        return zero if x < smallest else exp_of_rest(r) * scale

    @contracted
    def log1p(x):
        u = one + x
        lost = (x - (u - one)) if x < one else (one - (u - x))
        offset = integer(reinterpret(integer, u) - sqrt_half)
        exponent = real(offset >> mantissa)
        f = reinterpret(real, integer((offset & mantissa_mask) + sqrt_half)) - one
        s = f / (f + real(2))
        z = s * s
        square = half * f * f
        return exponent * high - ((square - (s * (square + z * log_rest(z)) + (exponent * low + lost / u))) - f)

    return exp, log1p


def hyperbolic_tangent(real: Any) -> Any:
    """Return tanh, in the type `real`, of w = exp(-2 |x|): (1 - w) / (1 + w) or, above 1/2, 1 - 2 w / (1 + w).

    1 - w loses no digit near 0, as it comes from the polynomial; above 1/2 only the last subtraction rounds.
    """
    constants = SINGLE if real is np.float32 else DOUBLE
    integer, mantissa = constants.integer, constants.mantissa
    magic, smallest, log2_e = real(constants.magic), real(constants.smallest), real(LOG2_E)
    high, low = (real(part) for part in constants.log_2)
    one, two, zero, exp_rest = real(1), real(2), real(0), polynomial(constants.exponential)
    log_third = real(-np.log(3))

    @contracted
    def tanh(x):
        y = -two * abs(x)
        shifted = y * log2_e + magic
        n = shifted - magic
        r = (y - n * high) - n * low
        p = (r * r) * exp_rest(r) + r
        scale = reinterpret(real, integer(reinterpret(integer, shifted) << mantissa))
        w = zero if y < smallest else p * scale + scale
        above_half = y < log_third
        quotient = (two * w if above_half else (one - scale) - p * scale) / (one + w)
        t = one - quotient if above_half else quotient
        return -t if x < zero else t

    return tanh
