"""Draw the figures of docs/kernels.md: python docs/figures.py [FOLDER]. What they show is computed, not measured."""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

IMAGES = Path(__file__).parent / "images"
# Okabe and Ito's colours, told apart also without red or green
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"
PAPER, INK, PALE = "white", "#222222", "#DDDDDD"
LANE_COLOURS = ("#9CCBE8", "#F3C69A", "#A5D9C3", "#E5C1D5")
SETTINGS = {
    "svg.hashsalt": "softmax_fused",  # the same drawing is the same file
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
}


def passes() -> Figure:
    """Logits-sized reads and writes of memory, one box each."""
    read, write = "read", "write"
    lines = {
        "torch eager": [
            (read, "logits"),
            (write, "log p"),
            (write, "gradient\nof log p"),
            (read, "gradient\nof log p"),
            (read, "log p"),
            (write, "gradient"),
        ],
        "ours": [(read, "logits"), (read, "logits"), (write, "gradient")],
        "ours, grad_in_forward": [(read, "logits"), (write, "gradient")],
    }
    forward = {"torch eager": 2, "ours": 1, "ours, grad_in_forward": 2}
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, (name, steps) in enumerate(lines.items()):
        for place, (kind, what) in enumerate(steps):
            gap = 0.16 * (place >= forward[name])
            colour = LANE_COLOURS[0] if kind == read else LANE_COLOURS[1]
            axes.add_patch(Rectangle((place + gap, row - 0.34), 0.96, 0.68, facecolor=colour, edgecolor=INK))
            axes.text(place + gap + 0.48, row, f"{kind}\n{what}", ha="center", va="center", fontsize=10)
        axes.text(0, row - 0.4, "forward", fontsize=9, color="#666666", va="bottom")
        if forward[name] < len(steps):
            axes.text(forward[name] + 0.16, row - 0.4, "backward", fontsize=9, color="#666666", va="bottom")
    axes.set(xlim=(0, 6.3), ylim=(2.45, -0.7), yticks=range(3), xticks=[])
    axes.set_yticklabels(["torch eager", "ours", "ours,\ngrad_in_forward"], fontsize=11)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def online() -> Figure:
    """A row's logits in blocks, the running maximum, and the running sum, which is rescaled where that rises."""
    classes, block = 24, 6
    z = np.random.default_rng(4).normal(0, 1.3, classes)
    z[14], z[20] = 3.1, 2.2
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    m, s = -np.inf, 0.0
    maxima, kept, added = [], [], []
    for start in range(0, classes, block):
        part = z[start : start + block]
        m_new = max(m, part.max())
        kept.append(s * np.exp(m - m_new) if s else 0.0)
        added.append(np.exp(part - m_new).sum())
        m, s = m_new, kept[-1] + added[-1]
        maxima.append(m)
    for axes in (top, bottom):
        for start in range(0, classes, 2 * block):
            axes.axvspan(start - 0.5, start + block - 0.5, color="#F2F2F2", zorder=0)
    top.plot(range(classes), z, "o", color=BLUE, label="logits z")
    edges = np.arange(0, classes + 1, block) - 0.5
    top.stairs(maxima, edges, baseline=None, color=ORANGE, linewidth=2.5, label="running maximum m, after the block")
    top.set_ylim(z.min() - 0.5, 5.4)
    top.legend(loc="upper left", frameon=False, ncols=2)
    top.set_ylabel("logit")
    middle = edges[:-1] + block / 2
    bottom.bar(middle, kept, 2.2, color=SKY, label="s so far, times exp(m before - m now)")
    bottom.bar(middle, added, 2.2, bottom=kept, color=GREEN, label="the block's sum of exp(z - m)")
    for place, (old, new, highest) in enumerate(zip(kept, added, maxima, strict=True)):
        bottom.annotate(
            f"m = {highest:.2f}\ns = {old + new:.2f}",
            (middle[place] + 1.25, (old + new) / 2),
            va="center",
            fontsize=10,
        )
    bottom.set_ylim(0, max(np.add(kept, added)) * 1.75)
    bottom.legend(loc="upper left", frameon=False, ncols=2)
    bottom.set(ylabel="running sum s", xlabel="class", xlim=(-0.5, classes - 0.5))
    return figure


def brace(axes: Axes, low: float, high: float, y: float, text: str) -> None:
    """A line under a text, from low to high."""
    axes.plot([low, low, high, high], [y - 0.12, y, y, y - 0.12], color=INK, linewidth=1)
    axes.text((low + high) / 2, y + 0.12, text, ha="center", va="bottom", fontsize=10)


def lanes() -> Figure:
    """A long row in memory: which thread takes which elements, and what is the row's edge."""
    vector, count, offset, end, target = 4, 18, 3, 70, 30
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    for j in range(vector * count):
        number = j // vector
        is_edge = number in (0, target // vector, count - 1)
        colour = PAPER if j < offset or j >= end else PALE if is_edge else LANE_COLOURS[(number - 1) % 4]
        colour = ORANGE if j == target else colour
        hatch = "////" if j < offset or j >= end else ""
        axes.add_patch(Rectangle((j, 3), 1, 0.8, facecolor=colour, edgecolor="#999999", linewidth=0.5, hatch=hatch))
        if j % vector == 0:
            axes.add_patch(Rectangle((j, 3), vector, 0.8, fill=False, edgecolor=INK, linewidth=1.3))
            if not is_edge:
                axes.text(j + vector / 2, 3.4, f"{(number - 1) % 4}", ha="center", va="center", fontsize=11)
    brace(axes, 4, 36, 4.15, "a block: 2 repeats of 4 lanes of 4 adjacent classes, without a mask")
    brace(axes, 36, 68, 4.15, "the next block")
    axes.annotate(
        "16-byte boundary;\nthe row begins later", (0, 3), (0, 1.95), va="top", fontsize=10,
        arrowprops={"arrowstyle": "->", "color": INK},
    )  # fmt: skip
    axes.annotate(
        "target class, and its vector", (target + 0.5, 3), (target + 0.5, 2.35), ha="center", va="top", fontsize=10,
        arrowprops={"arrowstyle": "->", "color": ORANGE},
    )  # fmt: skip
    axes.annotate(
        "the row ends\ninside a vector", (end - 0.5, 3), (72, 1.95), ha="right", va="top", fontsize=10,
        arrowprops={"arrowstyle": "->", "color": INK},
    )  # fmt: skip
    for lane, colour in enumerate(LANE_COLOURS):
        left = 17 + 10.2 * lane
        axes.add_patch(Rectangle((left, 0.75), 8.2, 0.75, facecolor=colour, edgecolor=INK))
        axes.text(left + 4.1, 1.12, f"lane {lane}: m, s", ha="center", va="center", fontsize=11)
        axes.add_patch(FancyArrowPatch((left + 4.1, 0.75), (36.4, 0.05), arrowstyle="->", mutation_scale=12, color=INK))
    axes.text(36.4, -0.08, "merged once, after the last block: m, s of the row", ha="center", va="top", fontsize=11)
    axes.add_patch(Rectangle((0, 0.85), 2, 0.55, facecolor=PALE, edgecolor=INK))
    axes.text(2.6, 1.12, "the row's edge:\nan element a lane", va="center", fontsize=10)
    axes.set(xlim=(-0.3, 72.3), ylim=(-0.6, 4.8))
    axes.axis("off")
    return figure


def programs() -> Figure:
    """Which program takes which logits, for four kinds of shapes."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    panels = figure.subplots(1, 4)
    shades = (*LANE_COLOURS, "#C9C3E6", "#E6E0A8")
    kinds: list[tuple[str, str, Any]] = [
        ("few classes", "a program: many rows,\none a thread", lambda r, _: r // 4),
        ("many classes", "a program: one row,\nall its threads", lambda r, _: r % 6),
        ("few rows, many classes", "several programs a row,\nmerged by a second launch", lambda _, c: (c // 4) % 6),
        ("images (N, C, H, W)", "a program: neighbouring pixels,\nall their classes", lambda _, c: c // 4),
    ]
    sizes = [(12, 4), (6, 24), (1, 24), (5, 16)]
    names = [("classes", "rows"), ("classes", "rows"), ("classes", "rows"), ("pixels", "classes")]
    for axes, (title, text, program), (rows, columns), (across, down) in zip(panels, kinds, sizes, names, strict=True):
        width, height = 1 / max(columns, 12), 1 / max(rows, 12) * (1.6 if rows < 12 else 1)
        for r in range(rows):
            for c in range(columns):
                axes.add_patch(
                    Rectangle(
                        (c * width, -r * height - height), width, height,
                        facecolor=shades[program(r, c) % len(shades)], edgecolor="#888888", linewidth=0.5,
                    )
                )  # fmt: skip
        axes.set(xlim=(-0.12, 1.02), ylim=(-1.02, 0.14))
        axes.text(0, 0.03, f"{across} \N{RIGHTWARDS ARROW}", fontsize=9.5, color="#555555")
        axes.text(
            -0.03, 0, f"{down} \N{RIGHTWARDS ARROW}", fontsize=9.5, color="#555555", rotation=-90, ha="right", va="top"
        )
        axes.set_title(title, fontsize=12, loc="left")
        axes.set_xlabel(text, fontsize=10)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def shift_errors(shift: float) -> tuple[float, float]:
    """Return the largest relative errors of the probabilities with one number a row, and with m and log s."""
    f = np.float32
    z = (np.random.default_rng(0).normal(0, 1, 1000) + shift).astype(f)
    m = z.max()
    log_s = np.log(np.exp(z - m).sum(dtype=f))
    wide = z.astype(np.float64)
    p = np.exp(wide - wide.max() - np.log(np.exp(wide - wide.max()).sum()))
    one = np.exp(z - f(m + log_s))
    two = np.exp((z - m) - log_s)
    return float(np.abs(one / p - 1).max()), float(np.abs(two / p - 1).max())


def confident_errors(gap: float) -> tuple[float, float]:
    """Return the relative errors of p - 1, as a difference and by log1p and expm1, for a target class ahead by gap."""
    f = np.float32
    others = np.exp(f(-gap)) * f(9)  # nine classes equally far behind
    exact = -np.expm1(-np.log1p(9 * np.exp(-float(f(gap)))))
    naive = f(1) - f(1) / (f(1) + others)
    careful = -np.expm1(-np.log1p(others))
    return float(abs(naive / exact - 1)), float(abs(careful / exact - 1))


def precision() -> Figure:
    """Errors in float32 of two ways to write the same formula."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    shifts = np.logspace(0, 6, 61)
    one, two = zip(*map(shift_errors, shifts), strict=True)
    left.loglog(shifts, one, color=ORANGE, linestyle="--", label="exp(z - (m + log s)): one number a row")
    left.loglog(shifts, two, color=BLUE, label="exp((z - m) - log s): two numbers a row")
    left.set(xlabel="added to all logits of a row", title="Probabilities of 1,000 classes", ylim=(1e-8, 100))
    gaps = np.linspace(0, 24, 97)
    naive, careful = zip(*map(confident_errors, gaps), strict=True)
    least = 1e-9  # errors of 0 are drawn at the lower edge
    right.semilogy(gaps, np.maximum(naive, least), color=ORANGE, linestyle="--", label="p - 1")
    right.semilogy(gaps, np.maximum(careful, least), color=BLUE, label="expm1(log p), log p = -log1p(the others)")
    right.set(
        xlabel="target class's logit less the other nine", title="Gradient of a confident row's target class",
        ylim=(1e-9, 100),
    )  # fmt: skip
    for axes in (left, right):
        axes.set_ylabel("largest relative error" if axes is left else "relative error")
        axes.legend(loc="upper left", frameon=False, fontsize=10)
        axes.grid(alpha=0.3)
    return figure


FIGURES = {"passes": passes, "online": online, "lanes": lanes, "programs": programs, "precision": precision}


def draw(folder: Path = IMAGES) -> list[Path]:
    """Write every figure; returns where they are."""
    paths = []
    with mpl.rc_context(SETTINGS):
        for name, make in FIGURES.items():
            paths.append(folder / f"kernels-{name}.svg")
            make().savefig(paths[-1], format="svg", metadata={"Date": None, "Creator": None})
    return paths


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1]) if sys.argv[1:] else IMAGES), sep="\n")
