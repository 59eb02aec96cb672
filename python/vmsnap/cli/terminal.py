"""What depends on where the output goes: plain text into a pipe, a table and a progress bar on a terminal."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def printable(text: str) -> str:
    """Return `text` with all that could move a cursor or end a line escaped.

    Names come from snapshots and processes that nobody vouches for. A backslash cannot be part of a fragment's name,
    so that the escapes of those are not ambiguous.
    """
    # A path that is not UTF-8, or is none in this locale, is shown by its bytes.
    with suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def to_terminal() -> bool:
    """Whether standard output is a terminal: a person reads it, not a program."""
    return sys.stdout.isatty()


def human_size(size: float) -> str:
    """Return a number of bytes with the binary unit that suits it."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "bytes" else "1 byte" if size == 1 else f"{size:.0f} bytes"
        size /= 1024
    return f"{size:.2f} GiB"


def iso_time(time: datetime | None) -> str | None:
    """Return a time as ISO 8601 has it, in UTC and to the second."""
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they come, in pieces of a size that the system likes."""
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def print_table(
    rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), right: frozenset[int] = frozenset()
) -> None:
    """Print rows on the terminal, the columns whose numbers are in `right` aligned there.

    The last column is the terminal's to wrap, so that a long path in it is copied as it is.
    """
    rows = [header, *rows] if header else list(rows)
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    # Text, not str: a name with brackets in it is no markup.
    lines = Text(no_wrap=True)
    for number, row in enumerate(rows):
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            last = index == len(row) - 1
            padded = space + cell if index in right else cell if last else cell + space
            lines.append(padded + ("\n" if last else "  "), "bold" if header and number == 0 else "")
    Console(highlight=False).print(lines, end="", soft_wrap=True)


@contextmanager
def progress(label: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, where that is a terminal, and give the function that advances it.

    Parameters
    ----------
    label
        What is going on.
    total
        The number of bytes to come, or None where nobody knows.
    shown
        Whether the terminal can be written to at all.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda _count: None
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def progress_so_far(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show the same, for what tells how many bytes are done, and of how many."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    with _bar() as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        bar.start()
    except RuntimeError:  # the system allows no thread to draw it
        bar.stop()
        bar.disable = True
    return bar
