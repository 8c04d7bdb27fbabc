"""Ctrl-C and SIGTERM as one exception, which never arrives in the middle of writing an epoch."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from softmax_fused.training.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_raise(*, once: bool = False) -> Iterator[None]:
    """Turn both signals into `Stopped`; one that is ignored on entry, as under nohup, stays ignored.

    With `once` the first is the last to be heard: torchrun passes on what its ranks may have got already.
    """

    def stop(signum: int, _: FrameType | None) -> None:
        if once:
            ignore_signals()
        raise Stopped(status=128 + signum)

    with _handler(stop):
        yield


def ignore_signals() -> None:
    """Ignore both from now on, to the end of the process."""
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay both signals until the block is done."""
    arrived: list[int] = []
    with _handler(lambda signum, _: arrived.append(signum)):
        yield
    if arrived:
        signal.raise_signal(arrived[0])


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set, and gets, signals
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {signum: known for signum, known in before.items() if known not in (None, signal.SIG_IGN)}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, known in before.items():
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, known)
