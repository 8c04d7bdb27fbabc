"""Libraries that call torch's loss train as before while it is patched, to the same losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmax_fused import patch
from tests.tiny import REASON, digits, language_model, lightnings_warnings, sentences

STEPS = 5
Calls = list[dict[str, Any]]


def with_and_without(train: Callable[[], list[float]], calls: Calls, least: int = STEPS) -> None:
    """Train twice from the same seed; patched, every loss is ours and none differs."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's
    theirs = train()
    assert not calls
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    with patch(backend="torch"):
        ours = train()
    assert len(calls) >= least
    assert len(theirs) >= STEPS
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_transformers(calls: Calls) -> None:
    def train() -> list[float]:
        model, losses = language_model(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batch = torch.utils.data.default_collate(sentences())
        for _ in range(STEPS):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    with_and_without(train, calls)


def test_transformers_trainer(calls: Calls, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=REASON)
    pytest.importorskip("accelerate", reason=REASON)

    def train() -> list[float]:
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(language_model(), settings, train_dataset=sentences())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with_and_without(train, calls, 2 * STEPS)


@lightnings_warnings
def test_lightning(calls: Calls, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason=REASON)
    losses: list[float] = []

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            loss = self.criterion(self.layer(images), labels)
            losses.append(loss.item())
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            images, labels = batch
            losses.append(F.cross_entropy(self.layer(images), labels).item())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def train() -> list[float]:
        losses.clear()
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits()), batch_size=16)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), batches, batches)
        return [*losses]

    with_and_without(train, calls, 16)


def test_timm_soft_targets(calls: Calls) -> None:
    """Mixup and label smoothing give class probabilities, which nn.CrossEntropyLoss takes as timm's loss does.

    In float64: in float32 the last digit of a gradient decides on ReLUs, and the losses part.
    """
    timm = pytest.importorskip("timm", reason=REASON)
    soft_target = pytest.importorskip("timm.loss", reason=REASON).SoftTargetCrossEntropy()
    mixup = pytest.importorskip("timm.data", reason=REASON).Mixup(
        0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10
    )
    images, labels = digits()
    images = F.interpolate(images.double().view(-1, 1, 8, 8), 32).expand(-1, 3, -1, -1)

    def train() -> list[float]:
        model, criterion, losses = timm.create_model("test_resnet", num_classes=10).double(), nn.CrossEntropyLoss(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(STEPS):
            mixed, targets = mixup(images.clone(), labels)
            logits = model(mixed)
            loss = criterion(logits, targets)
            torch.testing.assert_close(loss, soft_target(logits, targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    with_and_without(train, calls)


def test_timm_label_smoothing(calls: Calls) -> None:
    loss_of_timm = pytest.importorskip("timm.loss", reason=REASON).LabelSmoothingCrossEntropy(0.1)
    logits, labels = torch.randn(8, 10), torch.arange(8)
    with patch(backend="torch"):
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
        assert len(calls) == 1
        torch.testing.assert_close(loss, loss_of_timm(logits, labels))
        assert len(calls) == 1  # timm's own loss takes the logarithm itself and is not reached
