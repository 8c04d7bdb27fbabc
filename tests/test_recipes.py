"""The recipes of docs/drop-in.md run as they stand there, with ours."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmax_fused import functional, modules
from tests.tiny import REASON, digits, language_model, lightnings_warnings, sentences

GUIDE = (Path(__file__).parents[1] / "docs/drop-in.md").read_text()
SECTION = GUIDE.partition("## Recipes\n")[2].partition("\n## ")[0]
RECIPES = dict(re.findall(r"^### (.*?)\n\n```python\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE))


def classifier(width: int) -> dict[str, Any]:
    """What the recipes for plain torch take for granted."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"torch": torch, "device": "cpu", "model": model, "optimizer": optimizer, "batches": [digits()] * 2}


def trainer(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason=REASON)
    pytest.importorskip("accelerate", reason=REASON)
    args = transformers.TrainingArguments(str(folder), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    return {"model": language_model(), "args": args, "dataset": sentences()}


def lightning() -> dict[str, Any]:
    class Classifier(pytest.importorskip("lightning", reason=REASON).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(*digits())
    return {"module": Classifier(), "batches": torch.utils.data.DataLoader(data, batch_size=16)}


def timm() -> dict[str, Any]:
    pytest.importorskip("timm", reason=REASON)
    images, labels = digits()
    return classifier(64) | {"batches": [(images.view(-1, 1, 8, 8), labels)] * 2}


def names(recipe: str, folder: Path) -> dict[str, Any]:
    """What the recipe uses and does not define."""
    special = {"transformers' Trainer": lambda: trainer(folder), "Lightning": lightning, "timm": timm}
    return special.get(recipe, lambda: classifier(64))()


@lightnings_warnings
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # other tests go through Inductor, which takes a quarter of a minute and no memory filled with NaN
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(modules, "cross_entropy", functional.cross_entropy)  # counted for the class too
    torchs = F.cross_entropy
    exec(RECIPES[recipe], names(recipe, tmp_path))
    assert calls
    assert F.cross_entropy is torchs


def test_every_recipe_is_found() -> None:
    assert len(RECIPES) == SECTION.count("### ") == SECTION.count("```python") == 6
