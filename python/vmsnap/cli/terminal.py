"""What depends on where the output goes: plain text into a pipe, a table and a progress bar on a terminal."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def printable(text: str) -> str:
    """Return `text` with all that could move a cursor or end a line escaped.

    Names come from snapshots and processes that nobody vouches for. A backslash cannot be part of a fragment's name,
    so that the escapes of those are not ambiguous.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def human_size(size: float) -> str:
    """Return a number of bytes with the binary unit that suits it."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def print_table(rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> None:
    """Print rows on the terminal, the columns whose numbers are in `right` aligned there."""
    table = Table.grid(padding=(0, 2))
    rows = list(rows)
    for index in range(max(map(len, rows), default=0)):
        table.add_column(justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        # Text, not str: a name with brackets in it is no markup.
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, where that is a terminal, and give the function that advances it.

    Parameters
    ----------
    label
        What is going on.
    total
        The number of bytes to come, or None where nobody knows.
    """
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
