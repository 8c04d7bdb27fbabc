"""The tests of a GPU, their files dealt out to several processes: compiling takes most of the time."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from bench.memory import ROOT

USES_GPU = re.compile(r"\b(place|kernels): Place|mark\.gpu")
OPTIONS = ("-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors")
END_SECONDS = 5.0
"""What pytest gets to say what it has found when told to end."""
MOST_PROCESSES = 6
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|xfailed|xpassed|error)s?\b")


def commands() -> list[list[str]]:
    """One for each process: all tests, without the files of others. So conftest.py can leave out files, too."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    wanted = [path for path in files if USES_GPU.search(path.read_text())]
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    shares = [wanted[number::processes] for number in range(processes)]
    return [
        [sys.executable, *OPTIONS, "tests", *(f"--ignore={path}" for path in files if path not in share)]
        for share in shares
    ]


def counts(output: str) -> Counter[str]:
    """What pytest says at its end; nothing where it did not get there."""
    last = [line for line in output.splitlines() if COUNTS.search(line) and " in " in line]
    return Counter({name: int(number) for number, name in COUNTS.findall(last[-1])}) if last else Counter()


def run(commands: Sequence[Sequence[str]], seconds: float) -> dict[str, Any]:
    """Counts and failures of all processes; those that need longer are interrupted, and say how far they came."""
    end = monotonic() + seconds - END_SECONDS
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: pytest would not be interrupted
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(number)) for number in range(len(commands))]
        running = []
        for command, path in zip(commands, outputs, strict=True):
            with path.open("w") as output:
                running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT))
        try:
            late = [number for number, process in enumerate(running) if not ended(process, end - monotonic())]
        finally:
            interrupt(running)
        texts = [path.read_text(errors="replace") for path in outputs]
    found = sum(map(counts, texts), Counter())
    failures = [name for text in texts for name in re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.M)]
    silent = [number for number, text in enumerate(texts) if not counts(text) and "deselected" not in text]
    broken = [texts[number].strip()[-500:] for number in silent if number not in late]
    return {"counts": dict(found), "failures": failures, "interrupted": len(late), "broken": broken}


def ended(process: subprocess.Popen[Any], seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def interrupt(running: Sequence[subprocess.Popen[Any]]) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    end = monotonic() + END_SECONDS
    for process in running:
        if not ended(process, end - monotonic()):
            process.kill()
            process.wait()
