"""The arithmetic of the figures: bytes that must move, rates, percentiles, ratios. Nothing here measures."""

from collections.abc import Sequence
from math import floor, prod

OURS, BASE = "ours", "torch"
"""Whose speed is asked for, and what it is divided by."""

PASSES = {
    "loss": {"forward": 1, "backward": 2, "both": 2},
    "rows": {"forward": 1, "backward": 2, "both": 3},
    "softmax": {"forward": 2, "backward": 3, "both": 5},
}
"""Logits-sized passes that cannot be avoided. Of the loss: read; read and write; and for both still one read and one
write, which only a loss that computes its gradient in the forward pass gets down to; outputs of rows have an upstream
gradient each, which is not known then. Of softmax: read and write; read
output and upstream gradient, write. What is counted per row is left out."""


def minimal_bytes(mode: str, shape: Sequence[int], itemsize: int, operation: str = "loss") -> int | None:
    """Bytes of the unavoidable passes; None for what is not one operation alone."""
    passes = PASSES[operation]
    return passes[mode] * prod(shape) * itemsize if mode in passes else None


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
