"""Predictions on users' own pictures, and the gallery of the test set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from softmax_fused.training import predict as predict_module
from softmax_fused.training.data import pictures
from softmax_fused.training.data.datasets import Split
from softmax_fused.training.data.pictures import read_picture
from softmax_fused.training.errors import LabError
from softmax_fused.training.predict import classify, load_trained
from softmax_fused.training.report import figures
from softmax_fused.training.report.figures import draw_gallery
from softmax_fused.training.runs.run import train
from tests.lab import QUIET, SMALL, digits, run_cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 10 epochs on digits."""
    from dataclasses import replace

    return train(replace(SMALL, epochs=10), output=tmp_path_factory.mktemp("run"), reporter=QUIET)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    """A large grey picture of a test digit, light on dark."""
    test = digits().test
    row = int((test.labels == 0).nonzero()[0])
    return Image.fromarray(test.images[row].numpy()).resize((280, 280), Image.Resampling.BICUBIC)


def as_rgba(image: Image.Image) -> Image.Image:
    """Black ink on transparent paper."""
    ink = Image.new("L", image.size, 0)
    return Image.merge("RGBA", (ink, ink, ink, image))


@pytest.mark.parametrize(
    ("convert", "inverted"),
    [
        (lambda image: image, False),
        (lambda image: image.convert("RGB"), False),
        (lambda image: image.point(lambda value: 255 - value).convert("RGB"), True),
        (lambda image: image.point(lambda value: 255 - value).convert("P"), True),
        (as_rgba, True),
        (lambda image: Image.fromarray(np.asarray(image).astype(np.uint16) * 257), False),
        (lambda image: image.crop((40, 0, 240, 280)), False),
        (lambda image: image.resize((31, 31)), False),
    ],
    ids=["grey", "rgb", "dark on light", "palette", "transparent", "16 bit", "portrait", "small"],
)
def test_a_digit_is_recognised_in_any_kind_of_picture(
    tmp_path: Path,
    trained: Path,
    zero: Image.Image,
    convert: object,
    inverted: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = convert(zero)
    path = tmp_path / "zero.png"
    picture.save(path)
    read = read_picture(path)
    assert read.pixels.shape == (28, 28)
    assert read.pixels.dtype == torch.uint8
    assert read.inverted is inverted
    outcome = run_cli(capsys, "predict", "--checkpoint", trained / "checkpoint.pt", "--device", "cpu", path)
    size = f"{picture.size[0]}x{picture.size[1]}"
    heading, first, *rest = outcome.out.splitlines()
    assert heading == f"{path} ({size}{', inverted because its border is bright' if inverted else ''})"
    assert first.split()[1] == "0"
    assert len(rest) == 2
    assert outcome.status == 0


def of_values(low: float, high: float, kind: str) -> Callable[[Image.Image], Image.Image]:
    """Return a conversion of a picture to values from `low` to `high`."""

    def convert(image: Image.Image) -> Image.Image:
        shares = np.asarray(image, dtype=np.float64)
        shares = (shares - shares.min()) / (shares.max() - shares.min())
        return Image.fromarray((low + shares * (high - low)).astype(kind))

    return convert


@pytest.mark.parametrize(
    ("values", "guess"),
    [
        ((0, 1, "f4"), "values from 0 to 1 on a scale of 1"),
        ((-0.05, 1.05, "f4"), "values from -0.05 to 1.05 on a scale of 1"),
        ((0, 255, "f4"), "values from 0 to 255 on a scale of 255"),
        ((-1, 1, "f4"), "values from -1 to 1 stretched from black to white"),
        ((0, 7, "f4"), "values from 0 to 7 stretched from black to white"),
        ((0, 4095, "u2"), "values from 0 to 4095 on a scale of 4095"),
        ((0, 1000, "u2"), "values from 0 to 1000 on a scale of 1023"),
        ((0, 16000, "u2"), "values from 0 to 16000 on a scale of 16383"),
        ((0, 255, "u2"), "values from 0 to 255 on a scale of 255"),
        ((0, 65535, "u2"), ""),
        ((-500, 90000, "i4"), "values from -500 to 90000 stretched from black to white"),
    ],
    ids=str,
)
def test_the_scale_of_values_is_guessed(
    tmp_path: Path, zero: Image.Image, values: tuple[float, float, str], guess: str
) -> None:
    of_values(0, 255, "u1")(zero).save(tmp_path / "plain.png")
    of_values(*values)(zero).save(tmp_path / "image.tif")
    read = read_picture(tmp_path / "image.tif")
    assert read.description == f"280x280{', ' * bool(guess)}{guess}"
    distance = (read.pixels.int() - read_picture(tmp_path / "plain.png").pixels.int()).abs().max()
    assert distance <= 12  # of 255: the white of the guessed scale may be above the largest value


def with_alpha(ink: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.merge("LA", (Image.new("L", image.size, ink), image))


def with_margin(image: Image.Image) -> Image.Image:
    """A picture with a background of its own inside a transparent margin."""
    margin = Image.new("L", image.size, 0)
    margin.paste(255, (20, 20, 260, 260))
    return Image.merge("RGBA", (image, image, image, margin))


BLACK, BRIGHT_BORDER = "transparency taken for black", "inverted because its border is bright"


@pytest.mark.parametrize(
    ("convert", "guesses"),
    [
        (with_alpha(255), BLACK),
        (with_alpha(0), BRIGHT_BORDER),
        (lambda image: with_alpha(255)(image).convert("RGBA").quantize(16), BLACK),
        (with_margin, BLACK),
        (lambda image: with_margin(ImageOps.invert(image)), BRIGHT_BORDER),
        (lambda image: image.point(lambda value: 255 * (value > 127)).convert("1"), ""),
        (
            lambda image: Image.fromarray((np.asarray(image) > 127).astype(np.uint8)),
            "values from 0 to 1 on a scale of 1",
        ),
        (lambda image: ImageOps.invert(image).convert("RGB").convert("CMYK"), BRIGHT_BORDER),
    ],
    ids=["white ink", "black ink", "palette", "dark sticker", "light sticker", "1 bit", "mask", "CMYK"],
)
def test_strokes_contrast_with_any_kind_of_background(
    tmp_path: Path, trained: Path, zero: Image.Image, convert: Callable[[Image.Image], Image.Image], guesses: str
) -> None:
    picture = convert(zero)
    path = tmp_path / ("zero.tif" if picture.mode == "CMYK" else "zero.png")
    picture.save(path)
    read = read_picture(path)
    assert read.description == f"280x280{', ' * bool(guesses)}{guesses}"
    assert classify(load_trained(trained, "cpu"), read, 1)[0][0] == "0"


def test_a_camera_held_sideways_is_turned_back(tmp_path: Path, zero: Image.Image) -> None:
    sideways = zero.crop((40, 0, 240, 280)).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x112] = 6  # the top is on the right
    sideways.save(tmp_path / "turned.png", exif=exif)
    zero.crop((40, 0, 240, 280)).save(tmp_path / "upright.png")
    read = read_picture(tmp_path / "turned.png")
    assert read.size == (200, 280)
    assert torch.equal(read.pixels, read_picture(tmp_path / "upright.png").pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2), (1000, 700), (1, 9000)])
def test_odd_sizes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size, 10).save(tmp_path / "image.png")
    read = read_picture(tmp_path / "image.png")
    assert read.pixels.unique().tolist() == [10]
    assert read.description == f"{size[0]}x{size[1]}, blank: the answer means nothing"


def test_pictures_without_contrast_are_reported(tmp_path: Path) -> None:
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").description.endswith("blank: the answer means nothing")
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 16).save(tmp_path / "dark.png")
    assert read_picture(tmp_path / "dark.png").description == "16x16, hardly any contrast: greys from 0 to 15 of 255"


def test_large_pictures_are_averaged_and_too_large_ones_refused(
    tmp_path: Path, zero: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_values(0, 4095, "u2")(zero).save(tmp_path / "zero.png")
    whole = read_picture(tmp_path / "zero.png")
    monkeypatch.setattr(pictures, "WORKING_SIDE", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # Pillow warns from here on, and refuses twice as many
    read = read_picture(tmp_path / "zero.png")
    assert read.description == whole.description
    assert (read.pixels.int() - whole.pixels.int()).abs().float().mean() < 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    size = r"\(Image size \(78400 pixels\) exceeds limit of 60000 pixels\); make it smaller$"
    with pytest.raises(LabError, match=rf"^expected an image in .*zero.png, got too large a one {size}"):
        read_picture(tmp_path / "zero.png")


def test_top_and_several_pictures(
    tmp_path: Path, trained: Path, zero: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    zero.save(tmp_path / "a.jpg")
    zero.save(tmp_path / "b.png")
    outcome = run_cli(capsys, "predict", "--checkpoint", trained, "--top", 99, tmp_path / "a.jpg", tmp_path / "b.png")
    lines = outcome.out.splitlines()
    assert len(lines) == 22
    shares = [float(line.split()[0].rstrip("%")) for line in lines[1:11]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.pictures
def test_without_pictures_a_gallery_is_drawn(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_cli(capsys, "predict", "--checkpoint", trained / "checkpoint.pt")
    assert outcome.out == f"{trained / 'gallery.png'}\n"
    outcome = run_cli(capsys, "predict", "--checkpoint", trained / "checkpoint.pt", "--output", tmp_path / "own.png")
    with Image.open(tmp_path / "own.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("right", "wrong", "accuracy", "choice"),
    [
        (8331, 1669, "8,331 of 10,000 images classified right, an accuracy of 83.31%",
         "the first 16 of 8,331 right, then the first 16 of 1,669 wrong; 16 of these 32 right, by choice"),
        (90, 3, "90 of 93 images classified right, an accuracy of 96.77%",
         "the first 16 of 90 right, then all 3 wrong; 16 of these 19 right, by choice"),
        (1, 0, "1 of 1 image classified right, an accuracy of 100.00%",
         "the only one right, then none wrong; 1 of these 1 right, by choice"),
    ],
)  # fmt: skip
def test_a_gallery_says_how_its_images_were_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: int, wrong: int, accuracy: str, choice: str
) -> None:
    titles = []
    monkeypatch.setattr(figures, "plot_predictions", lambda title, *_: titles.append(title))
    monkeypatch.setattr(figures, "to_png", lambda _: b"")
    labels = torch.zeros(right + wrong, dtype=torch.long)
    test = Split(torch.zeros(right + wrong, 1, 1, dtype=torch.uint8), labels)
    predicted = torch.cat([labels[:right], labels[right:] + 1])
    draw_gallery(tmp_path / "gallery.png", "softmax", ["a", "b"], test, predicted)
    assert titles == [f"softmax\ntest set: {accuracy}\nshown, in the test set's order: {choice}"]


def test_a_bad_picture_does_not_lose_the_answers_of_the_others(
    tmp_path: Path, trained: Path, zero: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [tmp_path / name for name in ("first.png", "absent.png", "text.png", "last.png")]
    zero.save(names[0])
    zero.save(names[3])
    names[2].write_text("text")
    outcome = run_cli(capsys, "predict", "--checkpoint", trained, "--top", 1, *names)
    assert outcome.status == 1
    assert [line for line in outcome.out.splitlines() if "x" in line] == [f"{names[i]} (280x280)" for i in (0, 3)]
    absent, text = outcome.err.splitlines()
    assert absent.startswith(f"error: expected an image in {names[1]}, got No such file or directory")
    assert text.startswith(f"error: expected an image in {names[2]}, got no image that Pillow can read")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.png", b"text", "no image that Pillow can read; give a PNG or JPEG file"),
        ("empty.png", b"", "an empty file; give another"),
        ("absent.png", None, "No such file or directory; check the path"),
        (".", None, "Is a directory; check the path"),
        ("cut.png", slice(60), r"one that cannot be read \(.*truncated.*\); save it anew as PNG or JPEG"),
        ("half.png", slice(300), r"one that cannot be read \(image file is truncated.*\); save it anew as PNG or JPEG"),
    ],
)
def test_a_file_that_is_no_picture_is_named_with_the_reason(
    tmp_path: Path, zero: Image.Image, name: str, content: bytes | slice | None, reason: str
) -> None:
    path = tmp_path / name
    if isinstance(content, slice):
        zero.save(path)
        content = path.read_bytes()[content]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=rf"^expected an image in {path}, got {reason}$"):
        read_picture(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(LabError, match=r"got one that cannot be read \(values that are not finite\)"):
        read_picture(tmp_path / "nan.tif")


def test_predictions_are_those_of_training(trained: Path) -> None:
    restored = load_trained(trained, "cpu")
    test = digits().test
    predicted = predict_module.predict_classes(restored.learner, test)
    assert int((predicted == test.labels).sum()) / len(test) == restored.metrics["test_accuracy"][-1]
