"""Compiled code on disk, in a folder of the user: written once, read by every later process.

A file is named by a hash of all that its code depends on, so that another version, CPU or kernel looks for another
file. It appears under its name when it is complete, whoever else writes it at the same time. Without a folder that can
be written to, every process compiles for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path


def folder() -> Path:
    """Return where compiled code is kept: under NUMBA_CACHE_DIR where it is set, else where the system keeps caches."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"]) / "softmax-fused"
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        caches = Path.home() / "Library/Caches"
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "softmax-fused" / "numba"


def read(name: str) -> bytes | None:
    """Return what was written under a name; None if nothing was, or not this."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
        content = (folder() / name).read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    return None


def write(name: str, data: bytes) -> None:
    """Write it, if that is possible."""
    with contextlib.suppress(OSError, RuntimeError):
        where = folder()
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=where)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(temporary).replace(where / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
