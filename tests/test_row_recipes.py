"""Every recipe in docs/recipes.md does what its formula says, gradient included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SETUP, *BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TITLES = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
RECIPES = dict(zip(TITLES, BLOCKS, strict=True))


def names(classes: int, ignored: bool) -> dict[str, Any]:
    target = torch.randint(0, classes, (12,))
    if ignored:
        target[::4] = -100
    return {
        "torch": torch,
        "logits": (3 * torch.randn(12, classes, dtype=torch.float64)).requires_grad_(),
        "target": target,
        "row_weight": torch.rand(12, dtype=torch.float64),
        "tokens": 40,
        "classes": torch.rand(12, classes).topk(4).indices.masked_fill(target.unsqueeze(1) == -100, -100),
        "probabilities": torch.rand(12, 4, dtype=torch.float64),
        "teacher": 3 * torch.randn(12, classes, dtype=torch.float64),
        "old_log_prob": -2 * torch.rand(12, dtype=torch.float64),
        "advantage": torch.randn(12, dtype=torch.float64),
        "T": 2.5,
        "g": 2.0,
    }


def each(n: dict[str, Any]) -> Tensor:
    return F.cross_entropy(n["logits"], n["target"], reduction="none")


def focal(n: dict[str, Any]) -> Tensor:
    p = n["logits"].softmax(1).gather(1, n["target"].clamp(min=0)[:, None])[:, 0]
    return ((1 - p) ** n["g"] * each(n)).mean()


def distilled(n: dict[str, Any]) -> Tensor:
    student, teacher = ((n[name] / n["T"]).log_softmax(1) for name in ("logits", "teacher"))
    return n["T"] ** 2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distilled_from_few(n: dict[str, Any]) -> Tensor:
    log_p = (n["logits"] / n["T"]).log_softmax(1)
    kept = n["classes"][:, 0] != -100
    return -(n["T"] ** 2) * (n["probabilities"] * log_p.gather(1, n["classes"].clamp(min=0)))[kept].sum(1).mean()


def fine_tuned(n: dict[str, Any]) -> Tensor:
    kept = n["target"] != -100
    log_p = n["logits"].log_softmax(1)[kept].gather(1, n["target"][kept][:, None])
    return -(log_p.detach().exp() * log_p).mean()


def penalised(n: dict[str, Any]) -> Tensor:
    p = n["logits"].softmax(1)
    return (each(n) + 0.1 * (p * p.log()).sum(1)).mean()


def policy_gradient(n: dict[str, Any]) -> Tensor:
    kept = n["target"] != -100
    log_p = (n["logits"] / n["T"]).log_softmax(1)[kept]
    taken = log_p.gather(1, n["target"][kept][:, None])[:, 0]
    ratio, advantage = (taken - n["old_log_prob"][kept]).exp(), n["advantage"][kept]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -(gain - 0.01 * (log_p.exp() * log_p).sum(1)).mean()


def z_loss(n: dict[str, Any]) -> Tensor:
    kept = n["target"] != -100
    return F.cross_entropy(n["logits"], n["target"]) + 1e-4 * n["logits"].logsumexp(1)[kept].square().mean()


PLAIN: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "z-loss": z_loss,
    "Weights of rows": lambda n: (n["row_weight"] * each(n)).sum() / n["row_weight"].sum(),
    "Tokens weighted by their probability": fine_tuned,
    "An explicit denominator, for gradient accumulation": lambda n: each(n).sum() / 40,
    "Token accuracy without a second pass": lambda n: F.cross_entropy(n["logits"], n["target"]),
    "Policy gradient with clipped ratios and an entropy bonus": policy_gradient,
    "Focal loss": focal,
    "Distillation from a teacher's most probable classes": distilled_from_few,
    "Knowledge distillation": distilled,
    "Confidence penalty": penalised,
    "Capped logits": lambda n: F.cross_entropy(30 * torch.tanh(n["logits"] / 30), n["target"]),
}


def test_every_recipe_has_a_formula() -> None:
    assert list(RECIPES) == list(PLAIN)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("title", PLAIN)
def test_recipe(title: str, ignored: bool) -> None:
    found = names(11, ignored and title not in ("Confidence penalty", "Capped logits"))
    exec(SETUP + RECIPES[title], found)
    truth = PLAIN[title](found)
    torch.testing.assert_close(found["loss"], truth)
    torch.testing.assert_close(*(torch.autograd.grad(loss, found["logits"])[0] for loss in (found["loss"], truth)))
    if "accuracy" in found:
        kept = found["target"] != -100
        right = found["logits"].argmax(1)[kept] == found["target"][kept]
        assert found["accuracy"].item() == pytest.approx(right.double().mean().item())
        top5 = found["logits"].topk(5).indices[kept] == found["target"][kept][:, None]
        assert found["top5"].item() == pytest.approx(top5.any(1).double().mean().item())


@pytest.mark.parametrize("title", [title for title in PLAIN if title != "Capped logits"])  # the cap makes -inf finite
def test_recipe_with_a_masked_class(title: str) -> None:
    found = names(11, ignored=False)
    found["target"] = found["target"].clamp(max=9)
    results = []
    for classes, mask in (([*range(10)], 0.0), ([*range(11)], torch.tensor([0.0] * 10 + [-torch.inf]))):
        logits = (found["logits"].detach()[:, classes] + mask).requires_grad_()
        some = found | {
            "classes": found["classes"].clamp(max=9),
            "logits": logits,
            "teacher": found["teacher"][:, classes] + mask,
        }
        exec(SETUP + RECIPES[title], some)
        results.append(
            (some["loss"].detach(), F.pad(torch.autograd.grad(some["loss"], logits)[0], (0, 11 - len(classes))))
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("g", [0.5, 1.0, 2.0])
def test_focal_loss_of_certain_and_impossible_rows(g: float, dtype: torch.dtype) -> None:
    """A loss of exactly 0, labelled or ignored, has the slope 0; an infinite one has the slope of the loss itself."""
    logits = torch.tensor([[1e4, 0, 0], [0, 1, 2], [0, 1, -torch.inf], [0, 1, 2]], dtype=dtype, requires_grad=True)
    found = {"torch": torch, "logits": logits, "target": torch.tensor([0, -100, 2, 1]), "g": g}
    exec(SETUP + RECIPES["Focal loss"], found)
    (grad,) = torch.autograd.grad(found["loss"], logits)
    assert grad[:2].eq(0).all()
    torch.testing.assert_close(grad[2], (logits.detach()[2].softmax(0) - torch.tensor([0, 0, 1])).to(dtype) / 4)
    p = logits.detach()[3].double().softmax(0)
    slope = (1 - p[1]) ** g - g * (1 - p[1]) ** (g - 1) * p[1] * p[1].log()
    torch.testing.assert_close(grad[3], (slope * (p - torch.tensor([0, 1, 0])) / 4).to(dtype), rtol=2e-3, atol=1e-3)


def test_micro_batches_with_one_denominator_make_the_batch() -> None:
    found = names(11, ignored=True)
    logits, target = found["logits"], found["target"]
    found["tokens"] = (target != -100).sum()
    whole = F.cross_entropy(logits, target)
    parts = []
    for rows in (slice(0, 3), slice(3, 12)):
        found |= {"logits": logits[rows], "target": target[rows]}
        exec(SETUP + RECIPES["An explicit denominator, for gradient accumulation"], found)
        parts.append(found["loss"])
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (sum(parts), whole)))
