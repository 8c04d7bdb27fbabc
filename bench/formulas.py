"""The arithmetic of the figures: bytes that must move, rates, percentiles, ratios. Nothing here measures."""

from collections.abc import Sequence
from math import floor, prod

OURS, BASE = "ours", "torch"
"""Whose speed is asked for, and what it is divided by."""

PASSES = {"forward": 1, "backward": 2, "both": 2}
"""Logits-sized passes that cannot be avoided: read; read and write; and for both still one read and one write, which
only a loss that computes its gradient in the forward pass gets down to. What is counted per row is left out."""


def minimal_bytes(mode: str, shape: Sequence[int], itemsize: int) -> int | None:
    """Bytes of the unavoidable passes; None for what is not a loss alone."""
    return PASSES[mode] * prod(shape) * itemsize if mode in PASSES else None


def gb_per_s(count: float, microseconds: float) -> float:
    return count / microseconds / 1e3


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    return percentile(values, 20), percentile(values, 50), percentile(values, 80)


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times faster than `base`, round by round: a machine that slows down slows both sides of a round."""
    return [left / right for left, right in zip(base, other, strict=True)]
