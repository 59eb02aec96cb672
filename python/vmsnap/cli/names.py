"""Names in a snapshot, and other text for the library, as arguments of the command line.

An argument is bytes, and a name is UTF-8. So the bytes of the argument are decoded as UTF-8 in every locale, and a name
that was listed can be given back in the C locale, too.
"""

import os

import click

from vmsnap.cli.failure import CommandError


def as_name(argument: str) -> str:
    """Return the text of an argument, decoded from UTF-8.

    Raises
    ------
    CommandError
        If the argument is not UTF-8.
    """
    stored = os.fsencode(argument)
    try:
        return stored.decode()
    except UnicodeDecodeError:
        shown = stored.decode("utf-8", "backslashreplace")
        raise CommandError(f"{shown} is not UTF-8, and names and recipients must be") from None


class _Name(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """Text that is UTF-8 in every locale."""

    name = "text"

    def convert(self, value: object, _parameter: click.Parameter | None, _context: click.Context | None) -> str:
        return as_name(str(value))


NAME = _Name()
