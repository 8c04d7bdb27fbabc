"""All that is measured on a GPU: `make bench-gpu`, or python -m bench.gpu. Wants torch and triton, and no network.

Usage: python -m bench.gpu [--json FILE] [--minutes M] [--parts NAME ...] [--tile TABLE=...] [--dry-run]

The most telling parts and cases come first, so that a run that is stopped has them. Each part has a process and a share
of the time (bench.parts), and what it finds is in the JSON file as soon as it is found. `--tile` measures with other
tile sizes (bench.sweep looks for better ones). `--dry-run` does everything in small without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench import dry_run, figures, gpu_tests, linear, parts, plot, tables, tiles
from bench.cases import STEP, Case
from bench.clocks import FLUSH_BYTES, CudaClock, copy_bandwidth
from bench.measure import Result, attempt
from bench.parts import Part, Run, Setting
from bench.record import NO_TIME, RESULTS, header, measure_all, slug, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHAPES = [
    (8192, 32_000),
    (8192, 128_256),
    (8192, 50_257),
    (60_000, 10),
    (256, 10),
    (4096, 1000),
    (16, 19, 512, 1024),
    (8192, 262_144),
]
LOSS = [Case(shape, torch.bfloat16) for shape in SHAPES]
LOSS_FLOAT32 = [Case(shape, torch.float32) for shape in SHAPES]
SOFTMAX = [Case(shape, torch.bfloat16, operation="softmax") for shape in SHAPES[:3]]
CASES = [*LOSS, STEP, *LOSS_FLOAT32, *SOFTMAX]

MINUTES = 7.0  # and a quarter beyond at most: less than eight with the start and the figures
ROUNDS = 5
NO_GPU = "no GPU here that torch can use; python -m bench.cpu measures the CPU"


class Sizes(NamedTuple):
    """What the parts measure."""

    loss: Sequence[Case] = LOSS
    loss_float32: Sequence[Case] = LOSS_FLOAT32
    step: Sequence[Case] = (STEP,)
    softmax: Sequence[Case] = SOFTMAX
    linear: Sequence[tuple[int, int, int, str]] = linear.ON_GPU
    images: int = 60_000
    kernels: Sequence[tuple[tuple[int, ...], str]] | None = None
    """Shapes and kinds as in bench.codegen; None for those whose time it has predicted."""
    tests: Sequence[Sequence[str]] | None = None
    """Commands; None for the tests of a GPU."""
    copy_bytes: int = FLUSH_BYTES


def measure_copy(run: Run, seconds: float) -> None:  # noqa: ARG001
    """What the machine does at best: shares of it are taken of this figure."""
    run.record["copy_gb_per_s"] = round(copy_bandwidth(run.clock, run.sizes.copy_bytes), 1)
    run.save()
    print(f"{run.record['machine']['name']}: copy {run.record['copy_gb_per_s']:,.0f} GB/s", flush=True)


def measure_cases(run: Run, seconds: float, name: str) -> None:
    measure_all(getattr(run.sizes, name), run.clock, run.record, run.path, seconds, latest=seconds)


def run_tests(run: Run, seconds: float) -> None:
    """Run the tests, and fail as they do."""
    found = run.record["tests"] = gpu_tests.run(run.sizes.tests or gpu_tests.commands(), seconds)
    run.save()
    print(tables.tests_sentence(found), *found["failures"][:20], *found["broken"], sep="\n", flush=True)
    if found["failures"] or found["broken"] or not found["counts"]:
        raise RuntimeError(tables.tests_sentence(found))


def in_time(run: Run, cases: Sequence[Any], seconds: float) -> Iterator[tuple[Any, float]]:
    """Cases with their shares of the seconds; save after each, and give the memory back."""
    end = monotonic() + seconds
    for number, case in enumerate(cases):
        left = end - monotonic()
        if left < 0:
            run.record["skipped"].append({"provider": "every provider", "case": str(case), "reason": NO_TIME})
            continue
        yield case, left / (len(cases) - number)
        run.save()
        gc.collect()
        run.clock.release()


def measure_linear(run: Run, seconds: float) -> None:
    for case, share in in_time(run, [linear.Case(*it) for it in run.sizes.linear], seconds):
        result = Result([], run.record["skipped"])
        act = functools.partial(linear.measure, case, run.clock, ROUNDS, result, share)
        attempt(result, case, "every provider", act)
        run.record["linear"] += result.points
        print(case, *(f"{it['provider']} {it['p50_us']:,} us" for it in result.points), sep=" | ", flush=True)


def measure_epoch(run: Run, seconds: float) -> None:
    """The lab's training epoch."""
    from bench import epoch  # the lab: only the part that wants it

    images, device = run.sizes.images, torch.device(run.clock.device)
    sides = epoch.sides(epoch.random_split(images), epoch.random_split(images // 6), device)
    run.record["epoch"] = epoch.measure(sides, run.clock, 2 * ROUNDS, seconds)
    print(*(f"{row['side']} {row['seconds']:.3f} s" for row in run.record["epoch"]), sep=" | ", flush=True)
    run.save()


def measure_kernels(run: Run, seconds: float) -> None:
    """Every kernel's time beside the one that its machine code has been given."""
    from bench import codegen  # the kernels themselves: only the part that wants them

    dtype, known = "bfloat16", predictions("bfloat16")
    telling = {key[1:] for key, record in known.items() if record["predicted_us"] >= tables.PREDICTABLE_US}
    wanted = [codegen.Case(*it) for it in run.sizes.kernels or ()]
    wanted = wanted or [case for case in codegen.CASES if (case.shape, case.kind) in telling]
    copy = 1e3 * run.record["copy_gb_per_s"] or codegen.BYTES_PER_US
    for case, _ in in_time(run, wanted, seconds):
        act = functools.partial(codegen.time_calls, case, dtype, run.clock, ROUNDS)
        for kernel, measured in (attempt(Result([], run.record["skipped"]), case, "ours", act) or {}).items():
            row = {"kernel": kernel, "mode": codegen.mode_of(kernel), "shape": case.shape, "kind": case.kind}
            row |= {"dtype": dtype, "measured_us": measured}
            record = known.get((kernel, case.shape, case.kind))
            run.record["kernels"].append(row | (codegen.predict(record, copy) if record else {}))
            print(kernel, case.shape, case.kind, f"{measured:,.0f} us", sep=" | ", flush=True)


def predictions(dtype: str) -> dict[tuple[str, tuple[int, ...], str], dict[str, Any]]:
    """What bench.codegen has counted for an H100 or H200, by kernel, shape and kind of call."""
    path = RESULTS / "codegen.json"
    return {
        (record["kernel"], tuple(record["shape"]), record["kind"]): record
        for record in (json.loads(path.read_text()) if path.exists() else [])
        if (record["target"], record["dtype"]) == ("sm_90", dtype) and "predicted_us" in record
    }


PARTS = [
    Part("copy", 5, measure_copy),
    Part("loss", 120, functools.partial(measure_cases, name="loss")),
    Part("tests", 80, run_tests),
    Part("step", 20, functools.partial(measure_cases, name="step")),
    Part("linear", 45, measure_linear),
    Part("kernels", 45, measure_kernels),
    Part("softmax", 30, functools.partial(measure_cases, name="softmax")),
    Part("epoch", 20, measure_epoch),
    Part("loss-float32", 70, functools.partial(measure_cases, name="loss_float32")),
]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--json", type=Path, help="default: bench/results/MACHINE.json")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--tile", action="append", default=[], metavar="TABLE=...", help=tiles.SYNTAX)
    parser.add_argument("--dry-run", action="store_true", help="everything in small, without a GPU")
    options = parser.parse_args(arguments)
    if options.json is None and (options.parts or options.tile or options.dry_run):
        parser.error("--parts, --tile and --dry-run want --json FILE: the default is for whole runs")
    tiles.check(options.tile, parser)
    return options


def finish(path: Path) -> None:
    """Print the tables and draw the figures: in docs/images those of bench/results, others beside their file."""
    record = json.loads(path.read_text())
    print(plot.section(path.stem, record), flush=True)
    folder = plot.ROOT / plot.IMAGES if path.parent == RESULTS else path.parent
    try:
        print(*figures.draw_all(folder, path.stem, record), sep="\n")
    except Exception as problem:  # matplotlib is absent, or does not fit: the record is what counts
        print(f"no figures: {problem}; make bench-plot draws them from {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the parts
    elif not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    make_clock = dry_run.make_clock if options.dry_run else CudaClock
    sizes = Sizes(**dry_run.sizes()) if options.dry_run else Sizes()
    path = options.json or RESULTS / f"{slug(torch.cuda.get_device_name())}.json"
    command = " ".join(["python -m bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    record = header(make_clock(flush_bytes=0), 0, command, 0)
    record |= {"parts": {}, "tests": None, "linear": [], "kernels": [], "epoch": [], "points": [], "skipped": []}
    write_json(path, record)
    print(f"writing {path}", flush=True)
    setting = Setting(path, make_clock, sizes, functools.partial(tiles.override, options.tile))
    chosen = [part for part in PARTS if not options.parts or part.name in options.parts]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = parts.run_all(chosen, setting, 60 * options.minutes)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {path}", file=sys.stderr)
        return 130
    write_json(path, json.loads(path.read_text()) | {"complete": not failed})
    finish(path)
    print(f"{path} is complete" if not failed else f"{path} is without {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    from bench.gpu import main  # by its name, under which other processes know the parts

    sys.exit(main())
