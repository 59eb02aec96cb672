"""What a name in a snapshot, or other text for the library, is on the command line.

An argument is bytes, and a name is UTF-8: these bytes, whatever the locale takes them for. So a name that was listed
can be given back in the C locale, too.
"""

import os

import click

from vmsnap.cli.failure import CommandError


def as_name(argument: str) -> str:
    """Return the text that the bytes of an argument are.

    Raises
    ------
    CommandError
        They are not UTF-8.
    """
    stored = os.fsencode(argument)
    try:
        return stored.decode()
    except UnicodeDecodeError:
        shown = stored.decode("utf-8", "backslashreplace")
        raise CommandError(f"{shown}: is not UTF-8, which names and recipients have to be") from None


# click has a type parameter for these since 8.4 only.
class _Name(click.ParamType):  # type: ignore[type-arg]
    """Text that is UTF-8 in every locale."""

    name = "text"

    def convert(self, value: object, _parameter: click.Parameter | None, _context: click.Context | None) -> str:
        return as_name(str(value))


NAME = _Name()
