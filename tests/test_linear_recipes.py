"""The examples in docs/linear.md do what their formulas say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused import linear_cross_entropy, linear_cross_entropy_rows, sparse_target
from softmax_fused.functional import chunked_linear

TEXT = (Path(__file__).parents[1] / "docs" / "linear.md").read_text()
RECIPES = dict(re.findall(r"^### ([^\n]*)\n\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


def run(title: str, rows: int) -> dict[str, Any]:
    """Run an example; every third row is ignored."""
    found: dict[str, Any] = {
        "torch": torch,
        "linear_cross_entropy": linear_cross_entropy,
        "linear_cross_entropy_rows": linear_cross_entropy_rows,
        "sparse_target": sparse_target,
        "classes": torch.rand(rows, 7).topk(3).indices,
        "probabilities": torch.rand(rows, 3, dtype=torch.float64),
        "T": 2.5,
        "hidden": torch.randn(rows, 6, dtype=torch.float64, requires_grad=True),
        "head": torch.nn.Linear(6, 7, dtype=torch.float64),
        "labels": torch.randint(7, (rows,)).index_fill_(0, torch.arange(0, rows, 3), -100),
    }
    exec(RECIPES[title], found)
    return found


def test_every_recipe_has_a_test() -> None:
    assert list(RECIPES) == [
        "Fine-tuning with token accuracy",
        "Z-loss, and tokens weighted by their probability",
        "Distillation from a teacher's most probable classes",
        "Perplexity of long sequences in bounded memory",
    ]


def assert_same(found: dict[str, Any], truth: Tensor) -> None:
    """Compare the loss and its gradients."""
    tensors = (found["hidden"], found["head"].weight, found["head"].bias)
    torch.testing.assert_close(found["loss"], truth)
    torch.testing.assert_close(*(torch.autograd.grad(loss, tensors) for loss in (found["loss"], truth)))


def test_z_loss_and_weighted_tokens() -> None:
    found = run("Z-loss, and tokens weighted by their probability", 20)
    logits, kept = found["head"](found["hidden"]), found["labels"] != -100
    log_p = logits.log_softmax(1)[kept].gather(1, found["labels"][kept][:, None])
    weighted = -(log_p.detach().exp() * log_p).mean()
    assert_same(found, weighted + 1e-4 * logits.logsumexp(1)[kept].square().mean())


def test_distillation_from_few_classes() -> None:
    found = run("Distillation from a teacher's most probable classes", 20)
    log_p = (found["head"](found["hidden"]) / 2.5).log_softmax(1).gather(1, found["classes"])
    assert_same(found, -(2.5**2) * (found["probabilities"] * log_p).sum(1).mean())


def test_fine_tuning_with_token_accuracy() -> None:
    found = run("Fine-tuning with token accuracy", 20)
    head, labels = found["head"], found["labels"]
    logits = head(found["hidden"])
    assert_same(found, F.cross_entropy(logits, labels))
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
