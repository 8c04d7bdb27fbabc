"""Users' own pictures, converted to what the models were trained on: grey, light on dark, square, 28x28."""

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

MIDDLE_GREY = 127.5  # a picture whose border is brighter is taken to have a light background
DARK, BRIGHT = 64, 191  # a picture that has pixels darker than the one and brighter than the other has two colours
WHITE_LEVELS = (1, 255, 1023, 4095, 16383, 65535)  # the value of white on a scale of 0 to 1, and of 8 to 16 bits
OVERSHOOT = 0.25  # resampling makes floats exceed black and white by up to this fraction of white
SMALLEST_INTEGER_RANGE = 16  # floats with a maximum between 1 and this are on none of the scales above
LOW_CONTRAST = 32  # of 255 greys
WORKING_SIDE = 2048  # pixels; larger pictures are averaged down to a side between one and two times as long

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """A picture converted to a model's input.

    Attributes:
        pixels: Uint8 of shape (28, 28).
        size: Width and height of the file's picture.
        inverted: Whether black and white were exchanged.
        guesses: In words, what the conversion assumed about the picture.
    """

    pixels: Tensor
    size: tuple[int, int]
    inverted: bool
    guesses: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """Return the size and the guesses in one line."""
        return ", ".join([f"{self.size[0]}x{self.size[1]}", *self.guesses])


def read_picture(path: Path) -> Picture:
    """Read a picture, make its background dark as in the training sets, pad it to a square and scale it to 28x28.

    Raises:
        LabError: if it cannot be read.
    """
    grey, size, guesses = _read_grey(path)
    values = np.asarray(grey)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    inverted = bool(border.mean() > MIDDLE_GREY)
    guesses += _judge_contrast(values)
    if inverted:
        guesses.append("inverted because its border is bright")
        grey, border = ImageOps.invert(grey), 255 - border
    square = ImageOps.pad(grey, (max(grey.size),) * 2, color=int(np.median(border)))
    small = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    return Picture(torch.from_numpy(np.array(small)), size, inverted, tuple(guesses))


def _read_grey(path: Path) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """Return the picture in 8-bit grey, its size, and the guesses made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # Pillow refuses twice the size of its warning
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                values, guesses = _to_grey(image)
                return Image.fromarray(values), image.size, guesses
    except Exception as error:  # Pillow's decoders raise many exceptions on damaged files
        raise LabError(f"expected an image in {path}, got {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Return why a picture could not be read, and what to do about it."""
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
    """Return 8-bit greys, and the guesses made."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(np.asarray(image))
    if not image.has_transparency_data:
        return _scaled(np.asarray(image.convert("L")))
    image = image.convert("RGBA")
    grey, alpha = image.convert("L"), image.getchannel("A")
    background = _choose_background(np.asarray(grey)[np.asarray(alpha) > MIDDLE_GREY])
    values, guesses = _scaled(np.asarray(Image.composite(grey, Image.new("L", grey.size, background), alpha)))
    return values, guesses if background else ["transparency taken for black", *guesses]


def _choose_background(visible: Numbers) -> int:
    """Return the grey to put behind transparent pixels, given the greys of the visible ones.

    Visible pixels of one colour are strokes, and the background is the opposite of their colour. Visible pixels of two
    colours include a background, which is the colour of most of them; the transparent pixels continue it.
    """
    cumulative = np.bincount(visible, minlength=256).cumsum() / max(1, len(visible))
    low, median, high = np.searchsorted(cumulative, (0.05, 0.5, 0.95))
    has_background = low < DARK and high > BRIGHT
    return 255 if (median > MIDDLE_GREY) == has_background else 0


def _scaled(values: Numbers) -> tuple[Numbers, list[str]]:
    """Return values as 8-bit greys, and the guesses made.

    White is the smallest of `WHITE_LEVELS` that the values do not exceed. Values that fit no such scale are stretched
    from black to white.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("values that are not finite")
    floats = values.dtype.kind == "f"
    usual_white = 0 if floats else 255 if values.dtype.itemsize == 1 else WHITE_LEVELS[-1]
    values = _reduced(values)
    overshoot = OVERSHOOT if floats else 0.0
    white = next((white for white in WHITE_LEVELS if high <= white * (1 + overshoot)), None)
    if white is None or low < -overshoot * high or (floats and 1 + overshoot < high < SMALLEST_INTEGER_RANGE):
        guesses = [f"values from {low:g} to {high:g} stretched from black to white"]
        return _as_bytes((values - low) * (255 / ((high - low) or 1))), guesses
    guesses = [f"values from {low:g} to {high:g} on a scale of {white}"] * (white != usual_white and high > 0)
    return _as_bytes(values * (255 / white)), guesses


def _as_bytes(values: Numbers) -> Numbers:
    greys: Numbers = values.clip(0, 255).round().astype(np.uint8)
    return greys


def _reduced(values: Numbers) -> Numbers:
    """Return the averages over squares of pixels where the picture is large, the values as they are elsewhere."""
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
    return [f"hardly any contrast: greys from {low} to {high} of 255"] if high - low < LOW_CONTRAST else []
