"""The kernels compile for the GPUs we name, without one, and their machine code stays within limits.

Everything is compiled once, by bench/codegen.py, and shared by the tests and their processes.
"""

import json
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from filelock import FileLock

from bench.machine_code import Code, Loop, count, inner_loops

ROOT = Path(__file__).parents[1]
OUTPUT = {"sm_80": "cubin", "sm_90": "cubin", "sm_100": "cubin", "gfx942": "hsaco"}
KERNELS = {
    *(f"cross_entropy_{name}" for name in ("forward", "backward", "forward_backward", "weights")),
    "cross_entropy_terms",
    "cross_entropy_from_terms",
    *(f"{name}_{mode}" for name in ("softmax", "row_outputs") for mode in ("forward", "backward")),
}

# What is compiled: targets, dtypes and classes. sm_80 without the longest rows, whose code is as sm_90's and takes half
# of the time; float16 and float64 without those of 32,000: their code differs in the conversions and the exponential.
RUNS = {
    "sm_90": (["sm_90"], ["bfloat16", "float32"], [3, 10, 19, 1000, 32_000, 50_257, 128_256]),
    "sm_80": (["sm_80"], ["bfloat16"], [10, 19, 32_000]),
    "sm_100": (["sm_100"], ["bfloat16"], [10, 19, 32_000, 128_256]),
    "gfx942": (["gfx942"], ["bfloat16"], [10, 19, 32_000, 128_256]),
    "other dtypes": (["sm_90"], ["float16", "float64"], [10, 19, 4096]),
    "several targets": (["sm_80", "sm_90", "gfx942"], ["bfloat16"], [1000]),
}


# What the loads of an SM must have under way for HBM, bandwidth times latency: 18 KB on an H100, 38 KB on a B200.
IN_FLIGHT = 38_000


class Limits(NamedTuple):
    """For class indices without weights, by dtype and mode: instructions and EX2 of an element; bytes of stack."""

    elements: dict[tuple[str, str], tuple[float, float]]
    stack: dict[str, int]


# On sm_90 (stack: on each target), by the Triton that they were measured with, newest first: rounded up then, lowered
# when the kernels get better, never raised. With another Triton what exceeds the newest limits is reported.
NEWEST = Limits(
    {
        ("bfloat16", "forward"): (7.0, 1.04),
        ("bfloat16", "backward"): (6.8, 1.0),
        ("bfloat16", "both"): (14.3, 2.04),
        ("float32", "forward"): (6.0, 1.07),
        ("float32", "backward"): (5.5, 1.0),
        ("float32", "both"): (12.6, 2.07),
    },
    {"sm_100": 16},
)
LIMITS = {
    "3.9": NEWEST,
    "3.8": NEWEST,
    "3.6": NEWEST._replace(
        elements=NEWEST.elements
        | {
            ("bfloat16", "forward"): (7.25, 1.04),
            ("bfloat16", "both"): (14.5, 2.04),
            ("float32", "forward"): (6.5, 1.07),
            ("float32", "both"): (12.75, 2.07),
        },
        stack={"sm_90": 8, "sm_100": 16},
    ),
}
VERSION = ".".join(triton.__version__.split(".")[:2])


def limits() -> Limits:
    return LIMITS.get(VERSION, NEWEST)


def hold(problems: list[str]) -> None:
    """Fail for what exceeds the limits of this Triton, or report what exceeds the newest ones."""
    if VERSION in LIMITS:
        assert not problems, "\n".join(problems)
    elif problems:
        warnings.warn(
            f"no limits are known for Triton {VERSION}; beyond the newest:\n" + "\n".join(problems), stacklevel=2
        )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of the test processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@cache
def compile_run(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run bench/codegen.py as a user would: in a process of its own, without the interpreter; once a session."""
    targets, dtypes, classes = RUNS[name]
    path = folder / f"codegen-{name.replace(' ', '-')}.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            options = ["--targets", *targets, "--dtypes", *dtypes, "--classes", *map(str, classes)]
            command = [sys.executable, str(ROOT / "bench" / "codegen.py"), *options, "--json", str(path)]
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
            if "ROCm linker" in run.stderr:
                pytest.skip("this Triton needs ROCm's linker to compile for AMD GPUs")
            assert run.returncode == 0, run.stderr
            assert len(run.stdout.splitlines()) == len(json.loads(path.read_text()))
    return json.loads(path.read_text())


@pytest.mark.slow  # half a minute to a minute each: the compiler's time
@pytest.mark.parametrize("name", RUNS)
def test_every_kernel_compiles(folder: Path, name: str) -> None:
    records = compile_run(name, folder)
    targets, dtypes, classes = RUNS[name]
    assert {record["target"] for record in records} == set(targets)
    assert {record["dtype"] for record in records} == set(dtypes)
    assert {record["classes"] for record in records} == set(classes)
    assert all(OUTPUT[record["target"]] in record["outputs"] for record in records)
    if 32_000 in classes:
        assert {record["kernel"] for record in records} == KERNELS
    assert [r for r in records if r.get("fused_reductions")] == [], "lanes that should hold the same sum round it apart"
    stack = limits().stack
    hold([f"stack: {record}" for record in records if record.get("stack_bytes", 0) > stack.get(record["target"], 0)])


@pytest.mark.slow  # compiles as above
def test_long_rows_stay_within_limits(folder: Path) -> None:
    records = compile_run("sm_90", folder)
    elements = limits().elements
    loops = [r for r in records if r["kind"] == "indices" and "mode" in r and r["classes"] >= 32_000]
    assert {(r["dtype"], r["classes"], r["mode"]) for r in loops} == {
        (dtype, classes, mode) for dtype, mode in elements for classes in (32_000, 50_257, 128_256)
    }
    problems = []
    for record in loops:
        instructions, ex2 = elements[record["dtype"], record["mode"]]
        assert record["kernel"] == f"cross_entropy_{record['mode'].replace('both', 'forward_backward')}"
        assert record["instructions_per_element"] > 0
        assert record["ex2_per_element"] >= 1
        assert record["predicted_us"] > 0
        within = {
            "instructions": record["instructions_per_element"] <= instructions,
            "EX2": record["ex2_per_element"] <= ex2,
            "bits": record["bulk_access_bits"] == 128,
            "shuffles": record["shuffles_per_element"] == 0,
            "barriers": record["barriers_in_loops"] == 0,
            "bytes in flight": record["in_flight_bytes"] >= IN_FLIGHT,
        }
        problems += [f"{name}: {record}" for name, fine in within.items() if not fine]
    if "sm_90" not in limits().stack:
        problems += [f"local memory: {record}" for record in records if record["local_accesses"]]
    hold(problems)


@pytest.mark.slow  # compiles as above
@pytest.mark.parametrize(("mode", "instructions"), [("forward", 24.5), ("backward", 31.0)])
def test_capped_logits_stay_within_limits(folder: Path, mode: str, instructions: float) -> None:
    records = compile_run("sm_90", folder)
    capped = [r for r in records if r["kernel"] == f"row_outputs_{mode}" and r["kind"] == "loss, softcap"]
    counts = [r["instructions_per_element"] for r in capped if r["classes"] >= 32_000]
    assert counts
    hold([f"softcap, {mode}: {count} instructions an element" for count in counts if count > instructions])


BODY = """
/*0100*/ @!P0 LDG.E.128.CONSTANT R4, desc[UR8][R2.64]
/*0110*/ MUFU.EX2 R5, R4
/*0120*/ SHFL.BFLY PT, R6, R5, 0x1, 0x1f
/*0130*/ STG.E.U16 desc[UR8][R2.64], R6
/*0140*/ @P1 BRA 0x100
/*0150*/ BAR.SYNC.DEFER_BLOCKING 0x0
/*0160*/ @P2 BRA 0xf0
"""


def test_inner_loops_are_found_and_counted() -> None:
    lines = [(int(text[2:6], 16), text[9:]) for text in BODY.strip().splitlines()]
    (loop,) = inner_loops(lines)  # the outer one, to 0xf0, holds it
    assert loop == Loop(5, 1, 1, 0, 128, (128, 16), 1)
    assert loop == count([text for _, text in lines[:5]])
    assert loop.narrowest == 16


def test_elements_pass_the_widest_loop_that_reads_and_the_widest_that_also_writes() -> None:
    reads, narrow = Loop(9, 1, 0, 0, 256, (128, 128), 0), Loop(50, 1, 0, 0, 512, (16,) * 32, 0)
    writes, fills = Loop(9, 1, 0, 0, 128, (128, 128), 1), Loop(3, 0, 0, 0, 0, (128,), 1)
    assert Code(32, 0, 0, [narrow, reads, fills, writes], narrow).element_loops() == [reads, writes]
    assert Code(32, 0, 0, [fills], fills).element_loops() == []
    sums = Loop(40, 0, 0, 0, 256, (128,) * 2, 0)
    assert Code(32, 0, 0, [sums, reads], sums).element_loops() == [reads]
    assert Code(32, 0, 0, [sums], sums).element_loops() == [sums]  # float64 has no EX2
