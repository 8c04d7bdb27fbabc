"""The lock of a run folder: one process at a time writes into it."""

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
LOCKED_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # by some network file systems


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder until the block or this process ends. On file systems without locks, the folder stays unlocked.

    The operating system holds the lock and releases it when the process ends, however that happens, so that a lock file
    left behind locks nothing. Process ids in a file would not do: systems reuse them, and other machines have others.

    Raises:
        LabError: if another process has locked it.
        OSError: if the folder cannot be written to.
    """
    path = folder / LOCK
    file = _open_locked(path)
    if file is None:
        raise LabError(
            f"expected a folder in which nothing else trains, got {folder}, in which another process does; "
            "wait until that ends, or choose another folder"
        )
    try:
        yield
    finally:
        _release(path, file)


def _open_locked(path: Path) -> BinaryIO | None:
    """Return the lock file, open and locked; None if another process has locked it."""
    while True:
        file = path.open("ab")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in LOCKED_BY_ANOTHER:
                file.close()
                return None
            if error.errno not in UNSUPPORTED:
                file.close()
                raise
        if _is_at(path, file):
            _close_in_children(file)
            return file
        file.close()  # another process removed the file between our opening and our locking it


def _is_at(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _release(path: Path, file: BinaryIO) -> None:
    """Remove the lock file while it is locked: once unlocked, another process may use it. Windows needs it closed."""
    if sys.platform == "win32":
        file.close()
    with suppress(OSError):
        path.unlink()
    file.close()


if sys.platform == "win32":

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

    def _close_in_children(file: BinaryIO) -> None:
        """Do nothing: on Windows, child processes inherit no files."""

else:

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close_in_children(file: BinaryIO) -> None:
        """Close the file in forked DataLoader workers, which may outlive a killed parent and would keep its lock."""
        reference = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: _close(reference))

    def _close(reference: Callable[[], BinaryIO | None]) -> None:
        file = reference()
        if file is not None:
            file.close()
