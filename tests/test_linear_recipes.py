"""The examples in docs/linear.md do what their formulas say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from softmax_fused import linear_cross_entropy_rows
from softmax_fused.functional import chunked_linear

TEXT = (Path(__file__).parents[1] / "docs" / "linear.md").read_text()
RECIPES = dict(re.findall(r"^### ([^\n]*)\n\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


def run(title: str, rows: int) -> dict[str, Any]:
    """Run an example; every third row is ignored."""
    found: dict[str, Any] = {
        "torch": torch,
        "linear_cross_entropy_rows": linear_cross_entropy_rows,
        "hidden": torch.randn(rows, 6, dtype=torch.float64, requires_grad=True),
        "head": torch.nn.Linear(6, 7, dtype=torch.float64),
        "labels": torch.randint(7, (rows,)).index_fill_(0, torch.arange(0, rows, 3), -100),
    }
    exec(RECIPES[title], found)
    return found


def test_there_are_two() -> None:
    assert list(RECIPES) == ["Fine-tuning with token accuracy", "Perplexity of long sequences in bounded memory"]


def test_fine_tuning_with_token_accuracy() -> None:
    found = run("Fine-tuning with token accuracy", 20)
    head, labels = found["head"], found["labels"]
    logits = head(found["hidden"])
    truth = F.cross_entropy(logits, labels)
    torch.testing.assert_close(found["loss"], truth)
    tensors = (found["hidden"], head.weight, head.bias)
    torch.testing.assert_close(*(torch.autograd.grad(loss, tensors) for loss in (found["loss"], truth)))
    kept = labels != -100
    right = (logits.argmax(1)[kept] == labels[kept]).double().mean().item()
    assert found["accuracy"].item() == pytest.approx(right)


def test_perplexity_of_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    project = chunked_linear.project
    monkeypatch.setattr(chunked_linear, "project", lambda *args: (sizes.append(len(args[0])), project(*args))[1])
    found = run("Perplexity of long sequences in bounded memory", 4000)
    torch.testing.assert_close(
        found["perplexity"], F.cross_entropy(found["head"](found["hidden"]), found["labels"]).exp()
    )
    assert len(sizes) > 1
    assert max(sizes) <= 1024
