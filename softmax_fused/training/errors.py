"""What can go wrong in the lab, as the command line reports it: one line and an exit status."""


class UsageError(ValueError):
    """An option or argument that cannot be right on any machine."""

    status = 2


class LabError(RuntimeError):
    """A run that failed: data, files, devices, numbers."""

    status = 1


class CommonError(LabError):
    """A failure that all ranks meet alike: one of them reports it."""


class MissingDataError(LabError):
    """Files of a data set that are not there and could not be downloaded."""


class WriteError(LabError):
    """A file or folder that could not be written."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; the message says what was kept and how to go on."""

    def __init__(self, message: str = "stopped before anything was written", status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class OutputClosed(BaseException):
    """Nobody reads what a command prints: it ends, and has nobody to tell."""

    status = 128 + 13  # as a shell reports a tool that SIGPIPE ended
