"""Pictures of a record: how many times faster than torch eager, a bar a provider, on a logarithmic axis around 1."""

from pathlib import Path
from typing import Any

from bench.formulas import BASE, OURS
from bench.tables import Row, providers, rows
from softmax_fused.training.wording import plural

# Okabe and Ito's colours, told apart also without red or green
COLOURS = {
    OURS: "#0072B2",
    "ours, grad_in_forward": "#56B4E9",
    "ours, inplace_backward": "#009E73",
    "torch.compile": "#E69F00",
    "Liger": "#CC79A7",
    "flash-attn": "#D55E00",
    "QuACK": "#F0E442",
}
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30)


def figure_names(stem: str, record: dict[str, Any]) -> list[str]:
    """One a dtype."""
    dtypes = dict.fromkeys(point["dtype"] for point in record["points"] if point["mode"] != "step")
    return [f"speed-{stem}-{dtype}.png" for dtype in dtypes]


def draw_all(folder: Path, stem: str, record: dict[str, Any]) -> list[Path]:
    """Draw a record's figures; returns where they are."""
    paths = [folder / name for name in figure_names(stem, record)]
    for path in paths:
        draw(path, record, path.stem.rpartition("-")[2])
    return paths


def draw(path: Path, record: dict[str, Any], dtype: str) -> None:
    """Draw loss and gradient together: the only mode in which those that compute the gradient early are comparable."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    points = [point for point in record["points"] if point["dtype"] == dtype]
    names = [name for name in providers(points) if name != BASE]
    lines = rows(points)
    with plt.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(10, 1.6 + len(lines) * (0.25 + 0.22 * len(names))), layout="constrained")
        for number, name in enumerate(names):
            add_bars(
                axes, lines, name, offset=(number - (len(names) - 1) / 2) * 0.8 / len(names), height=0.8 / len(names)
            )
        axes.axvline(1, color="black", linewidth=1.5)
        axes.set_yticks(range(len(lines)), [row.name.replace(", batch", ",\nbatch") for row in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(low * 0.95, 0.7), max(high * 1.1, 1.5))
        axes.set_xlabel("slower  ←  torch eager's time over theirs, loss and gradient  →  faster")
        busy = record["machine"].get("busy")
        beside = f", beside {busy} busy {plural('process', busy)}" if busy else ""
        axes.set_title(f"{record['machine']['name']}{beside}, {dtype}", loc="left")
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def add_bars(axes: Any, lines: list[Row], name: str, offset: float, height: float) -> None:
    """Bars from 1 to the ratio, the ratio beside them; an absent figure leaves a gap."""
    measured = [
        (place, ratio)
        for place, row in enumerate(lines)
        if (ratio := row.value(row.whole, name, "ratio_p50")) is not None
    ]
    axes.barh(
        [place + offset for place, _ in measured],
        [ratio - 1 for _, ratio in measured],
        left=1,
        height=height,
        color=COLOURS.get(name, "#999999"),
        label=name,
    )
    for place, ratio in measured:
        text = {"ha": "left", "xytext": (4, 0)} if ratio >= 1 else {"ha": "right", "xytext": (-4, 0)}
        axes.annotate(
            f"{ratio:.2f}", (ratio, place + offset), textcoords="offset points", va="center", fontsize=11, **text
        )
