"""Data sets: how they are found, verified, downloaded, decoded, and replaced by digits."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST, FashionMNIST

from softmax_fused.training.data import idx
from softmax_fused.training.data.datasets import data_root, load_dataset
from softmax_fused.training.data.idx import decode
from softmax_fused.training.errors import LabError, MissingDataError, UsageError
from tests.lab import digits, fake_fashion, idx_bytes, md5_of, real_data

IMAGES = "FashionMNIST/raw/train-images-idx3-ubyte"


def test_idx_files_decode_to_the_array_they_hold() -> None:
    array = torch.arange(24).view(2, 3, 4)
    assert torch.equal(decode(idx_bytes(array)), array.to(torch.uint8))


def test_packed_files_are_read_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_fashion(tmp_path, monkeypatch)
    before = sorted(root.rglob("*"))
    data = load_dataset("fashion-mnist", root)
    assert data.train.images.shape == (40, 28, 28)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.tolist() == [i % 10 for i in range(40)]
    assert len(data.test) == 20
    assert data.classes[9] == "Ankle boot"
    assert data.fallback is None
    assert sorted(root.rglob("*")) == before


def test_unpacked_files_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_fashion(tmp_path, monkeypatch)
    packed = load_dataset("fashion-mnist", root)
    for path in root.rglob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    unpacked = load_dataset("fashion-mnist", root)
    assert torch.equal(unpacked.train.images, packed.train.images)
    assert torch.equal(unpacked.test.labels, packed.test.labels)


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str) -> None:
    root = fake_fashion(tmp_path, monkeypatch)
    path = root / f"{IMAGES}{suffix}"
    if not suffix:
        path.write_bytes(gzip.decompress((root / f"{IMAGES}.gz").read_bytes()))
        (root / f"{IMAGES}.gz").unlink()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-7], "corrupted": data, "empty": b""}[damage])
    with pytest.raises(LabError, match=r"truncated or corrupted\); delete it") as error:
        load_dataset("fashion-mnist", root, fallback=True)  # digits replace absent files, not damaged ones
    assert str(path) in str(error.value)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("other", "name"), [("MNIST", "train-images-idx3-ubyte"), ("FashionMNIST", "train-labels-idx1-ubyte")]
)
def test_a_file_of_another_data_set_or_part_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, name: str, packed: bool
) -> None:
    root = fake_fashion(tmp_path, monkeypatch)
    plain = idx_bytes(torch.arange(6).view(1, 2, 3))
    zipped = gzip.compress(plain, mtime=1)
    monkeypatch.setitem(idx.UNPACKED_MD5, md5_of(zipped), md5_of(plain))
    if other == "MNIST":
        monkeypatch.setattr(MNIST, "resources", [(f"{name}.gz", md5_of(zipped))])
    else:
        zipped = (root / f"FashionMNIST/raw/{name}.gz").read_bytes()
        plain = gzip.decompress(zipped)
    path = root / (f"{IMAGES}.gz" if packed else IMAGES)
    (root / f"{IMAGES}.gz").unlink()
    path.write_bytes(zipped if packed else plain)
    with pytest.raises(LabError) as error:
        load_dataset("fashion-mnist", root, fallback=True)
    assert str(error.value) == (
        f"expected FashionMNIST's train-images-idx3-ubyte.gz in {path}, got {other}'s {name}{'.gz' * packed}; "
        "delete it to have it downloaded again, or copy the published file there"
    )


@pytest.mark.parametrize("pack", [lambda plain: gzip.compress(plain, mtime=2), lambda plain: plain])
def test_a_file_packed_anew_or_not_at_all_is_verified_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    path = fake_fashion(tmp_path, monkeypatch) / f"{IMAGES}.gz"
    path.write_bytes(pack(gzip.decompress(path.read_bytes())))
    assert len(load_dataset("fashion-mnist", tmp_path).train) == 40


def test_absent_files_are_listed_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_fashion(tmp_path, monkeypatch)
    (root / f"{IMAGES}.gz").unlink()
    with pytest.raises(MissingDataError) as error:
        load_dataset("fashion-mnist", root)
    message = str(error.value)
    assert message.startswith(f"expected train-images-idx3-ubyte.gz in {root / 'FashionMNIST' / 'raw'}, got none of")
    assert "put the files from http://127.0.0.1:9/ there" in message
    assert "--data-dir" in message


def test_digits_replace_files_that_are_absent_and_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_fashion(tmp_path / "elsewhere", monkeypatch)
    data = load_dataset("fashion-mnist", tmp_path / "empty", fallback=True)
    assert data.name == "digits"
    assert "train-images-idx3-ubyte.gz" in str(data.fallback)
    assert not (tmp_path / "empty").exists()


def test_absent_files_are_downloaded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = fake_fashion(tmp_path / "mirror", monkeypatch) / "FashionMNIST" / "raw"
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/", f"{mirror.as_uri()}/"])
    root = tmp_path / "root"
    data = load_dataset("fashion-mnist", root)
    assert len(data.train) == 40
    assert {path.name for path in (root / "FashionMNIST" / "raw").iterdir()} == {path.name for path in mirror.iterdir()}
    shutil.rmtree(mirror)
    assert torch.equal(load_dataset("fashion-mnist", root).train.images, data.train.images)


def test_a_bad_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = fake_fashion(tmp_path / "mirror", monkeypatch) / "FashionMNIST" / "raw"
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{mirror.as_uri()}/"])
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(b"half a fi")
    with pytest.raises(MissingDataError, match="truncated or corrupted"):
        load_dataset("fashion-mnist", tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*ubyte*"))


def test_digits_are_upscaled_whole_and_split_without_overlap() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape[1:] == (28, 28)
    assert int(data.train.images.max()) == 255
    assert data.train.labels.bincount().min() > 100
    assert data.test.labels.bincount().min() > 20


def test_head_takes_the_first_images() -> None:
    data = digits().head(7, 3)
    assert (len(data.train), len(data.test)) == (7, 3)
    assert torch.equal(data.train.images, digits().train.images[:7])
    with pytest.raises(UsageError, match="expected a size from 1 to 1437, got 2000"):
        digits().head(2000, 1)


def test_the_root_is_the_option_else_the_variable_else_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTMAX_FUSED_DATA", "/variable")
    assert data_root("option") == tmp_path / "option"
    assert data_root() == Path("/variable")
    monkeypatch.delenv("SOFTMAX_FUSED_DATA")
    assert "softmax-fused" in data_root().parts


@real_data
def test_the_published_files_of_the_other_data_set_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "FashionMNIST").symlink_to(data_root() / "MNIST")
    with pytest.raises(LabError, match=r"expected FashionMNIST's train-images-idx3.* in .*, got MNIST's train-images"):
        load_dataset("fashion-mnist", tmp_path)


@real_data
@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_the_published_files_are_read(name: str) -> None:
    try:
        data = load_dataset(name, data_root())
    except MissingDataError as missing:
        pytest.skip(str(missing))
    assert (len(data.train), len(data.test), len(data.classes)) == (60_000, 10_000, 10)
    assert data.test.images.shape == (10_000, 28, 28)
    if name == "fashion-mnist":
        assert data.train.labels.bincount().tolist() == [6000] * 10
