"""Soft labels: one-hot, smoothed and mixed targets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from softmax_fused.training.data.batches import MemoryBatches, SoftLabelBatches
from softmax_fused.training.models.losses import build_loss
from softmax_fused.training.runs.run import train
from tests.lab import QUIET, SMALL, few_digits, metrics_of

CPU = torch.device("cpu")
FUSED = replace(SMALL, loss="fused")


def soft(mixup: float, seed: int = 0) -> tuple[MemoryBatches, SoftLabelBatches]:
    hard = MemoryBatches(few_digits().train, 64, 0, CPU)
    return hard, SoftLabelBatches(hard, 10, mixup, seed)


def record(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    folder = tmp_path / ("-".join(changes) or "plain")
    return metrics_of(train(replace(FUSED, **changes), output=folder, data=few_digits(), reporter=QUIET))


def test_one_hot_targets_give_the_curve_of_class_indices(tmp_path: Path) -> None:
    hard, one_hot = record(tmp_path, one_hot=False), record(tmp_path / "soft", one_hot=True)
    assert one_hot["train_loss"] == pytest.approx(hard["train_loss"], rel=1e-5)
    assert one_hot["train_accuracy"] == hard["train_accuracy"]
    assert one_hot["test_accuracy"] == hard["test_accuracy"]


def test_smoothing_mixes_the_target_with_the_uniform_distribution() -> None:
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    probabilities = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
    for name in ("fused", "torch"):
        smoothed = build_loss(name, 0.1)(logits, labels)
        torch.testing.assert_close(smoothed, build_loss(name)(logits, probabilities))


def test_smoothing_raises_the_training_loss(tmp_path: Path) -> None:
    plain, smoothed = record(tmp_path), record(tmp_path, label_smoothing=0.3)
    assert smoothed["train_loss"][-1] > plain["train_loss"][-1]
    assert smoothed["test_accuracy"][-1] > 0.3


def test_mixup_mixes_images_and_targets_alike() -> None:
    hard, mixed = soft(10)  # weights near one half
    assert len(mixed) == len(hard)
    weights = set()
    for (images, labels), (images_mixed, target) in zip(hard.epoch(2), mixed.epoch(2), strict=True):
        own = target.gather(1, labels.unsqueeze(1))
        weight = own.min().item()  # of an image whose partner has another class
        weights.add(weight)
        others = (images_mixed - weight * images) / (1 - weight)
        distances, rows = torch.cdist(
            others.flatten(1), images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        ).min(dim=1)
        assert distances.max() < 1e-3
        classes = torch.eye(10)
        torch.testing.assert_close(target, weight * classes[labels] + (1 - weight) * classes[labels[rows]])
    assert len(weights) == len(mixed)


def test_mixup_depends_on_seed_and_epoch_alone() -> None:
    batches = [next(iter(soft(0.4, seed)[1].epoch(epoch)))[1] for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[3])
    assert not torch.equal(batches[0], batches[2])


def test_training_with_mixup_learns(tmp_path: Path) -> None:
    mixed = record(tmp_path, mixup=0.2, epochs=10, batch_size=32)
    assert mixed["test_accuracy"][-1] > 0.8
    assert mixed["train_loss"][-1] < mixed["train_loss"][0]
