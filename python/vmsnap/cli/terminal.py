"""Output for a pipe or for a terminal: plain text, or tables and progress bars."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def printable(text: str) -> str:
    """Return `text` with all characters escaped that could move a cursor or end a line.

    Names come from snapshots and processes that are not trusted. A fragment's name cannot contain a backslash, so an
    escaped one is unambiguous.
    """
    # The bytes of a path that is not UTF-8 are shown escaped.
    with suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def to_terminal() -> bool:
    """Return whether standard output is a terminal, so that a person reads it and not a program."""
    return sys.stdout.isatty()


def human_size(size: float) -> str:
    """Return a number of bytes with a fitting binary unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "bytes" else "1 byte" if size == 1 else f"{size:.0f} bytes"
        size /= 1024
    return f"{size:.2f} GiB"


def iso_time(time: datetime | None) -> str | None:
    """Return a time in ISO 8601, in UTC and to the second."""
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they come, buffered."""
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def print_table(
    rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), right: frozenset[int] = frozenset()
) -> None:
    """Print rows on the terminal. The columns in `right` are aligned to the right.

    The terminal wraps the last column, so that a long path can be copied as it is.
    """
    rows = [header, *rows] if header else list(rows)
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    # Text, not str: brackets in a name are not markup.
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
    """Show a progress bar on standard error if that is a terminal, and give the function that advances it.

    Parameters
    ----------
    label
        A word for the work.
    total
        The number of bytes, or None if it is unknown.
    shown
        Whether the bar may be shown at all.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda _count: None
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def progress_so_far(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar like `progress`, and give a function that sets the bytes done and the bytes in all."""
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
    except RuntimeError:  # the system does not allow a thread to draw it
        bar.stop()
        bar.disable = True
    return bar
