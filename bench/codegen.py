"""What the compiler makes of the kernels, without a GPU: registers, stack, load widths, instructions, EX2.

Usage: python bench/codegen.py [--targets sm_90 ...] [--dtypes bfloat16 ...] [--classes 32000 ...] [--json FILE]

Calls of the loss and of softmax are made on tensors without memory; their launches are compiled for a GPU that need not
be there, by a driver that only names it. The machine code's inner loops are then counted, and the time that bytes,
issue slots and EX2 allow on an H200 is predicted, the longest of the three. NVIDIA machine code only: for gfx942 it
says that it compiled.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench.machine_code import Loop, fused_reductions, inspect
from bench.record import write_json
from softmax_fused._row_outputs import DIFFERENTIABLE, OUTPUTS
from softmax_fused._spec import RowSpec
from softmax_fused.backends.torch.targets import make_spec
from softmax_fused.backends.triton import cross_entropy, launch, plan, row_outputs, slice_rows, softmax, vocab_parallel
from softmax_fused.backends.triton.tiles import VECTOR_BYTES

if TYPE_CHECKING:
    from bench.clocks import Clock

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bfloat16", "float16", "float32", "float64")

# An H200: a copy measured at 4.3 TB/s; 132 SMs at 1.98 GHz, each issuing to 128 lanes and starting 16 EX2 a cycle.
BYTES_PER_US = 4.3e6
ISSUE_PER_US = 132 * 128 * 1.98e3
EX2_PER_US = 132 * 16 * 1.98e3
PASSES = {"forward": 1, "backward": 2, "both": 2}  # of the logits' bytes through memory
MORE_PASSES = (
    "probabilities",
    "weighted probabilities",
    "softmax",
    "log softmax",
)  # one more: the targets, or the output


class NamedDriver:
    """A Triton driver without a device: it tells the compiler the target, and nothing is ever launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


SLICES = ("slice of classes", "slice of classes, smoothing", "slice of classes, outputs of rows")
ROW_OUTPUTS = (
    "loss, prediction",
    "loss, logsumexp, prediction, entropy",
    "loss, softcap",
    "log_prob, entropy",
    "loss, log_prob, rank",
    "loss, rank, row scales",
)


class Case(NamedTuple):
    """A call of the loss or of softmax."""

    shape: tuple[int, ...]
    kind: str = "indices"
    """Or "probabilities", "weighted probabilities", "weights and smoothing" (of indices); "softmax", "log softmax";
    outputs of rows; slices."""
    reduction: str = "mean"


CASES = [
    Case((256, 10)),
    Case((60_000, 10)),
    Case((4096, 100)),
    Case((4096, 1000)),
    Case((8192, 4096)),
    Case((8192, 16_384)),
    Case((8192, 32_000)),
    Case((8192, 50_257)),
    Case((8192, 128_256)),
    Case((4, 128_256)),
    Case((16, 19, 512, 1024)),
    Case((2, 5, 6, 7, 3)),
    Case((8192, 32_000), "probabilities", "none"),
    Case((8192, 32_000), "weights and smoothing"),
    Case((60_000, 10), "weights and smoothing"),
    Case((33, 1000), "weights and smoothing"),
    Case((5, 3), "weighted probabilities", "none"),  # a row of these lies across lanes
    Case((5, 3), "softmax"),
    *(Case((8192, classes), kind) for kind in ("softmax", "log softmax") for classes in (4096, 32_000, 128_256)),
    *(Case(shape, "softmax") for shape in ((60_000, 10), (4096, 100), (16, 19, 512, 1024))),
    *(Case((8192, 32_000), kind) for kind in ROW_OUTPUTS),
    *(Case((60_000, 10), kind) for kind in ("loss, prediction", "loss, rank, row scales")),
    *(Case(shape, kind) for shape in ((60_000, 10), (8192, 32_000)) for kind in SLICES),
]


def make_calls(case: Case, dtype: torch.dtype, device: str = "meta") -> None:
    """Do what forward, backward and grad_in_forward do; on the device "meta" tensors have no memory."""
    logits = torch.randn(case.shape, dtype=dtype, device=device)
    if "softmax" in case.kind:
        out = softmax.forward(logits, 1, dtype, case.kind == "log softmax")
        softmax.backward(logits, out, 1, dtype, case.kind == "log softmax")
        return
    if case.kind in ROW_OUTPUTS:
        make_row_calls(case, logits, dtype)
        return
    if case.kind == SLICES[2]:
        make_row_slice_calls(logits, dtype)
        return
    if case.kind in SLICES:
        make_slice_calls(case, logits, dtype)
        return
    indices = not case.kind.endswith("probabilities")
    target = class_indices(logits) if indices else torch.rand_like(logits)
    weight = torch.rand(case.shape[1:2], dtype=dtype, device=device) if "weight" in case.kind else None
    smoothing = 0.1 if case.kind == "weights and smoothing" else 0.0
    spec = make_spec(logits, target, case.reduction, -100, smoothing, dtype)
    loss, saved = cross_entropy.loss(logits, target, weight, spec, save=True)
    cross_entropy.gradient(loss, logits, target, weight, saved, spec)
    cross_entropy.loss_and_gradient(logits, target, weight, spec)


def class_indices(logits: Tensor) -> Tensor:
    return torch.randint(logits.shape[1], logits.shape[:1] + logits.shape[2:], device=logits.device)


def make_row_calls(case: Case, logits: Tensor, dtype: torch.dtype) -> None:
    """Do what the outputs of rows do forward and backward."""
    words = case.kind.split(", ")
    outputs = tuple(word for word in words if word in OUTPUTS)
    softcap = 30.0 if "softcap" in words else None
    target = class_indices(logits)
    spec = make_spec(logits, target, "none", -100, 0.0, dtype)
    row_scale = torch.rand(target.shape, device=logits.device) if "row scales" in words else None
    options = RowSpec(spec, 1.0, softcap, outputs)
    out, stats = row_outputs.forward(logits, target, None, options, save=True, row_scale=row_scale)
    upstream = tuple(getattr(out, name) for name in DIFFERENTIABLE)
    row_outputs.gradient(upstream, logits, target, None, stats, options, row_scale)


def make_slice_calls(case: Case, logits: Tensor, dtype: torch.dtype) -> None:
    """Do what a rank does with its eighth of the classes."""
    target = class_indices(logits)
    spec = make_spec(logits, target, "none", -100, 0.1 if case.kind == SLICES[1] else 0.0, dtype)
    spec = spec._replace(classes=8 * case.shape[1], first=3 * case.shape[1])
    parts = vocab_parallel.statistics(logits, target, None, spec)
    sums = vocab_parallel.terms(parts, parts[0], logits, target, None, spec)
    loss, saved = vocab_parallel.finalize(sums, parts[0], logits, target, None, spec)
    vocab_parallel.gradient(loss, logits, target, None, saved, spec, logits)


def make_row_slice_calls(logits: Tensor, dtype: torch.dtype) -> None:
    """Do what a rank does with its eighth of the classes for outputs of rows."""
    target = class_indices(logits)
    spec = make_spec(logits, target, "none", -100, 0.1, dtype)
    spec = spec._replace(classes=8 * logits.shape[1], first=3 * logits.shape[1])
    options = RowSpec(spec, 1.0, None, ("loss", "prediction", "entropy"))
    local = slice_rows.statistics(logits, target, None, options)
    upstream = (local.m, None, local.m, None)
    slice_rows.gradient(upstream, logits, target, None, local.numbers[:5], options, logits)


def name_of(kernel: Any, arguments: dict[str, Any]) -> str:
    """Return a kernel's name; the loss's forward kernel that also writes the gradient has one of its own."""
    name: str = kernel.fn.__name__
    with_gradient = name == "cross_entropy_forward" and arguments["tensors"].out.ptr is not None
    return f"{name}_backward" if with_gradient else name


def mode_of(name: str) -> str | None:
    """Return what a kernel does with the logits, None where it does not go over them."""
    if name.endswith("_forward_backward"):
        return "both"
    return next((mode for mode in ("forward", "backward") if name.endswith(mode)), None)


def elements_of(loop: Loop, case: Case, arguments: dict[str, Any], warps: int) -> float:
    """Return how many logits a thread takes in a turn: of a long row as many as it loads in whole vectors."""
    if arguments["VECTOR"] and not arguments["WHOLE"]:
        tensors = 2 if case.kind in MORE_PASSES and arguments["KIND"] not in ("softmax", "log") else 1
        vectors = loop.widths.count(128) - loop.stores
        if vectors > 0:
            return vectors / tensors * arguments["VECTOR"]
    classes = arguments["CLASSES"]
    block = classes * (1 if arguments["VECTOR"] else arguments["LANES"]) / (32 * warps)
    return block * case.shape[1] / (math.ceil(case.shape[1] / classes) * classes)  # the rest is padding


def describe(
    case: Case, dtype: str, kernel: str, compiled: Any, arguments: dict[str, Any], warps: int
) -> dict[str, Any]:
    """Count one kernel's machine code."""
    code = inspect(compiled.asm["cubin"])
    record: dict[str, Any] = {
        "registers": code.registers,
        "stack_bytes": code.stack,
        "local_accesses": code.local_accesses,
        "fused_reductions": fused_reductions(compiled.asm["ptx"]),
    }
    mode = mode_of(kernel)
    if mode is None:
        return record
    # a row that stays in registers goes through no loop: the whole kernel counts, with what a row costs once
    loops = [code.straight] if arguments["WHOLE"] else code.element_loops()
    record |= {
        "mode": mode,
        "whole": arguments["WHOLE"],
        "bulk_access_bits": min((bits for loop in loops for bits in loop.widths), default=None),
        "barriers_in_loops": 0 if arguments["WHOLE"] else sum(loop.barriers for loop in loops),
    }
    for name in ("instructions", "ex2", "shuffles"):
        record[f"{name}_per_element"] = round(
            sum(getattr(loop, name) / elements_of(loop, case, arguments, warps) for loop in loops), 3
        )
    vectors = arguments["CLASSES"] // max(1, arguments["VECTOR"] * arguments["LANES"])
    record["in_flight_bytes"] = bytes_in_flight(code.registers, warps, vectors) if arguments["VECTOR"] else None
    if dtype != "float64":  # its arithmetic has units of its own, half as many or fewer
        record |= predict(record | {"shape": case.shape, "kind": case.kind, "dtype": dtype}, BYTES_PER_US)
    return record


def bytes_in_flight(registers: int, warps: int, vectors: int) -> int:
    """Return the bytes of loads that an SM of sm_90 has under way: 64 K registers, 64 warps, 32 programs."""
    allocated = -(-registers // 8) * 8 * 32 * warps
    programs = min(65536 // allocated, 64 // warps, 32)
    return programs * warps * 32 * vectors * VECTOR_BYTES


def predict(record: dict[str, Any], bytes_per_us: float) -> dict[str, Any]:
    """The time of a kernel on a GPU that copies so fast, the longest of three, and which it is."""
    logits, itemsize = math.prod(record["shape"]), getattr(torch, record["dtype"]).itemsize
    microseconds = {
        "bytes": (PASSES[record["mode"]] + (record["kind"] in MORE_PASSES)) * itemsize * logits / bytes_per_us,
        "issue": record["instructions_per_element"] * logits / ISSUE_PER_US,
        "EX2": record["ex2_per_element"] * logits / EX2_PER_US,
    }
    bound = max(microseconds, key=lambda limit: microseconds[limit])
    return {"predicted_us": round(microseconds[bound], 2), "bound": bound}


def time_calls(case: Case, dtype: str, clock: Clock, rounds: int) -> dict[str, float]:
    """Median microseconds of each kernel that goes over the logits; the first round compiles."""
    found: dict[str, list[float]] = {}
    real = launch.launch

    def timed(kernel: Any, programs: int, warps: int, *args: Any) -> None:
        name = name_of(kernel, dict(zip(kernel.arg_names, args, strict=True)))
        if mode_of(name) is None:
            real(kernel, programs, warps, *args)
            return
        clock.flush()
        found.setdefault(name, []).append(clock.microseconds(lambda: real(kernel, programs, warps, *args)))

    with mock.patch.object(launch, "launch", timed), mock.patch.object(plan, "DIRECT", False):
        make_calls(case, getattr(torch, dtype), clock.device)
        found.clear()
        for _ in range(rounds):
            make_calls(case, getattr(torch, dtype), clock.device)
    return {name: round(median(times), 2) for name, times in found.items()}


def compile_calls(target: str, dtype: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Compile every launch of every call, in a process of its own."""
    records: list[dict[str, Any]] = []
    triton.runtime.driver.set_active(NamedDriver(TARGETS[target]))
    for case in cases:
        launch.launch = partial(compile_only, records, case, target, dtype)
        make_calls(case, getattr(torch, dtype))
    return records


def compile_only(
    records: list[dict[str, Any]],
    case: Case,
    target: str,
    dtype: str,
    kernel: Any,
    programs: int,
    warps: int,
    *args: Any,
) -> None:
    """Stand in for a launch."""
    compiled = kernel.warmup(*args, grid=(programs,), num_warps=warps, **launch.OPTIONS)
    arguments = dict(zip(kernel.arg_names, args, strict=True))
    name = name_of(kernel, arguments)
    record: dict[str, Any] = {"kernel": name, "target": target, "dtype": dtype, "classes": case.shape[1]}
    record |= {"shape": case.shape, "kind": case.kind, "programs": programs, "warps": warps}
    if "cubin" in compiled.asm:
        record |= describe(case, dtype, name, compiled, arguments, warps)
    records.append(record | {"outputs": sorted(compiled.asm)})


def line(record: dict[str, Any]) -> str:
    """One kernel in one line."""
    head = f"{record['target']:6} {record['dtype']:8} {record['shape']!s:20} {record['kernel']:28}"
    if "registers" not in record:
        return f"{head} compiled"
    counts = (
        f"{record['registers']:3} reg {record['stack_bytes']:3} stack"
        if "mode" not in record
        else f"{record['registers']:3} reg {record['stack_bytes']:3} stack  {record['instructions_per_element']:6.2f} "
        f"instr {record['ex2_per_element']:5.2f} EX2 an element, {record['bulk_access_bits']} bits"
    )
    time = f"  {record['predicted_us']:10,.1f} us ({record['bound']})" if "predicted_us" in record else ""
    kind = "" if record["kind"] == "indices" else f"  {record['kind']}"
    return f"{head} {counts}{time}{kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--classes", nargs="+", type=int, help="only calls with so many classes")
    parser.add_argument("--json", type=Path, help="write the records here, as a list")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.classes or case.shape[1] in options.classes]
    context = multiprocessing.get_context("spawn")
    records: list[dict[str, Any]] = []
    # a process compiles for one target: Triton keeps what it has compiled by device, and all go by the same number
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        runs = [
            pool.apply_async(compile_calls, (target, dtype, cases))
            for target in options.targets
            for dtype in options.dtypes
        ]
        for run in runs:
            found = run.get()
            records += found
            print(*map(line, found), sep="\n", flush=True)
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    main()
