"""The benchmark of the loss of classes divided among ranks."""

import json
import math
import sys
from pathlib import Path

import pytest

from bench import distributed
from bench.plot import PERFORMANCE, RESULTS, records


def test_a_world_of_one_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "WORLDS", (1,))
    monkeypatch.setattr(sys, "argv", ["distributed", "--json", str(tmp_path / "found.json"), "--rounds", "1"])
    distributed.main()
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["complete"]
    assert [(row["collectives"], row["bytes"]) for row in record["rows"]] == [(0, 0), (1, 64)]


def test_the_model_is_its_formula() -> None:
    rows = {row["world"]: row for row in distributed.model()}
    assert list(rows) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert rows[8]["compute_us"] == round(3 * 8192 * 128_256 * 2 / 8 / 4.3e6, 1)
    assert rows[1024]["latency_us"] == 2 * 2 * math.log2(1024) * 5
    assert rows[16]["transfer_us"] == round(2 * 15 / 16 * 3 * 8192 * 4 / 50e3, 1)


def test_the_page_has_the_tables_of_the_results() -> None:
    path = RESULTS / "distributed-cpu.json"
    assert path.stem not in records(RESULTS), "it is no table of the loss alone"
    record = json.loads(path.read_text())
    assert record["model"] == distributed.model()
    for text in (distributed.measured(record), distributed.on_paper(record), record["formula"]):
        assert text in PERFORMANCE.read_text()
    steps = {row["world"]: row for row in record["rows"] if row["call"] == "sizes given"}
    assert {world: row["collectives"] for world, row in steps.items()} == {1: 0, 2: 2, 4: 2}
    assert steps[2]["bytes"] == steps[4]["bytes"] == 3 * 4 * distributed.ROWS
