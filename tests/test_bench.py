"""The arithmetic, the tables and the timing code of the benchmarks; never how fast anything is."""

import copy
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from bench import codegen, dry_run, figures, formulas, measure, memory, plot, providers, record, tables
from bench.cases import JOBS, STEP, Case, Inputs, Job
from bench.clocks import CpuClock, CudaClock, copy_bandwidth, count_launches

TINY = Case((4, 6), torch.float32)


@pytest.fixture
def cuda_clock() -> CudaClock:
    return dry_run.make_clock()


def make_point(provider: str, ratio: float, mode: str = "both", **more: Any) -> dict[str, Any]:
    point = {"provider": provider, "mode": mode, "dtype": "float32", "shape": [8, 1000], "device": "cuda", "rounds": 5}
    point |= {"p20_us": 90 / ratio, "p50_us": 100 / ratio, "p80_us": 120 / ratio, "ratio_p50": ratio}
    return point | {"bytes": 64_000, "gb_per_s": 6.4, "percent_of_copy": 50.0, "peak_bytes": 32_000} | more


def make_record(points: list[dict[str, Any]], device: str = "cuda") -> dict[str, Any]:
    return {
        "machine": {"device": device, "name": "Machine 7", "driver": "1.2"},
        "versions": {"torch": "2.11", "Liger": None},
        "date": "2026-11-21",
        "command": "python -m bench.gpu",
        "copy_gb_per_s": 4300.0,
        "complete": True,
        "points": points,
        "skipped": [],
    }


POINTS = [
    make_point("ours", 2.0, "forward"),
    make_point("ours", 1.5, "backward"),
    make_point("ours", 1.75, launches=3, host_us=40.0),
    make_point("torch", 1.0, launches=6, host_us=20.0, peak_bytes=96_000),
    make_point("Liger", 2.5),
    make_point("ours", 0.8, shape=[256, 10], peak_bytes=None),
    make_point("torch", 1.0, shape=[256, 10], peak_bytes=None),
    make_point("ours", 0.9, "step", shape=[256, 10]),
    make_point("torch", 1.0, "step", shape=[256, 10]),
]


@pytest.mark.parametrize(("mode", "count"), [("forward", 480), ("backward", 960), ("both", 960), ("step", None)])
def test_minimal_bytes(mode: str, count: int | None) -> None:
    assert formulas.minimal_bytes(mode, (2, 3, 4, 5), 4) == count


def test_gb_per_s() -> None:
    assert formulas.gb_per_s(4_300_000_000, 1000) == pytest.approx(4300)


@pytest.mark.parametrize(
    ("values", "expected"), [([7.0], (7, 7, 7)), ([5, 1, 3, 2, 4], (1.8, 3, 4.2)), ([1, 2], (1.2, 1.5, 1.8))]
)
def test_spread(values: list[float], expected: tuple[float, float, float]) -> None:
    assert formulas.spread(values) == pytest.approx(expected)


def test_ratio_is_taken_round_by_round() -> None:
    figures = measure.timing([1.0, 10.0, 2.0], base=[2.0, 20.0, 4.0])  # the machine drifts, for both sides
    assert (figures["ratio_p20"], figures["ratio_p50"], figures["ratio_p80"]) == (2, 2, 2)


def test_jobs_leave_shared_logits_alone_and_restore_overwritten_ones() -> None:
    def overwriting(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(logits.detach().clone())
        logits.detach().zero_()
        return logits.sum()

    for mode in ("forward", "backward", "both"):
        seen: list[torch.Tensor] = []
        inputs = Inputs(TINY, "cpu")
        before = inputs.logits.detach().clone()
        job = JOBS[mode](overwriting, inputs, True)
        measure.warm_up(job)
        assert len(seen) == 3
        assert all(torch.equal(logits, before) for logits in [*seen, inputs.logits])


def test_a_training_step_trains() -> None:
    losses = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses.append(F.cross_entropy(logits, target))
        return losses[-1]

    job = JOBS["step"](loss, Inputs(STEP, "cpu"), False)
    for _ in range(3):
        job.call()
    assert losses[2] < losses[0]


def test_providers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_ROUNDS", 7)
    order: list[str] = []
    jobs = {name: Job(lambda: None, lambda name=name: order.append(name)) for name in "ab"}
    times = measure.time_in_turns(jobs, CpuClock(), calls=1, until=0)
    assert "".join(order) == "abbaabbaab"
    assert len(times["a"]) == len(times["b"]) == measure.LEAST_ROUNDS


def test_the_cache_is_flushed_right_before_the_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = CpuClock()
    monkeypatch.setattr(clock, "flush", lambda: order.append("flush"))
    measure.time_once(Job(lambda: order.append("prepare"), lambda: order.append("call")), clock, calls=2)
    assert order == ["prepare", "flush", "call"] * 2


def test_ratio_is_torch_over_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time_in_turns", lambda *_: {"ours": [2.0, 3.0], "torch": [4.0, 6.0]})
    result = measure.measure_case(STEP, CpuClock(), 0, providers=("ours", "torch"))
    assert [(point["provider"], point["ratio_p50"]) for point in result.points] == [("ours", 2), ("torch", 1)]


def test_measure_a_case_on_the_cpu() -> None:
    result = measure.measure_case(TINY, CpuClock(), 0, copy_gb_per_s=10, providers=("ours", "torch", "Liger"))
    assert [(point["provider"], point["mode"]) for point in result.points] == [
        (name, mode) for mode in ("forward", "backward", "both") for name in ("ours", "torch")
    ]
    assert result.skipped == [{"provider": "Liger", "case": "4x6-float32", "reason": "liger_kernel needs a GPU"}]
    point = result.points[-1]
    assert (point["bytes"], point["shape"], point["dtype"], point["ratio_p50"]) == (192, [4, 6], "float32", 1)
    assert point["p20_us"] <= point["p50_us"] <= point["p80_us"]


def test_measure_a_case_with_events(cuda_clock: CudaClock) -> None:
    result = measure.measure_case(TINY, cuda_clock, 0, copy_gb_per_s=1, providers=("ours", "torch"))
    assert not result.skipped
    both = result.points[-1]
    assert both | {
        "p50_us": 2000,
        "bytes": 192,
        "gb_per_s": 0.0,
        "peak_bytes": 64,
        "launches": None,
        "ratio_p50": 1,
    } == both  # fmt: skip
    assert both["host_us"] > 0
    assert copy_bandwidth(cuda_clock, 1000) == pytest.approx(2 * 1000 / 2000 / 1e3)


def test_a_provider_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setitem(providers.PROVIDERS, "Liger", providers.Provider(lambda case, device: failing))
    result = measure.measure_case(STEP, CpuClock(), 0, providers=("Liger", "torch"))
    assert [point["provider"] for point in result.points] == ["torch"]
    assert result.skipped[0]["reason"] == "OutOfMemoryError: tried to allocate"


def test_a_mode_that_fails_while_it_is_timed_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def failing(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if next(calls) == 4:
            raise RuntimeError("lost")
        return F.cross_entropy(logits, target)

    monkeypatch.setitem(providers.PROVIDERS, "torch", providers.Provider(lambda case, device: failing))
    result = measure.measure_case(TINY, CpuClock(), 0, providers=("torch",))
    assert [point["mode"] for point in result.points] == ["backward", "both"]
    assert result.skipped[0] == {
        "provider": "every provider, forward",
        "case": "4x6-float32",
        "reason": "RuntimeError: lost",
    }


def test_no_compiling_without_time() -> None:
    result = measure.measure_case(TINY, CpuClock(), seconds=1, providers=("torch.compile",))
    assert result.skipped[0]["reason"] == "1 s are too little time to compile"


def test_count_launches() -> None:
    events = [{"cat": "kernel"}, {"cat": "kernel"}, {"cat": "gpu_memset"}, {"cat": "cpu_op"}, {"ph": "M"}]
    assert count_launches(events) == 3
    assert count_launches([{"cat": "cpu_op"}]) is None


def test_rivals_say_why_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(providers.Unavailable, match=r"flash_attn takes logits \(N, C\) only"):
        providers.flash_attn(Case((2, 3, 4, 4), torch.float32), "cuda")
    with pytest.raises(providers.Unavailable, match="flash_attn cannot be imported: ModuleNotFoundError"):
        providers.flash_attn(TINY, "cuda")


def test_flash_attn_loss_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn.ops.triton.cross_entropy")
    module.cross_entropy_loss = lambda logits, target: (F.cross_entropy(logits, target, reduction="none"), None)
    monkeypatch.setattr(providers, "rival", lambda *_: module)
    inputs = Inputs(TINY, "cpu")
    loss = providers.flash_attn(TINY, "cuda")(inputs.logits, inputs.target)
    torch.testing.assert_close(loss, F.cross_entropy(inputs.logits, inputs.target))


def test_outputs_of_rows_are_the_same_for_all() -> None:
    case = TINY._replace(operation="rows")
    inputs = Inputs(case, "cpu")
    functions = [
        providers.torch_eager(case, "cpu"),
        providers.ours(case, "cpu"),
        functools.partial(providers.rows_of_ours, backend="torch"),
    ]
    first, *others = [torch.autograd.grad(it(inputs.logits, inputs.target), inputs.logits)[0] for it in functions]
    for grad in others:
        torch.testing.assert_close(grad, first)
    with pytest.raises(providers.Unavailable, match="rows has no grad_in_forward"):
        providers.ours(case, "cpu", option="grad_in_forward")
    with pytest.raises(providers.Unavailable, match="liger_kernel has no such outputs of rows"):
        providers.liger(case, "cuda")


def test_memory_is_the_growth_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_peak", iter([100, 350]).__next__)
    assert memory.growth("torch", TINY) == 250


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is that of the parent")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    case = Case((256, 40_000), torch.float32)
    larger = torch.ones(2**26)  # a child must not start at its parent's peak
    points = [make_point("torch", 1.0, shape=list(case.shape), peak_bytes=None), make_point("torch", 1.0)]
    memory.fill_peaks(points, case)
    assert 2 < points[0]["peak_bytes"] / (case.logits * 4) < 4 < larger.nbytes
    assert points[1]["peak_bytes"] == 32_000


def test_write_json_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, text: str) -> None:
        path.write_bytes(text[:5].encode())
        raise KeyboardInterrupt

    path = tmp_path / "new" / "machine.json"
    record.write_json(path, {"points": [1]})
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        record.write_json(path, {"points": [1, 2]})
    assert json.loads(path.read_text()) == {"points": [1]}


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(case: Case, *_: object, result: measure.Result) -> None:
        result.points.append(make_point("ours", 1.0))
        if case == STEP:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "measure_case", stopped)
    path = tmp_path / "cpu.json"
    with pytest.raises(KeyboardInterrupt):
        record.run([TINY, STEP], CpuClock(), path, 0, "python -m bench.cpu", 1000)
    kept = json.loads(path.read_text())
    assert (len(kept["points"]), kept["complete"]) == (2, False)
    assert kept["machine"]["threads"] == torch.get_num_threads()
    assert kept["versions"]["torch"] == torch.__version__
    assert "The run was stopped" in plot.provenance(kept)


def test_a_case_too_large_for_the_machine_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(case: Case, *_: object, result: measure.Result) -> None:
        if case == TINY:
            raise torch.OutOfMemoryError("tried to allocate")
        result.points.append(make_point("ours", 1.0))

    monkeypatch.setattr(record, "measure_case", out_of_memory)
    written = record.run([TINY, STEP], CpuClock(), tmp_path / "cpu.json", 0, "python -m bench.cpu", 1000)
    assert len(written["points"]) == 1
    assert [skip["case"] for skip in written["skipped"]] == ["4x6-float32"]


def test_busy_processes_run_meanwhile_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command: (started.append(real(command)), started[-1])[1])
    with record.company(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode for process in started)
    header = record.header(CpuClock(), 1.0, "python -m bench.cpu --busy", 2)
    assert header["machine"]["busy"] == 2
    assert "beside 2 busy processes" in plot.provenance(header)
    assert "busy" not in record.header(CpuClock(), 1.0, "python -m bench.cpu", 0)["machine"]


def test_slug() -> None:
    assert record.slug("NVIDIA H200") == "nvidia-h200"


def test_speed_table_keeps_losing_rows_and_marks_the_fastest() -> None:
    assert tables.speed_table(POINTS).splitlines() == [
        "| logits | dtype | forward: ours | backward: ours | both: ours | both: Liger | both: torch, time "
        "| both: ours, time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| (8, 1000) | float32 | 2.00 | 1.50 | 1.75 | **2.50** | 0.10 ms | 0.06 ms |",
        "| (256, 10) | float32 | - | - | 0.80 | - | **0.10 ms** | 0.12 ms |",
        "| training step, 784 → 10, batch 256 | float32 | - | - | 0.90 | - | **0.10 ms** | 0.11 ms |",
    ]
    quieter = [make_point("ours", 1.1, p50_us=50), make_point("torch", 1.0), make_point("Liger", 1.2)]
    assert "| 1.10 | **1.20** | 0.10 ms | 0.05 ms |" in tables.speed_table(quieter), "by the ratios"


def test_a_table_of_one_figure_by_provider() -> None:
    assert tables.provider_table(POINTS[:5], tables.share_of_copy, "{:.0f}").splitlines() == [
        "| logits | dtype | ours | Liger | torch |",
        "| --- | --- | --- | --- | --- |",
        "| (8, 1000) | float32 | 50 | 50 | 50 |",
    ]
    no_memory = [make_point("Liger", 1.0, peak_bytes=None), make_point("torch", 1.0)]
    assert tables.provider_table(no_memory, tables.in_logits, "{:.2f}").splitlines()[0] == "| logits | dtype | torch |"
    assert tables.provider_table(no_memory[:1], tables.in_logits, "{:.2f}") == ""


def test_launch_table_has_the_small_batches() -> None:
    points = [make_point(name, 1.0, "step", shape=[256, 10], host_us=40.4, loop_us=90.0) for name in ("ours", "torch")]
    assert tables.launch_table([*points, make_point("ours", 1.0, shape=[60_000, 10])]).splitlines()[2:] == [
        "| training step, 784 → 10, batch 256 | float32 | device, µs | 100 | 100 |",
        "| training step, 784 → 10, batch 256 | float32 | host, µs | 40 | 40 |",
        "| training step, 784 → 10, batch 256 | float32 | in a loop, µs | 90 | 90 |",
    ]
    assert tables.launch_table([]) == ""


def test_memory_sentence() -> None:
    assert tables.memory_sentence(POINTS) == (
        "Peak memory of loss and gradient at (8, 1000) float32, beyond logits and target, in units of the logits: "
        "ours 1.00; Liger 1.00; torch 3.00."
    )


KERNEL = {
    "kernel": "cross_entropy_long_both",
    "target": "sm_90",
    "dtype": "bfloat16",
    "classes": 32_000,
    "mode": "both",
}
KERNEL |= {"shape": [8192, 32_000], "kind": "indices", "registers": 32, "bound": "bytes", "stack_bytes": 0}
KERNEL |= {"instructions_per_element": 12.73, "ex2_per_element": 2.1, "predicted_us": 260.4}


def test_predicted_table() -> None:
    others = [KERNEL | {"target": "sm_80"}, KERNEL | {"predicted_us": 3.0}, KERNEL | {"dtype": "float16"}]
    assert tables.predicted_table(others) == ""
    assert tables.predicted_table([*others, KERNEL]).splitlines()[2:] == [
        "| (8192, 32000) | bfloat16 | indices | both | 32 | 12.7 | 2.10 | 0.26 ms (bytes) |"
    ]


def test_kernels_beside_their_predictions() -> None:
    row = {"kernel": "softmax_forward", "mode": "forward", "shape": [8, 1000], "kind": "softmax", "measured_us": 300.0}
    assert tables.kernels_table([row | {"predicted_us": 240.0, "bound": "bytes"}, row]).splitlines()[2:] == [
        "| (8, 1000) | softmax | forward | 0.24 ms (bytes) | 0.30 ms | 1.25 |",
        "| (8, 1000) | softmax | forward | - | 0.30 ms | - |",
    ]


def test_a_kernel_is_predicted_for_a_machine_that_copies_so_fast() -> None:
    assert codegen.predict(KERNEL, bytes_per_us=1e6) == {"predicted_us": 1048.58, "bound": "bytes"}
    assert codegen.predict(KERNEL, bytes_per_us=1e9)["bound"] == "EX2"


def test_what_is_absent_is_said_once() -> None:
    skipped = [{"provider": "Liger", "case": case, "reason": "needs\n a GPU"} for case in "ab"]
    parts = {"step": {"seconds": 1.0, "error": None}, "epoch": {"seconds": 3.0, "error": "KeyError: 'x'"}}
    said = tables.absent_sentence({"parts": parts, "skipped": skipped})
    assert said == "Not measured, or not all of it: epoch (KeyError: 'x'); Liger (needs a GPU)."
    assert tables.absent_sentence({"skipped": []}) == ""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder of results, and documents written from it."""
    results = tmp_path / "results"
    record.write_json(results / "machine-7.json", make_record(POINTS))
    record.write_json(results / "codegen.json", [KERNEL])
    write_empty_documents(tmp_path)
    plot.write(results, tmp_path)
    return tmp_path


def write_empty_documents(root: Path) -> None:
    """The documents that hold tables, with nothing current in them."""
    for name, blocks in plot.DOCUMENTS.items():
        marked = "".join(f"<!-- speed:{block} -->\nold\n<!-- /speed:{block} -->\n" for block in blocks)
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"# Name\n{marked}")


def test_documents_from_results(written: Path) -> None:
    text = (written / "docs/performance.md").read_text()
    assert "old" not in text + (written / "README.md").read_text()
    assert text.startswith("# Name\n")
    assert plot.NOT_ON_A_GPU not in text
    assert "Machine 7, driver 1.2, copy 4,300 GB/s; torch 2.11; 2026-11-21; `python -m bench.gpu`." in text
    assert "](images/speed-machine-7-float32.png)" in text
    assert (written / "docs/images/speed-machine-7-float32.png").stat().st_size > 10_000
    assert plot.check(written / "results", written) == []


def test_provenance_ends_with_what_is_to_be_known() -> None:
    noted = make_record([]) | {"note": "The machine was busy.", "complete": False}
    assert plot.provenance(noted).endswith("`. The machine was busy. The run was stopped: cases are missing.")


def test_the_summary_is_some_rows_of_the_cpu(tmp_path: Path) -> None:
    shown = [make_point("ours", 2.0, shape=[2048, 10000]), make_point("torch", 1.0, shape=[2048, 10000])]
    lines = tables.summary_table([*POINTS, *shown]).splitlines()
    assert lines[0] == "| logits | dtype | ours | torch, time |"
    assert [line.split(" | ")[:3] for line in lines[2:]] == [["| (2048, 10000)", "float32", "**2.00**"]]
    record.write_json(tmp_path / "cpu.json", make_record(shown))
    assert plot.blocks(tmp_path)["summary"].startswith(lines[0])


def test_check_sees_what_is_out_of_date(written: Path) -> None:
    changed = copy.deepcopy(POINTS)
    changed[2]["ratio_p50"] = 1.8
    record.write_json(written / "results/machine-7.json", make_record(changed))
    (written / "docs/images/speed-machine-7-float32.png").unlink()
    assert plot.check(written / "results", written) == [
        "docs/performance.md differs from results",
        "docs/images/speed-machine-7-float32.png is missing",
    ]


def test_a_document_without_markers() -> None:
    with pytest.raises(ValueError, match=r"README.md must have <!-- speed:summary --> and"):
        plot.fill("README.md", "# Name", {"summary": "text"})


def test_bars_start_at_one() -> None:
    drawn: list[Any] = []
    axes = SimpleNamespace(barh=lambda places, widths, **options: drawn.append((widths, options)), annotate=Mock())
    figures.add_bars(axes, tables.rows(POINTS), "ours", offset=0, height=1)
    assert drawn[0][0] == pytest.approx([0.75, -0.2, -0.1])
    assert drawn[0][1]["left"] == 1


def test_the_documents_are_what_the_results_give() -> None:
    assert plot.check() == []
