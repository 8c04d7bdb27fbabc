"""Tables in Markdown, from records as bench.record writes them. Every row that was measured is in one."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from bench.formulas import BASE, OURS

Point = dict[str, Any]
ABSENT = "-"
KINDS = ("loss", "softmax", "step")
SMALL_LOGITS = 10_000  # up to so many the host decides
SUMMARY = (  # README's rows: many classes, few, 16 bits, and images
    ((2048, 10000), "float32"),
    ((256, 128256), "float32"),
    ((4096, 1000), "float32"),
    ((60000, 10), "float32"),
    ((1, 19, 512, 1024), "float32"),
    ((2048, 10000), "bfloat16"),
)
PREDICTABLE_US = 50.0  # below, launching decides
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Row(NamedTuple):
    """A shape and dtype with its points, by mode and provider."""

    shape: tuple[int, ...]
    dtype: str
    step: bool
    operation: str
    points: dict[tuple[str, str], Point]

    @property
    def name(self) -> str:
        kind = {"loss": "", "rows": "outputs of rows "}.get(self.operation, f"{self.operation} ")
        return "training step, 784 → 10, batch 256" if self.step else f"{kind}({', '.join(map(str, self.shape))})"

    @property
    def whole(self) -> str:
        """The mode that counts."""
        return "step" if self.step else "both"

    def value(self, mode: str, provider: str, key: str) -> Any:
        return self.points.get((mode, provider), {}).get(key)


def rows(points: list[Point]) -> list[Row]:
    """In the order of measuring."""
    found: dict[tuple[tuple[int, ...], str, bool, str], Row] = {}
    for point in points:
        key = tuple(point["shape"]), point["dtype"], point["mode"] == "step", point.get("operation", "loss")
        row = found.setdefault(key, Row(*key, {}))
        row.points[point["mode"], point["provider"]] = point
    return list(found.values())


def providers(points: list[Point]) -> list[str]:
    """Ours first; torch eager last: it is what the others are divided by."""
    names = dict.fromkeys(point["provider"] for point in points)
    return sorted(names, key=lambda name: (name == BASE, not name.startswith(OURS)))


def markdown(titles: list[str], lines: list[list[str]]) -> str:
    table = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def show(value: float | None, text: Callable[[float], str] = "{:.2f}".format) -> str:
    return ABSENT if value is None else text(value)


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:,.{2 if microseconds < 1e5 else 0}f} ms"


def speed_line(row: Row, names: list[str]) -> list[str]:
    """Torch eager's time over each provider's; the fastest is bold.

    By the ratios, which are shown: a provider with the smaller median time may have had the quieter rounds.
    """
    medians = {name: row.value(row.whole, name, "p50_us") for name in names}
    ratios = {name: row.value(row.whole, name, "ratio_p50") for name in names}
    fastest = max(filter(None, ratios.values()), default=None)
    cells = [show(row.value(mode, OURS, "ratio_p50")) for mode in ("forward", "backward")]
    for name in names:
        cell = milliseconds(medians[name]) if name == BASE and medians[name] else None
        cell = cell or show(ratios[name])
        cells.append(f"**{cell}**" if ratios[name] and ratios[name] == fastest else cell)
    return [row.name, row.dtype, *cells, show(medians.get(OURS), milliseconds)]


def speed_table(points: list[Point]) -> str:
    if not points:
        return ""
    names = providers(points)
    both = [f"both: {name.removeprefix(f'{OURS}, ')}{', time' if name == BASE else ''}" for name in names]
    titles = ["logits", "dtype", "forward: ours", "backward: ours", *both, "both: ours, time"]
    return markdown(titles, [speed_line(row, names) for row in rows(points)])


def summary_table(points: list[Point]) -> str:
    """The rows of `SUMMARY`: loss and gradient, torch eager's time over each provider's, without the other modes."""
    lines = [
        row for row in rows(points) if (row.shape, row.dtype) in SUMMARY and row.operation == "loss" and not row.step
    ]
    names = providers([point for row in lines for point in row.points.values()])
    titles = ["torch, time" if name == BASE else name for name in names]
    cells = [[row.name, row.dtype, *speed_line(row, names)[4:-1]] for row in lines]
    return markdown(["logits", "dtype", *titles], cells)


def in_logits(row: Row, provider: str) -> float | None:
    """Peak memory of loss and gradient in units of the logits."""
    peak = row.value("both", provider, "peak_bytes")
    return None if peak is None else peak / (prod(row.shape) * ITEMSIZE[row.dtype])


def memory_sentence(points: list[Point]) -> str:
    """For the few shapes of the CPU."""
    sentences = []
    for row in rows(points):
        peaks = {name: in_logits(row, name) for name in providers(points)}
        said = [f"{name} {peak:.2f}" for name, peak in peaks.items() if peak is not None]
        if said:
            sentences.append(
                f"Peak memory of loss and gradient at {row.name} {row.dtype}, beyond logits and target, in units of "
                f"the logits: {'; '.join(said)}."
            )
    return "\n".join(sentences)


def kind(point: Point) -> str:
    """One of KINDS."""
    return "step" if point["mode"] == "step" else point.get("operation", "loss")


def share_of_copy(row: Row, provider: str) -> float | None:
    return row.value(row.whole, provider, "percent_of_copy")


def provider_table(points: list[Point], value: Callable[[Row, str], float | None], form: str) -> str:
    """A figure of loss and gradient by case and provider, without providers that have none."""
    lines = rows(points)
    names = [name for name in providers(points) if any(value(row, name) is not None for row in lines)]
    cells = [[row.name, row.dtype, *(show(value(row, name), form.format) for name in names)] for row in lines]
    return markdown(["logits", "dtype", *names], cells) if names else ""


def launch_table(points: list[Point]) -> str:
    """Who waits for whom where a batch is small: the device alone, the host until it has enqueued, a training loop."""
    figures = {"p50_us": "device, µs", "host_us": "host, µs", "loop_us": "in a loop, µs", "launches": "launches"}
    names, cells = providers(points), []
    for row in rows(points):
        for key, title in figures.items():
            values = [row.value(row.whole, name, key) for name in names]
            if prod(row.shape) <= SMALL_LOGITS and any(values):
                cells.append([row.name, row.dtype, title, *(show(value, "{:,.0f}".format) for value in values)])
    return markdown(["batch", "dtype", "", *names], cells) if cells else ""


def epoch_table(sides: list[dict[str, Any]]) -> str:
    cells = [[it["side"], f"{it['seconds']:.3f} s", f"{it['to_bare_loop']:.2f}"] for it in sides]
    return markdown(["", "time", "to the bare loop's"], cells) if cells else ""


def kernels_table(kernels: list[dict[str, Any]]) -> str:
    """What bench.codegen says that a kernel takes at least, at this machine's rate of copying, and what it took."""
    cells = []
    for kernel in kernels:
        least, measured = kernel.get("predicted_us"), kernel["measured_us"]
        at_least = ABSENT if least is None else f"{milliseconds(least)} ({kernel['bound']})"
        name = f"({', '.join(map(str, kernel['shape']))})", kernel["kind"], kernel["mode"]
        cells.append([*name, at_least, milliseconds(measured), show(least and measured / least)])
    return markdown(["logits", "call", "launch", "at least", "measured", "times the least"], cells) if cells else ""


def tests_sentence(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{number:,} {name}" for name, number in found["counts"].items()) or "none has run"
    late = f"; {found['interrupted']} processes did not finish in time" if found["interrupted"] else ""
    return f"Tests on this GPU: {counts}{late}."


def absent_sentence(record: dict[str, Any]) -> str:
    """Parts that did not succeed, and who could not do which cases, with the reasons."""
    reasons = {name: [part["error"]] for name, part in record.get("parts", {}).items() if part["error"]}
    for skip in record["skipped"]:
        known = reasons.setdefault(skip["provider"], [])
        known += [skip["reason"]] if skip["reason"] not in known else []
    said = [f"{name} ({'; '.join(' '.join(reason.split()) for reason in why)})" for name, why in reasons.items()]
    return f"Not measured, or not all of it: {'; '.join(said)}." if said else ""


def predicted_table(kernels: list[dict[str, Any]]) -> str:
    """What the machine code for an H100 or H200 holds in bfloat16, for every call whose kernels go over the logits."""
    titles = ["logits", "dtype", "call", "launch", "registers", "instructions per logit", "EX2 per logit"]
    lines = [
        [
            f"({', '.join(map(str, kernel['shape']))})",
            kernel["dtype"],
            kernel["kind"],
            kernel["mode"],
            f"{kernel['registers']}",
            f"{kernel['instructions_per_element']:.1f}",
            f"{kernel['ex2_per_element']:.2f}",
            f"{milliseconds(kernel['predicted_us'])} ({kernel['bound']})",
        ]
        for kernel in kernels
        if (kernel["target"], kernel["dtype"]) == ("sm_90", "bfloat16")
        and kernel.get("predicted_us", 0) >= PREDICTABLE_US
    ]
    return markdown([*titles, "at least, on an H200 (bound by)"], lines) if lines else ""
