"""The vocabulary-parallel loss by number of ranks: python -m bench.distributed [--json FILE] [--rounds R].

Measured on gloo ranks of one thread each on this machine: collectives and bytes of a step, and the time of loss and
gradient where every rank holds as many classes as the only one of a world of one (weak scaling). On paper: what a step
takes on 8 to 1024 GPUs, by the formula beside the table. The tables in docs/performance.md are what `measured` and
`on_paper` make.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.clocks import CpuClock
from bench.record import RESULTS, header, write_json
from bench.tables import markdown
from softmax_fused import distributed
from softmax_fused.distributed.exchange import ALL_GATHER

WORLDS = (1, 2, 4)
ROWS, CLASSES = 512, 16_384  # of a rank
MINUTES = 5

MODEL = {
    "rows": 8192,
    "classes": 128_256,
    "bytes_a_logit": 2,
    "passes": 3,
    "memory_bytes_per_us": 4.3e6,
    "alpha_us": 5.0,
    "network_bytes_per_us": {"8": 450e3, "more": 50e3},
}
FORMULA = (
    "t(P) = 3 N C s / (P M) + 2 (2 log2(P) a) + 2 (P - 1)/P * 3 N 4 / B; M = 4.3 TB/s of memory, a = 5 us a hop, "
    "B = 450 GB/s up to 8 ranks and 50 GB/s beyond; N = 8192, C = 128256, s = 2; an all-gather of the logits instead "
    "takes (P - 1)/P * N C s / B"
)


@contextlib.contextmanager
def counted(calls: list[int]) -> Iterator[None]:
    """Note the bytes that every collective of the loss is given."""
    with contextlib.ExitStack() as stack:
        for name, place in (("all_reduce", 0), (ALL_GATHER, 1)):
            real = getattr(dist, name)

            def call(*args: Any, _real: Any = real, _place: int = place, **options: Any) -> Any:
                calls.append(args[_place].nbytes)
                return _real(*args, **options)

            stack.enter_context(mock.patch.object(dist, name, call))
        yield


def step(local: torch.Tensor, target: torch.Tensor, sizes: list[int] | None) -> None:
    distributed.cross_entropy(local, target, sizes=sizes).backward()
    local.grad = None


def rank_work(rank: int, world: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=MINUTES)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    torch.manual_seed(0)
    target = torch.randint(0, world * CLASSES, (ROWS,))
    local = torch.randn(ROWS, CLASSES).requires_grad_()
    found = {}
    for name, sizes in (("sizes given", [CLASSES] * world), ("sizes exchanged", None)):
        calls: list[int] = []
        with counted(calls):
            step(local, target, sizes)
        times = []
        for _ in range(rounds):
            dist.barrier()
            start = perf_counter()
            step(local, target, sizes)
            slowest = torch.tensor(perf_counter() - start)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times.append(1e6 * slowest.item())
        found[name] = {"collectives": len(calls), "bytes": sum(calls), "p50_us": round(median(times))}
    if rank == 0:
        write_json(Path(folder) / "found.json", found)
    dist.destroy_process_group()


def measure(world: int, rounds: int) -> list[dict[str, Any]]:
    """Start the ranks, and return a row for sizes given and exchanged."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_work, (world, folder, rounds), nprocs=world, start_method="spawn")
        found = json.loads((Path(folder) / "found.json").read_text())
    return [{"world": world, "call": name, "rounds": rounds, **values} for name, values in found.items()]


def model() -> list[dict[str, Any]]:
    """What a step takes by the formula, in microseconds."""
    logits = MODEL["rows"] * MODEL["classes"] * MODEL["bytes_a_logit"]
    rows = []
    for world in (2**power for power in range(3, 11)):
        network = MODEL["network_bytes_per_us"]["8" if world <= 8 else "more"]
        parts = {
            "compute_us": MODEL["passes"] * logits / world / MODEL["memory_bytes_per_us"],
            "latency_us": 2 * 2 * math.log2(world) * MODEL["alpha_us"],
            "transfer_us": 2 * (world - 1) / world * 3 * 4 * MODEL["rows"] / network,
            "gather_us": (world - 1) / world * logits / network,
        }
        rows.append({"world": world} | {name: round(value, 1) for name, value in parts.items()})
    return rows


def measured(record: dict[str, Any]) -> str:
    """Markdown: a row for each world and way to call."""
    alone = {row["call"]: row["p50_us"] for row in record["rows"] if row["world"] == 1}
    lines = [
        [
            str(row["world"]),
            row["call"],
            str(row["collectives"]),
            f"{row['bytes']:,}",
            f"{row['p50_us'] / 1e3:.1f} ms",
            f"{row['p50_us'] / alone[row['call']]:.2f}",
        ]
        for row in record["rows"]
    ]
    return markdown(["ranks", "call", "collectives a step", "bytes a rank gives", "time", "time to one rank's"], lines)


def on_paper(record: dict[str, Any]) -> str:
    """Markdown: the model's terms by world."""
    lines = [
        [str(row["world"])]
        + [f"{row[name]:,.0f} us" for name in ("compute_us", "latency_us", "transfer_us")]
        + [f"{row['compute_us'] + row['latency_us'] + row['transfer_us']:,.0f} us", f"{row['gather_us']:,.0f} us"]
        for row in record["model"]
    ]
    return markdown(["ranks", "logits through memory", "latency", "transfer", "a step", "gathering the logits"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed")
    parser.add_argument("--json", type=Path, default=RESULTS / "distributed-cpu.json")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    record = header(CpuClock(), 0, " ".join(["python -m bench.distributed", *sys.argv[1:]]), 0)
    del record["copy_gb_per_s"]
    record["machine"] |= {"threads": 1, "cores": os.cpu_count()}
    record |= {"rows": [], "formula": FORMULA, "model": model()}
    for world in WORLDS:
        record["rows"] += measure(world, options.rounds)
        record["complete"] = world == WORLDS[-1]
        write_json(options.json, record)
    shape = f"{ROWS} rows, {CLASSES} classes of float32 a rank"
    print(f"Measured, {shape}, {os.cpu_count()} cores:\n\n{measured(record)}\n")
    print(f"On paper, nothing measured: {FORMULA}\n\n{on_paper(record)}")


if __name__ == "__main__":
    main()
