"""Errors of commands: their text and their exit codes."""

import vmsnap
from vmsnap.cli.terminal import printable


class CommandError(Exception):
    """An error that the command line itself found. Its text is for the user."""


def describe(error: Exception) -> str:
    """Return the text of an error as one printable line.

    Parameters
    ----------
    error
        A `CommandError`, a `vmsnap.VmsnapError`, an `OSError` or a `MemoryError`.
    """
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = str(error) or "out of memory"  # Python's own has no text
    else:
        text = str(error) or type(error).__name__
    # Notes name, for example, files that could not be removed.
    return printable(" ".join("; ".join([text, *getattr(error, "__notes__", ())]).split()))


def status_of(error: Exception) -> int:
    """Return the exit code for an error. ``vmsnap --help`` lists them all."""
    match error:
        case vmsnap.KeyUnavailableError() | vmsnap.AuthenticationError() | vmsnap.NotEncryptedError():
            return 3
        case vmsnap.CorruptSnapshotError() | vmsnap.UnsupportedFormatError():
            return 4
        case _:
            return 1
