"""Shared by the tests of the lab: small runs on digits, a generated Fashion-MNIST, the command line in-process."""

import gzip
import hashlib
import json
import os
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import FashionMNIST

from softmax_fused.cli import main
from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data import idx
from softmax_fused.training.data.datasets import ImageData, load_dataset
from softmax_fused.training.report.console import Reporter
from softmax_fused.training.runs.checkpoint import load_checkpoint

SMALL = TrainConfig(dataset="digits", loss="torch", epochs=2, device="cpu")

QUIET = Reporter(quiet=True)

real_data = pytest.mark.skipif(
    not (Path(os.environ.get("SOFTMAX_FUSED_DATA", "/nowhere")) / "FashionMNIST").is_dir(),
    reason="needs Fashion-MNIST under $SOFTMAX_FUSED_DATA",
)


@cache
def digits() -> ImageData:
    return load_dataset("digits", Path())


def few_digits() -> ImageData:
    return digits().head(300, 100)


class Outcome:
    """What a command printed and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def error(self) -> str:
        """The one line of an error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return Outcome(int(stop.value.code or 0), *capsys.readouterr())


def idx_bytes(array: torch.Tensor) -> bytes:
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    return header + bytes(array.flatten().tolist())


def md5_of(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def fake_fashion(folder: Path, monkeypatch: pytest.MonkeyPatch, train: int = 40, test: int = 20) -> Path:
    """Write a torchvision root with random images, and make torchvision expect their checksums and have no mirror."""
    generator = torch.Generator().manual_seed(1)
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for part, size in (("train", train), ("t10k", test)):
        images = torch.randint(256, (size, 28, 28), generator=generator)
        for name, array in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", torch.arange(size) % 10),
        ):
            plain = idx_bytes(array)
            packed = gzip.compress(plain, mtime=0)
            (raw / f"{name}.gz").write_bytes(packed)
            resources.append((f"{name}.gz", md5_of(packed)))
            monkeypatch.setitem(idx.UNPACKED_MD5, md5_of(packed), md5_of(plain))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    return folder


def subprocess_arguments(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "softmax_fused", *map(str, arguments)]


def subprocess_environment(**extra: str) -> dict[str, str]:
    """Return the environment of a notebook's cell, whose MPLBACKEND may be missing in the Python started there."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "not-installed", **extra}


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def assert_consistent(folder: Path, epochs: int) -> None:
    """Assert that checkpoint and metrics.json are of the same epoch, and that no temporary files are left."""
    assert metrics_of(folder) == load_checkpoint(folder)["metrics"]
    assert len(metrics_of(folder)["train_loss"]) == epochs
    assert not list(folder.glob(".*"))
