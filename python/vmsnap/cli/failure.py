"""What a command reports when it cannot do its work."""

import vmsnap
from vmsnap.cli.terminal import printable


class CommandError(Exception):
    """A failure found by the command line itself; its text is for the user."""


def describe(error: Exception) -> str:
    """Return the text of an error as one printable line.

    Parameters
    ----------
    error
        A `CommandError`, a `vmsnap.VmsnapError` or an `OSError`.
    """
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    # What could not be cleared away because of it, say.
    return printable(" ".join("; ".join([text, *getattr(error, "__notes__", ())]).split()))


def status_of(error: Exception) -> int:
    """Return the exit status that tells a script what kind of error it was; ``vmsnap --help`` has them all."""
    match error:
        case vmsnap.KeyUnavailableError() | vmsnap.AuthenticationError() | vmsnap.NotEncryptedError():
            return 3
        case vmsnap.CorruptSnapshotError() | vmsnap.UnsupportedFormatError():
            return 4
        case _:
            return 1
