"""Ctrl-C, SIGTERM and a closed output become exceptions; the two signals never interrupt the writing of an epoch.

A closed output is what ``| head -1`` leaves behind. Programs in C end there by SIGPIPE, which a shell reports as status
128 + 13. Python ignores SIGPIPE and its documentation advises against restoring the default action, because a lost
connection between ranks would then end the process too. Therefore the failed write raises `OutputClosed`, clean-up
runs, and the exit status is the one that a shell would have reported.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any, TextIO, cast

from softmax_fused.training.errors import OutputClosed, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSED_PIPE = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)


@contextmanager
def signals_as_exception(*, once: bool = False) -> Iterator[None]:
    """Raise `Stopped` on either signal. A signal that is ignored on entry, as under nohup, stays ignored.

    Args:
        once: Ignore both signals after the first. A rank of torchrun can receive the same Ctrl-C twice: from the
            terminal, and from torchrun, which passes it on.
    """

    def stop(signum: int, _: FrameType | None) -> None:
        if once:
            ignore_signals()
        raise Stopped(status=128 + signum)

    with _handler(stop):
        yield


def ignore_signals() -> None:
    """Ignore both signals until the process ends."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


@contextmanager
def signals_delayed() -> Iterator[None]:
    """Deliver signals that arrive inside the block after it."""
    arrived: list[int] = []
    with _handler(lambda signum, _: arrived.append(signum)):
        yield
    if arrived:
        signal.raise_signal(arrived[0])


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    handlers = {signum: known for signum, known in handlers.items() if known not in (None, signal.SIG_IGN)}
    try:
        for signum in handlers:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, known in handlers.items():
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, known)


@contextmanager
def exit_on_closed_output() -> Iterator[None]:
    """Exit quietly with `OutputClosed.status` when the reader of standard output or standard error has gone."""
    with redirect_stdout(_raising(sys.stdout)), redirect_stderr(_raising(sys.stderr)):
        try:
            yield
        except OutputClosed:
            sys.exit(OutputClosed.status)


class _RaisingStream:
    """A stream that raises `OutputClosed` where a write finds no reader.

    The OSError of such a write never reaches us otherwise: rich and click each catch it and act on it differently.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._closed_output_raised():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._closed_output_raised():
            self.stream.flush()

    @contextmanager
    def _closed_output_raised(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in CLOSED_PIPE:
                raise
            _discard_buffer(self.stream)
            raise OutputClosed from None


def _raising(stream: TextIO | None) -> TextIO:
    """Return the stream wrapped; it is None where the process was started without one."""
    return cast("TextIO", stream and _RaisingStream(stream))


def _discard_buffer(stream: TextIO) -> None:
    """Redirect what is left in the stream's buffer to nowhere: Python would fail to flush it at exit and print that."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # not every stream has a descriptor
        os.dup2(devnull, stream.fileno())
    os.close(devnull)
