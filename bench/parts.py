"""Parts of a long measurement, each in a process and a time of its own, all of whose results are in one JSON file.

A GPU that one part has broken serves the next: a process that accessed memory it may not has lost its GPU for good.
The file is the only channel: whoever works on it reads it, adds, and puts it back whole. A part that raises, is killed
or takes too long leaves there what it had, and the reason why there is no more.
"""

import json
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from bench.clocks import Clock
from bench.record import NO_TIME, write_json

START = "forkserver"
"""How a process begins: what all import is imported once, before there is a GPU that could not be handed on."""
LEAST_SECONDS = 3.0
"""With less a part is left out: it would not even start."""
LATE_SECONDS = 15.0
"""What the last part may take beyond the time of all."""
END_SECONDS = 5.0
"""What a process gets to end when told to."""


class Run:
    """What a part gets: the clock, the sizes to measure, and the record, which it adds to and saves."""

    def __init__(self, path: Path, clock: Clock, sizes: Any) -> None:
        self.path, self.clock, self.sizes = path, clock, sizes
        self.record: dict[str, Any] = json.loads(path.read_text())

    def save(self) -> None:
        write_json(self.path, self.record)


class Part(NamedTuple):
    """`act` gets the run and its seconds; `weight` is its share of the time."""

    name: str
    weight: float
    act: Callable[[Run, float], None]


class Setting(NamedTuple):
    """How to begin in a process: functions that can be named there."""

    path: Path
    make_clock: Callable[[], Clock]
    sizes: Any
    tiles: Callable[[], AbstractContextManager[None]] = nullcontext


def work(part: Part, setting: Setting, seconds: float) -> None:
    """Do a part, in this process, and note how it ended."""
    start, error = monotonic(), None
    try:
        with setting.tiles():
            part.act(Run(setting.path, setting.make_clock(), setting.sizes), seconds)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:  # out of memory, a kernel that fails, a typo: the other parts go on
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    note(setting.path, part.name, monotonic() - start, error)


def begin(part: Part, setting: Setting, seconds: float) -> None:
    """The same in a process of its own: told to end, it ends its own processes, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work(part, setting, seconds)


def note(path: Path, name: str, seconds: float, error: str | None) -> None:
    record = json.loads(path.read_text())
    record["parts"][name] = {"seconds": round(seconds, 1), "error": error and error[:500]}
    write_json(path, record)


def supervise(part: Part, setting: Setting, seconds: float, limit: float) -> None:
    """Have a process do a part, and end it if it takes longer than `limit`."""
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(["bench.record"])  # and torch, with it
    start = monotonic()
    process = context.Process(target=begin, args=(part, setting, seconds))
    process.start()
    try:
        process.join(limit)
    except KeyboardInterrupt:
        process.join(END_SECONDS)  # the terminal has told it, too
        stop(process)
        raise
    error = f"stopped after {limit:.0f} s" if process.is_alive() else f"ended with exit code {process.exitcode}"
    stop(process)
    if part.name not in json.loads(setting.path.read_text())["parts"]:
        note(setting.path, part.name, monotonic() - start, error)


def stop(process: Any) -> None:
    """End it, by force if need be: a process may be waiting for a kernel that never ends."""
    for end in (process.terminate, process.kill):
        if process.is_alive():
            end()
            process.join(END_SECONDS)


def run_all(parts: Sequence[Part], setting: Setting, seconds: float) -> list[str]:
    """Do the parts in turn, each in its share of the time that is left; returns what did not succeed."""
    end = monotonic() + seconds
    for number, part in enumerate(parts):
        left = end - monotonic()
        share = left * part.weight / sum(it.weight for it in parts[number:])
        if left < LEAST_SECONDS:
            note(setting.path, part.name, 0, NO_TIME)
        else:
            print(f"--- {part.name}: {share:.0f} s", flush=True)
            supervise(part, setting, share, min(1.25 * share + 10, left + LATE_SECONDS))
        outcome = json.loads(setting.path.read_text())["parts"][part.name]
        print(f"--- {part.name}: {outcome['error'] or 'done'} after {outcome['seconds']:.0f} s", flush=True)
    found = json.loads(setting.path.read_text())["parts"]
    return [part.name for part in parts if found[part.name]["error"]]
