"""A claim on a run folder: of several processes that are told to write into it, one does."""

import errno
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from softmax_fused.training.errors import LabError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network file systems: no claim there


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, until the block or this process ends.

    The operating system holds the lock and drops it when its process ends, however it ends: a file that is left
    behind claims nothing. Process ids would not do, since they are used again and mean nothing on another machine.

    Raises:
        LabError: if a process that is still running has claimed it.
        OSError: if the folder cannot be written to.
    """
    path = folder / LOCK
    file = _locked(path)
    if file is None:
        raise LabError(
            f"expected a folder in which nothing else trains, got {folder}, in which another process does; "
            "wait until that ends, or choose another folder"
        )
    try:
        yield
    finally:
        _release(path, file)


def _locked(path: Path) -> BinaryIO | None:
    """Return the lock's file, open and locked; None if another process has locked it."""
    while True:
        file = path.open("ab")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in TAKEN:
                file.close()
                return None
            if error.errno not in CANNOT_LOCK:
                file.close()
                raise
        if _is_at(path, file):
            _close_in_children(file)
            return file
        file.close()  # its owner removed it between the opening and the locking


def _is_at(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _release(path: Path, file: BinaryIO) -> None:
    """Remove the file while it is locked: afterwards it may be another's. Windows removes no file that is open."""
    if sys.platform == "win32":
        file.close()
        with suppress(OSError):
            path.unlink()
    else:
        with suppress(OSError):
            path.unlink()
        file.close()


if sys.platform == "win32":

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _close_in_children(file: BinaryIO) -> None:
        """Do nothing: children of Windows inherit no files."""

else:

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close_in_children(file: BinaryIO) -> None:
        """Close it in forked DataLoader workers, which may outlive a killed parent and would keep its claim."""
        reference = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: _close(reference))

    def _close(reference: Callable[[], BinaryIO | None]) -> None:
        file = reference()
        if file is not None:
            file.close()
