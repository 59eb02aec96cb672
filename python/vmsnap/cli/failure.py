"""What a command reports when it cannot do its work."""

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
    return printable(" ".join(text.split()))
