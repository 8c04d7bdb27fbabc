"""README's speed table from a recorded benchmark.

Usage: make bench ARGS=--benchmark-json=RECORD && python bench/table.py RECORD [--keep FILE]
--keep writes the medians and quartiles, without pytest-benchmark's every round, to commit.
"""

import json
import sys
from pathlib import Path
from typing import Any

MODES = ("forward", "backward", "both")


def condense(record: dict[str, Any]) -> dict[str, Any]:
    """Keep what a reader needs: what was measured, when, on what."""
    points = [
        point["extra_info"] | {f"{name}_us": round(point["stats"][name] * 1e6, 2) for name in ("median", "q1", "q3")}
        for point in record["benchmarks"]
    ]
    machine = record["machine_info"]
    return {"date": record["datetime"][:10], "cpu": machine["cpu"]["brand_raw"], "points": points}


def table(record: dict[str, Any]) -> str:
    """Rows of shape and dtype, columns of torch's median over ours, every row that was measured."""
    medians: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for point in record["points"]:
        row = "(" + ", ".join(map(str, point["shape"])) + ")", point["dtype"].removeprefix("torch.")
        medians.setdefault(row, {})[point["mode"], point["provider"]] = point["median_us"]
    lines = ["| logits | dtype | forward | backward | both | ours, both |", "|---|---|---|---|---|---|"]
    for (shape, dtype), times in medians.items():
        ratios = " | ".join(f"{times[mode, 'torch'] / times[mode, 'ours']:.2f}" for mode in MODES)
        lines.append(f"| {shape} | {dtype} | {ratios} | {times['both', 'ours'] / 1000:,.2f} ms |")
    return "\n".join(lines)


def main(source: Path, keep: Path | None) -> None:
    """Print the table; write the record to keep."""
    record = json.loads(source.read_text())
    record = condense(record) if "benchmarks" in record else record
    if keep:
        keep.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]) if "--keep" in sys.argv else None)
