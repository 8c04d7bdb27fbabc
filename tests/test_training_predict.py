"""Predictions on pictures from elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softmax_fused.training import figures
from softmax_fused.training import predict as predict_module
from softmax_fused.training.data import Split
from softmax_fused.training.errors import LabError
from softmax_fused.training.figures import write_gallery
from softmax_fused.training.predict import load_trained, read_picture
from softmax_fused.training.run import train
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
def test_any_picture_of_a_digit_is_that_digit(
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


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (3, 2), (1000, 700)])
def test_odd_sizes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size, 10).save(tmp_path / "image.png")
    assert read_picture(tmp_path / "image.png").pixels.unique().tolist() == [10]


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
    write_gallery(tmp_path / "gallery.png", "softmax", ["a", "b"], test, predicted)
    assert titles == [f"softmax\ntest set: {accuracy}\nshown, in the test set's order: {choice}"]


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(LabError, match=r"expected an image in .*text.png, got: no image that Pillow can read; give a"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(LabError, match=r"expected an image in .*absent.png, got: No such file or directory"):
        read_picture(tmp_path / "absent.png")
    Image.new("L", (300, 300), 5).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(LabError, match=r"expected an image in .*cut.png"):
        read_picture(tmp_path / "cut.png")


def test_predictions_are_those_of_training(trained: Path) -> None:
    restored = load_trained(trained, "cpu")
    test = digits().test
    predicted = predict_module.predict_classes(restored.learner, test)
    assert int((predicted == test.labels).sum()) / len(test) == restored.metrics["test_accuracy"][-1]
