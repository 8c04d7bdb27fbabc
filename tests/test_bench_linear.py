"""The benchmark of the linear layer and its loss."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import dry_run, linear
from bench.clocks import CpuClock
from bench.formulas import BASE, OURS
from bench.measure import Result
from bench.plot import PERFORMANCE, RESULTS, records

TINY = linear.Case(8, 4, 10, "float32")


def test_every_provider_computes_the_same() -> None:
    x, w, target = torch.randn(8, 4), torch.randn(10, 4), torch.arange(8)
    expected = torch.nn.functional.cross_entropy(x @ w.T, target)
    for loss in linear.PROVIDERS.values():
        torch.testing.assert_close(loss(x, w, target), expected)
    p = torch.softmax(x @ w.T, 1)
    entropy = -(p * p.log()).sum(1).mean()
    for loss in linear.ROWS_PROVIDERS.values():
        torch.testing.assert_close(loss(x, w, target), expected - 0.01 * entropy)


def test_the_record_is_written_after_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CASES", [TINY, TINY._replace(rows=9), TINY._replace(operation="rows")])
    monkeypatch.setattr(linear, "peak_bytes", lambda name, case, clock, job: 100 if name == BASE else 25)
    written = []
    write_json = linear.write_json
    monkeypatch.setattr(
        linear, "write_json", lambda path, record: (written.append(len(record["rows"])), write_json(path, record))
    )
    monkeypatch.setattr(sys, "argv", ["linear", "--json", str(tmp_path / "found.json"), "--rounds", "2"])
    linear.main()
    record = json.loads((tmp_path / "found.json").read_text())
    providers = len(linear.PROVIDERS)
    assert written == [providers, 2 * providers, 2 * providers + len(linear.ROWS_PROVIDERS)]
    assert record["complete"]
    ours = next(row for row in record["rows"] if row["provider"] == OURS)
    assert (ours["rows"], ours["rounds"], ours["peak_to_torch"]) == (8, 2, 0.25)
    lines = linear.table(record["rows"]).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| 9, 4, 10 | float32 |")
    assert len(linear.table(record["rows"], "rows").splitlines()) == 3


def test_the_peak_is_that_of_a_process_of_its_own() -> None:
    case = linear.Case(512, 16, 8192, "float32")  # 16 MiB of logits
    assert linear.peak_bytes(BASE, case, CpuClock(), linear.make_job(BASE, TINY, "cpu")) > 2**24


def test_a_provider_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*tensors: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setitem(linear.PROVIDERS, BASE, out_of_memory)
    result = Result([], [])
    linear.measure(TINY, dry_run.make_clock(), 1, result)
    reasons = {skip["provider"]: skip["reason"] for skip in result.skipped}
    assert reasons == {
        BASE: "OutOfMemoryError: tried to allocate",
        "torch.compile": "0 s are too little time to compile",
        "Liger": "liger_kernel needs a GPU",
    }
    others = [name for name in linear.PROVIDERS if name != BASE]
    assert [point["provider"] for point in result.points] == others
    assert linear.table(result.points).splitlines()[2].startswith("| 8, 4, 10 | float32 | - | - | - |")


def test_the_page_has_the_table_of_the_results() -> None:
    for name, operation in (("linear-cpu", "loss"), ("linear-rows-cpu", "rows")):
        assert name not in records(RESULTS), "it is no table of the loss alone"
        found = linear.table(json.loads((RESULTS / f"{name}.json").read_text())["rows"], operation)
        assert found
        assert found in PERFORMANCE.read_text()
