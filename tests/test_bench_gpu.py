"""What is measured on a GPU, and the sweep of tile sizes, run here in small without one; never how fast anything is."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from bench import codegen, dry_run, figures, gpu, gpu_tests, linear, measure, parts, plot, sweep, tiles
from bench.memory import ROOT
from bench.parts import Part, Run, Setting
from bench.record import measure_all, write_json
from tests.test_backend import needs_interpreter
from tests.test_bench import write_empty_documents

RIVALS = {
    "liger_kernel.transformers.functional": {
        "liger_cross_entropy": F.cross_entropy,
        "liger_softmax": lambda logits: F.softmax(logits, -1),
        "liger_fused_linear_cross_entropy": linear.one_after_the_other,
    },
    "quack.cross_entropy": {"cross_entropy": F.cross_entropy},
    "quack.softmax": {"softmax": lambda logits: F.softmax(logits, -1)},
    "flash_attn.ops.triton.cross_entropy": {
        "cross_entropy_loss": lambda logits, target: (F.cross_entropy(logits, target, reduction="none"), None)
    },
}


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch under the names of the others."""
    for name, functions in RIVALS.items():
        above = [name.rsplit(".", number)[0] for number in range(1, name.count(".") + 1)]
        for package in above:
            module = ModuleType(package)
            module.__spec__ = ModuleSpec(package, None)
            monkeypatch.setitem(sys.modules, package, module)
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def signals() -> Iterator[None]:
    """Undo what a command does to SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each case once, and compile nothing."""
    for module, name, value in [
        (measure, "LEAST_ROUNDS", 1),
        (measure, "MOST_ROUNDS", 1),
        (measure, "COMPILE_SECONDS", -math.inf),
        (linear, "COMPILE_SECONDS", -math.inf),
        (torch, "compile", lambda function, dynamic: function),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the parts in this process."""
    monkeypatch.setattr(parts, "supervise", lambda part, setting, seconds, limit: parts.work(part, setting, seconds))


@pytest.mark.usefixtures("interpreted", "rivals", "signals", "hasty", "here")
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(figures, "draw", lambda path, *_: write_json(path, "a picture"))
    counted = {"kernel": "softmax_forward", "target": "sm_90", "dtype": "bfloat16", "shape": [2, 300]}
    counted |= {"kind": "softmax", "mode": "forward", "instructions_per_element": 9.0, "ex2_per_element": 1.0}
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    write_json(gpu.RESULTS / "codegen.json", [counted | {"predicted_us": 60.0, "bound": "bytes"}])
    path = tmp_path / "results" / "gpu.json"
    assert gpu.main(["--dry-run", "--json", str(path), "--minutes", "1", "--tile", "target_programs=16"]) == 0
    record = json.loads(path.read_text())
    assert record["complete"], record["parts"]
    assert {name: part["error"] for name, part in record["parts"].items()} == {part.name: None for part in gpu.PARTS}
    assert record["tests"]["counts"] == {"passed": 3, "skipped": 2}
    assert {row["provider"] for row in record["linear"]} == {*linear.PROVIDERS, *linear.RIVALS}
    on_gpus = set(measure.PROVIDERS) - {"ours, backend torch"}
    assert {point["provider"] for point in record["points"]} == on_gpus
    steps = [point for point in record["points"] if point["mode"] == "step"]
    assert all(point["host_us"] and point["loop_us"] for point in steps)
    assert {(row["kind"], row["mode"]) for row in record["kernels"]} == {
        *(("indices", mode) for mode in ("forward", "backward", "both")),
        *((kind, mode) for kind in ("softmax", "loss, prediction") for mode in ("forward", "backward")),
    }
    assert [row["predicted_us"] for row in record["kernels"] if "bound" in row] == [2.4]  # 2,400 bytes at 1 GB/s
    assert {row["side"] for row in record["epoch"]} == {"bare loop", "lab, torch", "lab, fused", "test set"}
    assert "gpu is complete" in capsys.readouterr().out.replace(str(path), "gpu")

    write_empty_documents(tmp_path)
    (path.parent / "codegen.json").unlink()
    plot.write(path.parent, tmp_path)
    text = (tmp_path / "docs/performance.md").read_text()
    assert [title for title in plot.TITLES.values() if title not in text] == []
    assert plot.check(path.parent, tmp_path) == []


def test_the_kernels_to_be_timed_have_been_predicted() -> None:
    known = gpu.predictions("bfloat16")
    assert {"forward", "backward"} <= {record["mode"] for record in known.values()}
    cases = {(case.shape, case.kind) for case in codegen.CASES}
    assert {key[1:] for key in known} <= cases
    assert {(case.shape, "indices") for case in gpu.LOSS[:3]} <= cases


@needs_interpreter
@pytest.mark.slow  # a minute: processes that import torch, kernels in Triton's interpreter, a compiler
def test_dry_run_as_a_command_that_is_stopped(tmp_path: Path) -> None:
    options = f"--dry-run --json {tmp_path / 'all.json'} --parts copy tests linear kernels epoch"
    command = ["make", "bench-gpu", f"PYTHON={sys.executable}", f"ARGS={options}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "all.json").read_text())["complete"]
    path = tmp_path / "some.json"
    arguments = [sys.executable, "-m", "bench.gpu", "--dry-run", "--json", str(path), "--parts", "copy", "loss"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        for text in running.stdout:
            if text.startswith("--- loss"):
                time.sleep(1)
                os.killpg(running.pid, signal.SIGINT)
    assert running.returncode == 130
    record = json.loads(path.read_text())
    assert (record["copy_gb_per_s"], record["complete"]) == (1.0, False)


def succeed(run: Run, seconds: float) -> None:
    run.record["points"].append(run.sizes)
    run.save()


def fail(run: Run, seconds: float) -> None:
    succeed(run, seconds)
    raise torch.OutOfMemoryError("tried to allocate")


def hang(run: Run, seconds: float) -> None:
    succeed(run, seconds)
    while True:
        time.sleep(0.1)


def crash(run: Run, seconds: float) -> None:
    succeed(run, seconds)
    os._exit(7)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    path = tmp_path / "record.json"
    write_json(path, {"parts": {}, "points": []})
    return Setting(path, dry_run.make_clock, "measured")


# elsewhere processes are forked off one that has done no more than import
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_part_that_fails_ends_no_other(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "START", "fork")
    real = parts.supervise
    limits = {"third": 3}  # seconds; the others end by themselves, however busy the machine
    monkeypatch.setattr(
        parts, "supervise", lambda part, setting, *_: real(part, setting, 0.1, limits.get(part.name, 60))
    )
    acts = [("first", fail), ("second", crash), ("third", hang), ("fourth", succeed)]
    assert parts.run_all([Part(name, 1, act) for name, act in acts], setting, 600) == ["first", "second", "third"]
    record = json.loads(setting.path.read_text())
    assert record["points"] == ["measured"] * 4
    assert {name: part["error"] for name, part in record["parts"].items()} == {
        "first": "OutOfMemoryError: tried to allocate",
        "second": "ended with exit code 7",
        "third": "stopped after 3 s",
        "fourth": None,
    }


def test_parts_share_the_time_by_weight(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {}

    def note(part: Part, setting: Setting, seconds: float, limit: float) -> None:
        shares[part.name] = seconds, limit
        parts.note(setting.path, part.name, 0, None)

    monkeypatch.setattr(parts, "supervise", note)
    assert parts.run_all([Part("a", 1, succeed), Part("b", 3, succeed)], setting, 80) == []
    assert shares["a"] == (pytest.approx(20, abs=1), pytest.approx(35, abs=1))
    assert shares["b"] == (pytest.approx(80, abs=1), pytest.approx(80 + parts.LATE_SECONDS, abs=1))
    assert parts.run_all([Part("c", 1, succeed)], setting, 1) == ["c"]
    assert json.loads(setting.path.read_text())["parts"]["c"]["error"] == "no time was left"


def test_cases_without_time_are_left_out_and_named(setting: Setting) -> None:
    run = Run(setting.path, dry_run.make_clock(), gpu.Sizes(loss=[dry_run.SMALL] * 2))
    run.record |= {"copy_gb_per_s": 0.0, "skipped": []}
    assert list(gpu.in_time(run, ["first", "second"], -1.0)) == []
    measure_all(run.sizes.loss, run.clock, run.record, run.path, 0, latest=-1.0)
    assert {skip["reason"] for skip in run.record["skipped"]} == {"no time was left"}
    assert [skip["case"] for skip in run.record["skipped"]] == ["first", "second", "4x6-bfloat16", "4x6-bfloat16"]


@pytest.mark.usefixtures("signals")
def test_what_was_measured_stays_when_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command sets it

    def stopped(part: Part, setting: Setting, *_: float) -> None:
        if part.name == "tests":
            raise KeyboardInterrupt
        parts.work(part, setting, 0)

    monkeypatch.setattr(parts, "supervise", stopped)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--json", str(path), "--parts", "copy", "tests"]) == 130
    assert f"stopped; what was measured is in {path}" in capsys.readouterr().err
    record = json.loads(path.read_text())
    assert record["copy_gb_per_s"] > 0
    assert not record["complete"]


def test_figures_are_left_out_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    point = {"provider": "ours", "mode": "both", "dtype": "float32", "shape": [8, 10], "p50_us": 2.0}
    record = {"machine": {"device": "cuda", "name": "No GPU"}, "versions": {}, "date": "", "command": "", "skipped": []}
    write_json(tmp_path / "gpu.json", record | {"copy_gb_per_s": 1.0, "complete": True, "points": [point]})
    gpu.finish(tmp_path / "gpu.json")
    assert "make bench-plot draws them from" in capsys.readouterr().out


@pytest.mark.parametrize("module", [gpu, sweep])
def test_no_gpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main([]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("no GPU here that torch can use")
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "want --json FILE"),
        (["--parts", "copy"], "want --json FILE"),
        (["--json", "x", "--tile", "one_pass=1:1"], "a row of one_pass is row_bytes:warps:vectors"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_the_stand_in_has_the_names_of_torch() -> None:
    for real, fake in ((torch.cuda, dry_run.FakeCuda), (torch.cuda.Event, dry_run.FakeCuda.Event)):
        assert [name for name in vars(fake) if not name.startswith("_") and not hasattr(real, name)] == []


def test_a_time_is_taken_between_events_that_are_over() -> None:
    start, end = dry_run.FakeCuda.Event(enable_timing=True), dry_run.FakeCuda.Event(enable_timing=True)
    start.record()
    end.record()
    with pytest.raises(RuntimeError, match="over"):
        start.elapsed_time(end)
    assert dry_run.make_clock().microseconds(lambda: None) == 2000


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_counts_of_several_processes_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    failing = script("print('FAILED tests/test_a.py::test_b - assert 1 == 2\\n1 failed, 2 passed in 0.1s')")
    passing = script("print('3 passed, 1 error, 7 deselected in 0.1s')")
    hanging = script(
        f"import pathlib, time\ntry:\n pathlib.Path({str(begun)!r}).touch()\n time.sleep(600)\n"
        "except KeyboardInterrupt: print('5 passed in 1.0s')"
    )
    waited: list[Any] = []

    def ended(process: Any, _: float) -> bool:
        """Wait for a process to end, or the first time for the one that hangs to have begun: no time is measured."""
        if process.args == hanging and not waited:
            waited.append(process)
            while not begun.exists():
                time.sleep(0.01)
            return False
        return process.wait(60) is not None

    monkeypatch.setattr(gpu_tests, "ended", ended)
    found = gpu_tests.run([failing, passing, hanging, script("raise ImportError('no torch')")], 600)
    assert found["counts"] == {"failed": 1, "passed": 10, "error": 1}
    assert found["failures"] == ["tests/test_a.py::test_b - assert 1 == 2"]
    assert found["interrupted"] == 1
    assert found["broken"][0].endswith("ImportError: no torch")


def test_processes_without_a_test_are_no_failure() -> None:
    found = gpu_tests.run([script("print('12 deselected in 0.1s')")], 30)
    assert (found["counts"], found["broken"]) == ({}, [])


def test_tests_of_a_gpu_are_dealt_out_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    files = {str(path) for path in (ROOT / "tests").glob("test_*.py")}
    left_out = [{it.removeprefix("--ignore=") for it in command} for command in gpu_tests.commands()]
    shares = [files - names for names in left_out]
    assert len(shares) == 3
    assert sum(map(len, shares)) == len(set.union(*shares))
    assert {"test_loss.py", "test_launch.py", "test_softmax.py"} <= {Path(name).name for name in set.union(*shares)}


class Row(NamedTuple):
    """A row of a table that there is not yet."""

    row_bytes: float
    warps: int
    stages: int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one_pass", "a tile table is given as TABLE=NUMBER"),
        ("passes=1", "no tile table is called 'passes'; there are one_pass, "),
        ("one_pass=4096:1", "a row of one_pass is row_bytes:warps:vectors, as in 4096:1:2; got '4096:1'"),
        ("one_pass=4096:1:1", "must ascend up to inf"),
        ("one_pass=8192:1:1,4096:1:1,inf:1:1", "must ascend up to inf"),
        ("one_pass=inf:3:1", "warps of one_pass takes powers of 2 up to 32; got '3'"),
        ("one_pass=inf:64:1", "warps of one_pass takes powers of 2 up to 32; got '64'"),
        ("one_pass=inf:1:x", "vectors of one_pass takes whole numbers from 1 on; got 'x'"),
        ("target_programs=0", "target_programs takes whole numbers from 1 on; got '0'"),
    ],
)
def test_bad_tables(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiles.parse(text)


def test_tables_from_the_command_line_hold_within_the_block() -> None:
    before = tiles.tables()
    with tiles.override(["one_pass=4096:1:1,inf:8:2", "target_programs=64"]):
        assert tiles.tables().one_pass == ((4096, 1, 1), (math.inf, 8, 2))
        assert tiles.tables().target_programs == 64
        with tiles.using("one_pass", 1, type(before.one_pass[0])(math.inf, 2, 4)):
            assert tiles.tables().one_pass == ((4096, 1, 1), (math.inf, 2, 4))
    assert tiles.tables() is before


def test_alternatives_come_nearest_first() -> None:
    assert tiles.alternatives(8) == [4, 16, 2, 32]
    assert tiles.alternatives(1) == [2, 4]
    rows = tiles.alternatives(Row(math.inf, 16, 2))
    assert set(rows[:4]) == {(math.inf, 16, 4), (math.inf, 16, 1), (math.inf, 32, 2), (math.inf, 8, 2)}
    assert all(row.warps <= 32 and row.stages >= 1 and row[1:] != (16, 2) for row in rows)


def test_a_table_is_printed_as_it_stands_in_the_source() -> None:
    text = tiles.source("both", (Row(8, 1, 1), Row(math.inf, 2, 1)), ["", "better"])
    assert text.splitlines() == [
        "    both: tuple[Row, ...] = (",
        "        Row(8, 1, 1),",
        "        Row(math.inf, 2, 1),  # better",
        "    )",
    ]
    assert tiles.source("block", 8, ["better"]) == "    block: int = 8  # better"


@pytest.mark.usefixtures("interpreted", "hasty")
def test_dry_run_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.reads.cache_clear()
    path = tmp_path / "sweep.json"
    arguments = ["--tables", "one_pass", "two_pass", "row_block", "--rows", "4096"]
    assert sweep.main(["--dry-run", "--json", str(path), "--minutes", "0", *arguments]) == 0
    record = json.loads(path.read_text())
    assert record["complete"]
    assert not record["skipped"]
    assert [(row["table"], row["row"], [name for name, _ in row["calls"]]) for row in record["rows"]] == [
        ("one_pass", 0, ["loss", "gradient"]),
        ("two_pass", 0, ["loss and gradient", "softmax"]),
    ]
    assert all(len(row["tried"]) == 2 and row["tried"][1]["speed"] == 1 for row in record["rows"])
    said = capsys.readouterr().out
    assert "one_pass, rows up to 4,096 bytes: [4096, 1, 2] 1.00 | [4096, 1, 4] 1.00 | 6 not tried" in said
    assert "    one_pass: tuple[LongTile, ...] = (\n        LongTile(4096, 1, 2),\n" in said


@pytest.mark.usefixtures("interpreted")
def test_the_best_row_is_printed_and_one_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def times(jobs: dict[Any, Any], *_: object) -> dict[Any, list[float]]:
        return {value: [8.0 / value[1]] * 3 for value in jobs}  # twice the warps, half the time

    def warm_up(job: Any) -> Any:
        if tiles.tables().one_pass[-1][1] == 8:
            raise RuntimeError("out of registers")
        return job

    monkeypatch.setattr(sweep, "reads", lambda name, shape, device: {"one_pass"})
    monkeypatch.setattr(sweep, "time_in_turns", times)
    monkeypatch.setattr(sweep, "warm_up", warm_up)
    monkeypatch.setattr(sweep, "with_value", lambda target, value, job: job)
    path = tmp_path / "sweep.json"
    assert sweep.main(["--dry-run", "--json", str(path), "--tables", "one_pass", "--rows", "inf"]) == 0
    assert "LongTile(math.inf, 16, 4),  # 4.00 times as fast as LongTile(math.inf, 4, 4)" in capsys.readouterr().out


def test_a_new_table_is_swept_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tables(NamedTuple):
        few: int = 4
        new: tuple[Row, ...] = (Row(1024, 1, 2), Row(math.inf, 4, 2))

    monkeypatch.setattr(tiles.module, "tables", Tables())
    found = sweep.targets(None, None)
    assert [target.name for target in found] == ["new, rows up to 1,024 bytes", "new, longer rows", "few"]
    assert found[1].shapes(sweep.Sizes(4096, ())) == ((2, 704),)
    assert sweep.targets(["new"], [math.inf]) == [found[1]]
    assert tiles.parse("new=2048:2:2,inf:4:1") == ("new", (Row(2048, 2, 2), Row(math.inf, 4, 1)))


def test_a_backward_pass_is_swept_by_what_it_reads_itself(interpreted: None) -> None:
    sweep.reads.cache_clear()
    assert "one_pass" in sweep.reads("gradient", (2, 300), "cpu")
    assert "two_pass" not in sweep.reads("gradient", (2, 300), "cpu")
    assert "two_pass" in sweep.reads("loss and gradient", (2, 300), "cpu")
