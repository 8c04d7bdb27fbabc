"""Somebody's own pictures as the models take them: grey, light on dark, square, 28x28."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from softmax_fused.training.data.datasets import SIDE
from softmax_fused.training.errors import LabError

BRIGHT = 127.5  # a border lighter than this is taken for a light background
DARK_INK, BRIGHT_INK = 64, 191  # what is drawn in both has a background of its own
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # of shares, and of 8 to 16 bits
SLACK = 0.25  # of a white of floats: resampling overshoots
UNUSUAL = 16  # floats up to here, and above 1, are on no usual scale
CONTRAST = 32  # greys of 255: a picture with fewer shows little
WORKING_SIDE = 2048  # pixels; larger pictures are averaged down to between one and two times as many

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, uint8 of shape (28, 28), its size, and in words what was guessed about it."""

    pixels: Tensor
    size: tuple[int, int]
    inverted: bool
    guesses: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """Return its size and the guesses."""
        return ", ".join([f"{self.size[0]}x{self.size[1]}", *self.guesses])


def read_picture(path: Path) -> Picture:
    """Read any image: grey, background dark as in the training sets, padded to a square, 28x28.

    Raises:
        LabError: if it cannot be read.
    """
    grey, size, guesses = _read_grey(path)
    values = np.asarray(grey)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    inverted = bool(border.mean() > BRIGHT)
    guesses += _judge_contrast(values)
    if inverted:
        guesses.append("inverted because its border is bright")
        grey, border = ImageOps.invert(grey), 255 - border
    square = ImageOps.pad(grey, (max(grey.size),) * 2, color=int(np.median(border)))
    small = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    return Picture(torch.from_numpy(np.array(small)), size, inverted, tuple(guesses))


def _read_grey(path: Path) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """Return the image in 8-bit grey, its size and what was guessed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half of its limit on it warns
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                values, guesses = _to_grey(image)
                return Image.fromarray(values), image.size, guesses
    except Exception as error:  # Pillow's decoders fail in many ways on damaged files
        raise LabError(f"expected an image in {path}, got {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Return why an image could not be read, and what to do about it."""
    if isinstance(error, UnidentifiedImageError):
        empty = path.stat().st_size == 0
        return "an empty file; give another" if empty else "no image that Pillow can read; give a PNG or JPEG file"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check the path"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large a one ({str(error).partition(', could be')[0]}); make it smaller"
    if isinstance(error, MemoryError):
        return "one that needs more memory than there is; make it smaller"
    return f"one that cannot be read ({error or type(error).__name__}); save it anew as PNG or JPEG"


def _to_grey(image: Image.Image) -> tuple[Numbers, list[str]]:
    """Return 8-bit greys, and what was guessed."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(np.asarray(image))
    if not image.has_transparency_data:
        return _scaled(np.asarray(image.convert("L")))
    image = image.convert("RGBA")
    grey, alpha = image.convert("L"), image.getchannel("A")
    paper = _paper(np.asarray(grey)[np.asarray(alpha) > BRIGHT])
    values, guesses = _scaled(np.asarray(Image.composite(grey, Image.new("L", grey.size, paper), alpha)))
    return values, guesses if paper else ["transparency taken for black", *guesses]


def _paper(visible: Numbers) -> int:
    """Return the grey to put behind transparent pixels, from the greys of the others.

    Strokes of one kind are drawn on what they stand out from. Where there are dark pixels and bright ones, the picture
    has its own background, the colour of most of them, and that goes on.
    """
    shares = np.bincount(visible, minlength=256).cumsum() / max(1, len(visible))
    low, middle, high = np.searchsorted(shares, (0.05, 0.5, 0.95))
    own_background = low < DARK_INK and high > BRIGHT_INK
    return 255 if (middle > BRIGHT) == own_background else 0


def _scaled(values: Numbers) -> tuple[Numbers, list[str]]:
    """Return values as 8-bit greys, by the smallest usual scale that has room for them; other scales are stretched."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("values that are not finite")
    floats = values.dtype.kind == "f"
    own = 0 if floats else 255 if values.dtype.itemsize == 1 else WHITES[-1]
    values = _reduced(values)
    slack = SLACK if floats else 0.0
    white = next((white for white in WHITES if high <= white * (1 + slack)), None)
    if white is None or low < -slack * high or (floats and 1 + slack < high < UNUSUAL):
        guesses = [f"values from {low:g} to {high:g} stretched from black to white"]
        return _as_bytes((values - low) * (255 / ((high - low) or 1))), guesses
    guesses = [f"values from {low:g} to {high:g} on a scale of {white}"] * (white != own and high > 0)
    return _as_bytes(values * (255 / white)), guesses


def _as_bytes(values: Numbers) -> Numbers:
    greys: Numbers = values.clip(0, 255).round().astype(np.uint8)
    return greys


def _reduced(values: Numbers) -> Numbers:
    """Return a large picture's averages over squares of pixels."""
    factor = max(values.shape) // WORKING_SIDE
    if factor < 2:
        return values
    rows, columns = (min(factor, size) for size in values.shape)
    height, width = values.shape[0] // rows, values.shape[1] // columns
    whole = values[: height * rows, : width * columns].reshape(height, rows, width, columns)
    means: Numbers = whole.mean(axis=(1, 3), dtype=np.float32)
    return means


def _judge_contrast(values: Numbers) -> list[str]:
    low, high = int(values.min()), int(values.max())
    if low == high:
        return ["blank: the answer means nothing"]
    return [f"hardly any contrast: greys from {low} to {high} of 255"] if high - low < CONTRAST else []
