"""The IDX files of the MNIST family: found or downloaded, verified, decoded.

torchvision provides the names of the files, their md5 and their mirrors. It verifies a file right after the download,
unpacks it, and from then on reads the unpacked file unverified. Here every file is verified each time it is read,
packed or not, and nothing is unpacked on disk, so that a read-only data folder works.
"""

import gzip
import hashlib
import math
import shutil
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import torch

from softmax_fused.training.errors import LabError, MissingDataError

if TYPE_CHECKING:
    from torch import Tensor

GZIP = b"\x1f\x8b"  # the first bytes of every gzip file
TIMEOUT = 20.0  # seconds without a byte before a mirror counts as unreachable

# The md5 of each unpacked file, by the md5 of its .gz in torchvision's list.
UNPACKED_MD5 = {
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "25c81989df183df01b3e8a0aad5dffbe": "9018921c3c673c538a1fc5bad174d6f9",
    "bef4ecab320f06d8554ea6380940ec79": "8181f5470baa50b63fa0f6fddb340f0a",
    "bb300cfdad3c16e7a12a480ee83cd310": "15d484375f8d13e6eb1aabb0c3f46965",
    "f68b3c2dcbeaaa9fbdd348bbdeb94873": "6bbc9ace898e44ae57da46a324031adb",
    "d53e105ee54ea40749a09fcbcd1e9432": "a25bea736e30d166cdddb491f175f624",
    "9fb629c4189551a2d022fa330f9573f3": "2646ac647ad5339dbf082846283269ea",
    "ec29112dd5afa0611ce80d1b7f02629c": "27ae3e4e09519cfbb04c329615203637",
}


def read_folder(root: Path, family: Any) -> "dict[str, Tensor]":
    """Read the four files of a data set.

    Args:
        root: A folder laid out as torchvision does: the files are in ``root/<class name>/raw``.
        family: torchvision's class, ``FashionMNIST`` or ``MNIST``.

    Returns:
        The uint8 tensor of each file, by its name without ``.gz``.

    Raises:
        MissingDataError: if files are absent and cannot be downloaded.
        LabError: if a file is not the published one.
    """
    folder = root / family.__name__ / "raw"
    files = {name: md5 for name, md5 in family.resources}  # noqa: C416 - torchvision's list is untyped
    absent = [name for name in files if not (folder / name).is_file() and not _unpacked(folder / name).is_file()]
    if absent:
        _download(folder, {name: files[name] for name in absent}, family.mirrors)
    return {_unpacked(Path(name)).name: decode(_read(folder / name, md5)) for name, md5 in files.items()}


def decode(data: bytes) -> "Tensor":
    """Return the array in the bytes of an IDX file of type uint8.

    The format: two zero bytes, the type (8), the number of dimensions, their sizes as big-endian uint32, the elements.
    """
    sizes = struct.unpack_from(f">{data[3]}I", data, 4)
    start = 4 + 4 * data[3]
    return torch.frombuffer(bytearray(data[start : start + math.prod(sizes)]), dtype=torch.uint8).view(sizes)


def _unpacked(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".gz"))


def _read(path: Path, md5: str) -> bytes:
    return _verified(path if path.is_file() else _unpacked(path), md5)


def _verified(path: Path, md5: str) -> bytes:
    """Return the unpacked content of a published file; it may be packed as published, packed anew, or unpacked.

    Args:
        path: The file.
        md5: The md5 of the packed file in torchvision's list.

    Raises:
        LabError: if the file is another one or damaged.
    """
    data = path.read_bytes()
    content = _decompressed(data)
    found = _md5(data)
    if found == md5 and content is not None:
        return content
    checksums = {found, found if content is None else _md5(content)}
    if UNPACKED_MD5.get(md5) in checksums:
        return data if content is None else content
    published = _published_files()
    others = [name for other, name in published.items() if other in checksums]
    if others:
        what = f"expected {published.get(md5, md5)} in {path}, got {others[0]}"
    else:
        what = f"expected {path} with md5 {md5}, got {found} ({len(data):,} bytes: truncated or corrupted)"
    raise LabError(f"{what}; delete it to have it downloaded again, or copy the published file there")


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _decompressed(data: bytes) -> bytes | None:
    """Return the content of a complete gzip file, None for any other file."""
    try:
        return gzip.decompress(data) if data.startswith(GZIP) else None
    except (OSError, EOFError, zlib.error):
        return None


def _published_files() -> dict[str, str]:
    """Return, by md5, the packed and unpacked files of torchvision's data sets whose files have the same names."""
    from torchvision.datasets import KMNIST, MNIST, FashionMNIST

    packed = {md5: (family, name) for family in (FashionMNIST, MNIST, KMNIST) for name, md5 in family.resources}
    unpacked = {UNPACKED_MD5[md5]: (family, name[:-3]) for md5, (family, name) in packed.items() if md5 in UNPACKED_MD5}
    return {md5: f"{family.__name__}'s {name}" for md5, (family, name) in (packed | unpacked).items()}


def _download(folder: Path, files: dict[str, str], mirrors: list[str]) -> None:
    try:
        for name, md5 in files.items():
            _download_one(folder / name, md5, mirrors)
    except (OSError, LabError) as error:  # URLError and timeouts are OSErrors too
        raise MissingDataError(
            f"expected {', '.join(files)} in {folder}, got none of these and no download ({error}); "
            f"put the files from {mirrors[0]} there, or name the folder above {folder.parent.name} with --data-dir"
        ) from error


def _download_one(path: Path, md5: str, mirrors: list[str]) -> None:
    """Download to a temporary file first, so that an interrupted download is not taken for a damaged data set."""
    partial = path.with_name(f".{path.name}.part")
    for mirror in mirrors:
        try:
            with urlopen(f"{mirror}{path.name}", timeout=TIMEOUT) as source:  # noqa: S310 - torchvision's own addresses
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            _verified(partial, md5)
            partial.replace(path)
            return
        except (OSError, LabError):  # noqa: PERF203 - one try for each mirror
            if mirror == mirrors[-1]:
                raise
        finally:
            partial.unlink(missing_ok=True)
