"""Predictions of a trained model: on users' own pictures, or on the test set."""

from dataclasses import dataclass
from pathlib import Path

import torch

from softmax_fused.training.config import TrainConfig, learner_for
from softmax_fused.training.data.datasets import data_root, load_dataset, to_input
from softmax_fused.training.data.pictures import Picture
from softmax_fused.training.errors import LabError
from softmax_fused.training.models.evaluation import predict_classes, read_parameters
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.losses import class_logits
from softmax_fused.training.ranks.devices import pick_device
from softmax_fused.training.report.figures import draw_fit, draw_gallery, run_title
from softmax_fused.training.report.records import Metrics
from softmax_fused.training.runs.checkpoint import checkpoint_file, load_checkpoint
from softmax_fused.training.runs.restore import restore_config, restore_metrics, restore_model


@dataclass(frozen=True)
class Trained:
    """A trained model, its settings and the record of its run."""

    learner: Learner
    config: TrainConfig
    metrics: Metrics

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes; none for a regression."""
        names: list[str] = self.metrics["dataset"]["classes"]
        return names


def load_trained(path: Path, device: str = "auto") -> Trained:
    """Load a checkpoint, or that of a run folder.

    Raises:
        LabError: if it cannot be read.
    """
    path = checkpoint_file(path)
    state = load_checkpoint(path)
    config = restore_config(path, state)
    metrics = restore_metrics(path, state, config)
    learner = learner_for(config, len(metrics["dataset"]["classes"]), pick_device(device))
    restore_model(path, learner, state)
    learner.model.eval()
    return Trained(learner, config, metrics)


def check_classifier(trained: Trained) -> None:
    """Raise `LabError` if the model is a regression, which has no classes to name."""
    if not trained.classes:
        model, data = trained.config.model, trained.config.dataset
        raise LabError(f"expected the checkpoint of a classifier, got {model} on {data}; leave the pictures out")


@torch.no_grad()
def classify(trained: Trained, picture: Picture, top: int) -> list[tuple[str, float]]:
    """Return the `top` most probable classes with their probabilities, in descending order."""
    images = to_input(picture.pixels.unsqueeze(0).to(trained.learner.device))
    logits = class_logits(trained.learner.logits(images))
    probabilities, classes = logits.softmax(dim=1)[0].topk(min(top, len(trained.classes)))
    return [(trained.classes[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def draw_test_set(trained: Trained, path: Path, data_dir: str | None = None) -> None:
    """Write a figure of predictions on the test set, right and wrong ones, or of a regression's fit."""
    data = load_dataset(trained.config.dataset, data_root(data_dir or trained.config.data_dir))
    test = data.test.to(trained.learner.device)
    if trained.classes:
        predicted = predict_classes(trained.learner, test)
        draw_gallery(path, run_title(trained.metrics), trained.classes, test, predicted)
    else:
        weights, bias = read_parameters(trained.learner, test.images)  # the checkpoint before any epoch records none
        draw_fit(path, {**trained.metrics, "parameters": {"weights": weights, "bias": bias}}, test)
