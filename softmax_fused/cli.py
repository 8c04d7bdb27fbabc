"""The console script: runs a command, turns what stops it into one line and an exit status."""

import os
import signal
import sys
from importlib.util import find_spec
from typing import NoReturn

from softmax_fused.training.signals import exit_on_closed_output
from softmax_fused.training.versions import describe_version

EXTRA = ("jinja2", "matplotlib", "numpy", "platformdirs", "rich", "sklearn", "tensorboard", "torchvision", "typer")


@exit_on_closed_output()
def main(argv: list[str] | None = None) -> NoReturn:
    """Run ``softmax-fused`` and exit: 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM.

    It is 141 where whoever read the output has gone. Of several ranks the first alone reports what happens to all.

    Args:
        argv: The arguments; by default those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments == ["--version"]:  # asked of a broken installation above all: it needs no package of the extra
        print(describe_version())
        sys.exit(0)
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        _fail(f"softmax-fused needs {', '.join(missing)}; run: pip install 'softmax-fused[train]'", 1)
    # Figures are files. A notebook hands its own backend down to the commands of its cells, where it may not exist.
    os.environ["MPLBACKEND"] = "agg"
    import torch

    from softmax_fused.training.errors import AllRanksError, LabError, Stopped, UsageError
    from softmax_fused.training.ranks.group import torchrun_ranks
    from softmax_fused.training.signals import signals_as_exception

    ranks = torchrun_ranks()
    speaker = f"rank {ranks.rank}: " if ranks.rank else ""
    try:
        with signals_as_exception(once=ranks.size > 1):
            status = _run(arguments)
    except Stopped as stop:
        by_torchrun = stop.status == 128 + signal.SIGTERM  # because the first rank died, perhaps: the second speaks too
        _fail(f"{speaker}{stop}" if ranks.rank <= by_torchrun else "", stop.status)
    except (AllRanksError, UsageError) as error:
        _fail("" if speaker else f"error: {error}", error.status)
    except LabError as error:
        _fail(f"{speaker}error: {error}", error.status)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        wanted = "a batch to fit into the GPU's memory"
        _fail(f"{speaker}error: expected {wanted}, got: {reason}; choose a smaller --batch-size", 1)
    except OSError as error:
        _fail(f"{speaker}error: expected to read and write files, got {error}; check that path and its permissions", 1)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    from softmax_fused.training.commands import app

    try:
        return app(arguments, prog_name="softmax-fused", standalone_mode=False) or 0
    except Exception as error:
        # click's own errors; typer brings a copy of click or depends on it, so their class has no one name.
        if not hasattr(error, "format_message"):
            raise
        from softmax_fused.training.errors import UsageError

        message = error.format_message().rstrip(".")
        command = getattr(getattr(error, "ctx", None), "command_path", "softmax-fused")
        raise UsageError(f"{message[:1].lower()}{message[1:]}; see {command} --help") from None


def _fail(message: str, status: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)
