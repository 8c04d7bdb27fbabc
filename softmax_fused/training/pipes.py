"""Output whose reader has gone, as behind ``| head -1``: the command ends quietly.

Tools in C die of SIGPIPE there, which a shell reports as 128 + 13. Python ignores that signal, and its documentation
advises against the default action, since a lost connection between ranks would then kill the process too. So the
failed write raises, clean-up runs, and the status is the one that a shell would report.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from softmax_fused.training.errors import OutputClosed

CLOSED = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Exit with `OutputClosed.status` when something is printed that nobody reads any more."""
    with redirect_stdout(_watched(sys.stdout)), redirect_stderr(_watched(sys.stderr)):
        try:
            yield
        except OutputClosed:
            sys.exit(OutputClosed.status)


class _Watched:
    """A stream whose failed writes raise `OutputClosed`: rich and click each have an answer of their own to OSError."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        count: int = self._noticing(lambda: self.stream.write(text))
        return count

    def flush(self) -> None:
        self._noticing(self.stream.flush)

    def _noticing(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            _discard(self.stream)
            raise OutputClosed from None


def _watched(stream: TextIO | None) -> TextIO:
    """Return the stream watched; it is None where the process was started without one."""
    return cast("TextIO", stream and _Watched(stream))


def _discard(stream: TextIO) -> None:
    """Let what is still in the stream's buffer go nowhere: Python would complain of it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # not every stream has a descriptor
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
