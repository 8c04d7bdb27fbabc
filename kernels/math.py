"""Scalar functions that lose no digits, and conversions."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate relative to itself: 2 atanh(x / (2 + x)) by its series up to 1/2."""
    w = x / (2.0 + x)
    w2 = w * w
    series = w2 * 0.0
    for i in tl.static_range(12, -1, -1):
        series = series * w2 + 1.0 / (2 * i + 1)
    return tl.where(x <= 0.5, 2.0 * w * series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, accurate relative to itself: the Taylor series down to -0.7."""
    series = x * 0.0 + 1.0
    for i in tl.static_range(17, 1, -1):
        series = 1.0 + x * series * (1.0 / i)
    return tl.where(x >= -0.7, x * series, tl.exp(x) - 1.0)


@triton.jit
def exponential(x):
    """exp(x): in float32 one multiplication and one EX2, subnormal results flushed to 0; float64 in full precision."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = tl.exp2(x * 1.4426950408889634)
    return y


@triton.jit
def tanh(x):
    """Return tanh x, accurate relative to itself: 1 - 2 / (1 + exp(2x)), where that cancels otherwise.

    Float32 has a minimax polynomial up to 0.55, with a truncation error of 4e-8; float64 has expm1.
    """
    if x.dtype == tl.float64:
        y = expm1(-2.0 * tl.abs(x))
        y = -y / (2.0 + y)
        y = tl.where(x < 0.0, -y, y)
    else:
        far = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
        x2 = x * x
        series = -0.3333294663 + x2 * (0.1332072502 + x2 * (-0.0526718118 + x2 * 0.0164375790))
        y = tl.where(tl.abs(x) < 0.55, x + x * x2 * series, far)
    return y


@triton.jit
def rounded_product(x, y):
    """Return x * y for a sum over lanes.

    Lanes add their neighbour's term to their own. The compiler fuses a plain product into that addition, but cannot
    fuse the product that came from the neighbour: one term exact, one rounded, and two lanes that should hold the same
    sum differ in its last bits. A product that is already a fused multiply-add is not fused again, and costs the same.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """Return x as DTYPE, to bfloat16 by way of float32: Triton's interpreter has no other way from float64."""
    if DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def from_parts(parts, ACC: tl.constexpr):
    """Return a number that came as two float32, high and low part: Triton passes floats in single precision only."""
    return tl.full((), parts[0], ACC) + tl.full((), parts[1], ACC)


@triton.jit
def lowest(SIZE: tl.constexpr, ACC: tl.constexpr):
    """Return a vector of the lowest finite number, where a running maximum starts."""
    if ACC == tl.float64:
        m = tl.full((SIZE,), -1.7976931348623157e308, ACC)
    else:
        m = tl.full((SIZE,), -3.4028234663852886e38, ACC)
    return m
