"""The textbook's chapter: what docs/chapter-in-commands.md prints is what comes out, and docs/chapter.ipynb runs."""

import copy
import doctest
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHAPTER = ROOT / "docs/chapter-in-commands.md"
NOTEBOOK = ROOT / "docs/chapter.ipynb"
CURVES = re.compile(r"^(.+?) +train loss (\S+), train accuracy (\S+), test accuracy (\S+)$", re.MULTILINE)


def test_the_examples_print_what_they_say() -> None:
    failed, tried = doctest.testfile(str(CHAPTER), module_relative=False)
    assert tried >= 9
    assert failed == 0


def outputs(notebook: Any) -> list[list[str]]:
    """The kinds of outputs of each cell: their names, or the types of what is displayed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[getattr(it, "name", None) or sorted(it.data)[0] for it in cell.outputs] for cell in cells]


def printed(notebook: Any) -> str:
    return "".join(it.text for cell in notebook.cells for it in cell.get("outputs", []) if it.output_type == "stream")


@pytest.mark.slow  # half a minute: three losses train softmax regression for ten epochs
def test_the_notebook_runs_and_its_losses_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[test]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    held = copy.deepcopy(notebook)
    if "SOFTMAX_FUSED_DATA" not in os.environ:  # no test downloads anything
        cell = next(cell for cell in notebook.cells if '"fashion-mnist"' in cell.source)
        cell.source = cell.source.replace('"fashion-mnist"', '"digits"')
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert outputs(notebook) == outputs(held), "docs/chapter.ipynb holds the outputs of another version of itself"
    curves = CURVES.findall(printed(notebook))
    assert [name for name, *_ in curves] == ["from scratch", "nn.CrossEntropyLoss", "softmax_fused"]
    numbers = [[float(value) for value in values] for _, *values in curves]
    assert numbers[2] == pytest.approx(numbers[1], abs=2e-3)
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)
    assert numbers[2][2] > 0.8
    if "SOFTMAX_FUSED_DATA" in os.environ:
        assert printed(notebook).split("train loss")[0] == printed(held).split("train loss")[0]
