"""The lab's exceptions. The command line prints each as one line and exits with its `status`."""


class UsageError(ValueError):
    """An option or argument that is wrong on every machine."""

    status = 2


class LabError(RuntimeError):
    """A failure while running: of data, files, devices or numbers."""

    status = 1


class AllRanksError(LabError):
    """A failure that every rank meets in the same way, so that rank 0 alone reports it."""


class MissingDataError(LabError):
    """The files of a data set are absent and cannot be downloaded."""


class WriteError(LabError):
    """A file or folder cannot be written."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; the message says what has been kept and how to resume."""

    def __init__(self, message: str = "stopped before anything was written", status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class OutputClosed(BaseException):
    """The reader of this process's output has closed it; nothing more can be printed."""

    status = 128 + 13  # what a shell reports for a program that SIGPIPE ended
