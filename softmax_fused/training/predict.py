"""A trained model on somebody's own pictures, or on the test set."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from softmax_fused.training.checkpoint import load_checkpoint
from softmax_fused.training.config import TrainConfig, pick_device
from softmax_fused.training.data import SIDE, data_root, load_dataset, to_input
from softmax_fused.training.errors import LabError
from softmax_fused.training.figures import run_title, write_fit, write_gallery
from softmax_fused.training.learner import Learner, learner_for
from softmax_fused.training.loop import predict_classes
from softmax_fused.training.losses import class_scores
from softmax_fused.training.record import Metrics

BRIGHT = 127.5  # a border lighter than this is taken for a light background
LARGEST_16_BIT = 65535


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


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, uint8 of shape (28, 28), and what was done to it."""

    pixels: Tensor
    size: tuple[int, int]
    inverted: bool


def load_trained(path: Path, device: str = "auto") -> Trained:
    """Load a checkpoint, or that of a run folder.

    Raises:
        LabError: if it cannot be read.
    """
    state = load_checkpoint(path)
    config = TrainConfig(**state["config"])
    learner = learner_for(config, len(state["metrics"]["dataset"]["classes"]), pick_device(device))
    learner.model.load_state_dict(state["model"])
    learner.model.eval()
    return Trained(learner, config, state["metrics"])


def read_picture(path: Path) -> Picture:
    """Read any image: grey, background dark as in the training sets, padded to a square, 28x28.

    Raises:
        LabError: if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            grey = _to_grey(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no image that Pillow can read"
        raise LabError(f"expected an image in {path}, got: {reason}; give a PNG or JPEG file") from error
    values = np.asarray(grey)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    inverted = bool(border.mean() > BRIGHT)
    if inverted:
        grey, border = ImageOps.invert(grey), 255 - border
    square = ImageOps.pad(grey, (max(grey.size),) * 2, color=int(np.median(border)))
    small = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    return Picture(torch.from_numpy(np.array(small)), grey.size, inverted)


@torch.no_grad()
def classify(trained: Trained, picture: Picture, top: int) -> list[tuple[str, float]]:
    """Return the `top` likeliest classes with their probabilities, likeliest first.

    Raises:
        LabError: if the model is no classifier.
    """
    if not trained.classes:
        model, data = trained.config.model, trained.config.dataset
        raise LabError(f"expected the checkpoint of a classifier, got {model} on {data}; leave the pictures out")
    images = to_input(picture.pixels.unsqueeze(0).to(trained.learner.device))
    scores = class_scores(trained.learner.logits(images))
    probabilities, classes = scores.softmax(dim=1)[0].topk(min(top, len(trained.classes)))
    return [(trained.classes[i], share) for i, share in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def draw_gallery(trained: Trained, path: Path, data_dir: str | None = None) -> Path:
    """Draw right and wrong predictions, or a regression's fit, of the test set that belongs to a checkpoint."""
    data = load_dataset(trained.config.dataset, data_root(data_dir or trained.config.data_dir))
    test = data.test.to(trained.learner.device)
    if not trained.classes:
        write_fit(path, trained.metrics, test)
        return path
    predicted = predict_classes(trained.learner, test)
    write_gallery(path, run_title(trained.metrics), trained.classes, test, predicted)
    return path


def _to_grey(image: Image.Image) -> Image.Image:
    """Return 8-bit grey; what is transparent becomes white, and 16-bit greys are scaled rather than cut off."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / LARGEST_16_BIT if values.max(initial=0) > 255 else 1.0
        return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")
