"""Other tile sizes against today's, on a GPU.

Usage: python -m bench.sweep [--minutes M] [--tables NAME ...] [--rows BYTES ...]

Every row of every table of tile sizes, and every table that is a number, is measured in turns with its halves, doubles,
quarters and fourfolds, by two of the calls that read it: which ones do is found out by watching. Ratios are today's
time over the other's, as medians over rounds and geometric means over calls. What is better is printed as it is to
stand in the table of tile sizes; the JSON file, written after each, has every ratio. `--dry-run` does so in small, in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import sys
from pathlib import Path
from statistics import geometric_mean, median
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

import softmax_fused
from bench import dry_run, tiles
from bench.cases import JOBS, Case, Inputs, Job, Loss
from bench.clocks import CudaClock
from bench.formulas import ratios
from bench.measure import Result, attempt, short_calls, time_in_turns, warm_up
from bench.record import RESULTS, header, slug, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.clocks import Clock

MINUTES = 5.0
WORTH = 1.01
"""From this ratio on another size is better: below, it is the machine."""
CALLS = 2
"""So many calls that read a table are measured."""
COMPILING = 0.6
"""Share of the time after which no further size is compiled."""
DTYPE = torch.bfloat16


class Sizes(NamedTuple):
    """What the calls get: logits of so many bytes in long rows, and these shapes for what concerns other rows."""

    long_bytes: int
    shapes: tuple[tuple[int, ...], ...]


SIZES = Sizes(2**29, ((60_000, 10), (4096, 100), (4096, 1000), (16, 19, 512, 1024), (8, 128_256), (256, 10)))
SMALL = Sizes(2**13, ((4, 10), (2, 3, 2, 4), (2, 300)))

fused = functools.partial(softmax_fused.cross_entropy, backend="triton")
softmax = functools.partial(softmax_fused.softmax, backend="triton")
rows = functools.partial(softmax_fused.cross_entropy_rows, backend="triton")
WORK: dict[str, tuple[str, str, Loss]] = {
    "loss": ("loss", "forward", fused),
    "gradient": ("loss", "backward", fused),
    "loss and gradient": ("loss", "both", functools.partial(fused, grad_in_forward=True)),
    "softmax": ("softmax", "forward", lambda logits, _: softmax(logits, 1)),
    "softmax, gradient": ("softmax", "backward", lambda logits, _: softmax(logits, 1)),
    "row outputs": ("loss", "forward", lambda logits, target: rows(logits, target).loss.sum()),
    "row outputs, gradient": ("loss", "backward", lambda logits, target: rows(logits, target).loss.sum()),
}


class Target(NamedTuple):
    """What is swept: a row of a table, or a table that is a number."""

    table: str
    row: int | None
    value: Any

    @property
    def name(self) -> str:
        if self.row is None:
            return self.table
        return f"{self.table}, {'longer rows' if self.value[0] == math.inf else f'rows up to {self.value[0]:,} bytes'}"

    def shapes(self, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
        """Shapes whose rows are the longest that the row of the table serves; twice the last limit beyond it.

        Eleven sixteenths of that: rows that fill a power of two stay in registers, and are no matter of the table.
        """
        if self.row is None:
            return sizes.shapes
        limits = [it[0] for it in getattr(tiles.tables(), self.table)]
        row_bytes = self.value[0] if self.value[0] != math.inf else 2 * limits[-2] if len(limits) > 1 else 2**17
        return ((max(1, sizes.long_bytes // row_bytes), row_bytes * 11 // 16 // DTYPE.itemsize),)


def targets(tables: Sequence[str] | None, limits: Sequence[float] | None) -> list[Target]:
    """The rows asked for of the tables asked for; tables of rows first."""
    found = []
    for name in tables or tiles.tables()._fields:
        value = getattr(tiles.tables(), name)
        entries = [(None, value)] if isinstance(value, int) else list(enumerate(value))
        found += [
            Target(name, row, entry) for row, entry in entries if not limits or (row is not None and entry[0] in limits)
        ]
    return sorted(found, key=lambda target: target.row is None)


def make_job(name: str, shape: tuple[int, ...], device: str) -> Job:
    operation, mode, loss = WORK[name]
    return JOBS[mode](loss, Inputs(Case(shape, DTYPE, operation=operation), device), False)


@functools.cache
def reads(name: str, shape: tuple[int, ...], device: str) -> frozenset[str]:
    """The tables that a call looks at for logits of so many dimensions and classes."""
    found: set[str] = set()
    with tiles.fields_read(found):
        job = make_job(name, (min(shape[0], 4), shape[1], *(min(size, 4) for size in shape[2:])), device)
        job.prepare()
        found.clear()  # a backward pass's forward pass
        job.call()
    return frozenset(found)


def calls_of(target: Target, sizes: Sizes, device: str) -> list[tuple[str, tuple[int, ...]]]:
    """Calls that read the target's table, and the shapes for them."""
    found = []
    for shape in target.shapes(sizes):
        names = [name for name in WORK if target.table in reads(name, shape, device)]
        found += [(name, shape) for name in names[:CALLS]]
    return found


def with_value(target: Target, value: Any, job: Job) -> Job:
    def prepare() -> None:
        with tiles.using(target.table, target.row, value):
            job.prepare()

    def call() -> None:
        with tiles.using(target.table, target.row, value):
            job.call()

    return Job(prepare, call)


def plain(value: Any) -> Any:
    """As JSON has it."""
    return ["inf" if it == math.inf else it for it in value] if isinstance(value, tuple) else value


def ready(target: Target, jobs: Sequence[Job], found: dict[str, Any], until: float) -> list[Any]:
    """Values whose kernels are compiled: today's, one other, and as many as there is time for."""
    values = []
    failures = Result([], found["failed"])
    for number, value in enumerate([target.value, *tiles.alternatives(target.value)]):
        if number > 1 and monotonic() > until:
            found["untried"].append(plain(value))
            continue
        warm = functools.partial(list, (warm_up(with_value(target, value, job)) for job in jobs))
        if attempt(failures, target.name, tiles.literal(value), warm):
            values.append(value)
    return values


def sweep(target: Target, clock: Clock, sizes: Sizes, seconds: float) -> dict[str, Any]:
    """Measure one target; compiling gets the larger part of the time, and decides how many sizes are tried."""
    start, calls = monotonic(), calls_of(target, sizes, clock.device)
    found: dict[str, Any] = {"table": target.table, "row": target.row, "current": plain(target.value)}
    found |= {"calls": [list(call) for call in calls], "tried": [], "failed": [], "untried": []}
    if not calls:
        return found
    jobs = [make_job(*call, clock.device) for call in calls]
    values = ready(target, jobs, found, start + COMPILING * seconds)
    speeds: dict[Any, list[float]] = {value: [] for value in values}
    for number, (job, (_, shape)) in enumerate(zip(jobs, calls, strict=True)):
        until = monotonic() + (start + seconds - monotonic()) / (len(jobs) - number)
        choices = {value: with_value(target, value, job) for value in values}
        times = time_in_turns(choices, clock, short_calls(math.prod(shape), clock), until)
        for value in values:
            speeds[value].append(round(median(ratios(times[target.value], times[value])), 4))
    found["tried"] = [
        {"value": plain(value), "speed": round(geometric_mean(it), 4), "speeds": it} for value, it in speeds.items()
    ]
    best = max(found["tried"], key=lambda it: it["speed"])
    return found | ({"best": best["value"], "speed": best["speed"]} if best["speed"] >= WORTH else {})


def line(target: Target, found: dict[str, Any]) -> str:
    """What came of a target."""
    if not found["calls"]:
        return f"{target.name}: nothing that is measured here reads it"
    others = [it for it in found["tried"] if it["value"] != found["current"]]
    said = [f"{it['value']} {it['speed']:.2f}" for it in sorted(others, key=lambda it: -it["speed"])]
    said += [f"{it['provider']} failed" for it in found["failed"]]
    said += [f"{len(found['untried'])} not tried"] if found["untried"] else []
    return f"{target.name}: {found['current']} 1.00 | {' | '.join(said)}"


def table_source(name: str, found: Sequence[dict[str, Any]]) -> str:
    """A table with its best rows, to be pasted, and beside those that changed what they gain."""
    current = getattr(tiles.tables(), name)
    entries = [current] if isinstance(current, int) else list(current)
    remarks = [""] * len(entries)
    for it in found:
        if it["table"] == name and "speed" in it:
            place, before, best = it["row"] or 0, entries[it["row"] or 0], it["best"]
            remarks[place] = f"{it['speed']:.2f} times as fast as {tiles.literal(before)}"
            entries[place] = best if it["row"] is None else type(before)(before[0], *best[1:])
    return tiles.source(name, entries[0] if isinstance(current, int) else tuple(entries), remarks)


def run(chosen: Sequence[Target], clock: Clock, sizes: Sizes, path: Path, seconds: float) -> None:
    """Sweep target after target; each gets an equal share of the time that is left."""
    end = monotonic() + seconds
    record = json.loads(path.read_text())
    for number, target in enumerate(chosen):
        left = max(0.0, end - monotonic())
        act = functools.partial(sweep, target, clock, sizes, left / (len(chosen) - number))
        found = attempt(Result([], record["skipped"]), target.name, "ours", act)
        record["rows"] += [found] if found else []
        record["complete"] = number + 1 == len(chosen)
        write_json(path, record)
        print(line(target, found) if found else f"{target.name}: {record['skipped'][-1]['reason']}", flush=True)
        gc.collect()
        clock.release()


def print_best(path: Path) -> None:
    """Print the tables that were swept, as they are to stand in the source."""
    rows = json.loads(path.read_text())["rows"]
    print(f"\nThe best of each, for the table of tile sizes; every ratio is in {path}:\n")
    print(*(table_source(name, rows) for name in dict.fromkeys(row["table"] for row in rows)), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep")
    parser.add_argument("--json", type=Path, help="default: bench/results/sweep-MACHINE.json")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--tables", "--table", nargs="+", choices=tiles.tables()._fields, help="default: all")
    parser.add_argument("--rows", nargs="+", type=float, help="only rows up to so many bytes, or inf; default: all")
    parser.add_argument("--tile", action="append", default=[], metavar="TABLE=...", help=f"begin with {tiles.SYNTAX}")
    parser.add_argument("--dry-run", action="store_true", help="in small, without a GPU")
    options = parser.parse_args(arguments)
    tiles.check(options.tile, parser)
    if options.dry_run and not options.json:
        parser.error("--dry-run wants --json FILE")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here that torch can use: nothing to sweep", file=sys.stderr)
        return 1
    clock = dry_run.make_clock() if options.dry_run else CudaClock()
    path = options.json or RESULTS / f"sweep-{slug(torch.cuda.get_device_name())}.json"
    command = " ".join(["python -m bench.sweep", *(sys.argv[1:] if arguments is None else arguments)])
    with tiles.override(options.tile):
        chosen = targets(options.tables, options.rows)
        if not chosen:
            parser.error(f"none of these tables has rows up to {', '.join(f'{it:g}' for it in options.rows)} bytes")
        write_json(path, header(clock, 0, command, 0) | {"dtype": str(DTYPE)[6:], "rows": [], "skipped": []})
        with contextlib.suppress(KeyboardInterrupt):  # the best so far
            run(chosen, clock, SMALL if options.dry_run else SIZES, path, 60 * options.minutes)
        print_best(path)
    return 0 if json.loads(path.read_text())["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
