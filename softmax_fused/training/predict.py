"""A trained model on somebody's own pictures, or on the test set."""

from dataclasses import dataclass
from pathlib import Path

import torch

from softmax_fused.training.config import TrainConfig, pick_device
from softmax_fused.training.data.datasets import data_root, load_dataset, to_input
from softmax_fused.training.data.pictures import Picture
from softmax_fused.training.errors import LabError
from softmax_fused.training.models.evaluation import read_parameters
from softmax_fused.training.models.learner import Learner, learner_for
from softmax_fused.training.models.loop import predict_classes
from softmax_fused.training.models.losses import class_scores
from softmax_fused.training.report.figures import run_title, write_fit, write_gallery
from softmax_fused.training.runs.checkpoint import checkpoint_file, load_checkpoint
from softmax_fused.training.runs.record import Metrics
from softmax_fused.training.runs.restore import restore_config, restore_metrics, restore_model


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, ready to predict."""

    learner: Learner
    config: TrainConfig
    metrics: Metrics

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes."""
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
    """Raise `LabError` if a model has no classes to name."""
    if not trained.classes:
        model, data = trained.config.model, trained.config.dataset
        raise LabError(f"expected the checkpoint of a classifier, got {model} on {data}; leave the pictures out")


@torch.no_grad()
def classify(trained: Trained, picture: Picture, top: int) -> list[tuple[str, float]]:
    """Return the `top` likeliest classes with their probabilities, likeliest first."""
    images = to_input(picture.pixels.unsqueeze(0).to(trained.learner.device))
    scores = class_scores(trained.learner.logits(images))
    probabilities, classes = scores.softmax(dim=1)[0].topk(min(top, len(trained.classes)))
    return [(trained.classes[i], share) for i, share in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def draw_gallery(trained: Trained, path: Path, data_dir: str | None = None) -> Path:
    """Draw right and wrong predictions, or a regression's fit, of the test set that belongs to a checkpoint."""
    data = load_dataset(trained.config.dataset, data_root(data_dir or trained.config.data_dir))
    test = data.test.to(trained.learner.device)
    if not trained.classes:
        weights, bias = read_parameters(trained.learner, test.images)  # a run's first checkpoint records none
        write_fit(path, {**trained.metrics, "parameters": {"weights": weights, "bias": bias}}, test)
        return path
    predicted = predict_classes(trained.learner, test)
    write_gallery(path, run_title(trained.metrics), trained.classes, test, predicted)
    return path
