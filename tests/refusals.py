"""The table in docs/errors.md: its rows, the mark of the tests that check them, and the check of an error."""

import errno
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import vmsnap
from support import run_python, tree

ERRORS_PAGE = Path(__file__).resolve().parents[1] / "docs/errors.md"

#: Marks a test with the rows that it checks: `@row("bad-name", "bad-path")`.
row = pytest.mark.row

_rows_of_test: set[str] = set()


def begin_test(item: pytest.Item) -> None:
    """Note the rows that the test is marked with, before it runs."""
    _rows_of_test.clear()
    _rows_of_test.update(name for mark in item.iter_markers("row") for name in mark.args)


@dataclass(frozen=True)
class Row:
    """A row of the table: the name of the exception, its errno where one is promised, the predicate in Rust if any."""

    name: str
    exception: str
    errno: int | None
    predicate: str | None
    on_disk: str


@functools.cache
def rows() -> dict[str, Row]:
    found = {}
    for line in ERRORS_PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 6 and (name := re.fullmatch("`([a-z0-9-]+)`", cells[0])):
            exception, *number = re.findall("`([^`]+)`", cells[2])
            assert name[1] not in found, f"{name[1]} comes twice"
            found[name[1]] = Row(
                name[1],
                exception,
                getattr(errno, number[0]) if number else None,
                cells[3].strip("`") if cells[3].startswith("`") else None,
                cells[5],
            )
    assert found
    return found


def _row_of_test(name: str) -> Row:
    assert name in _rows_of_test, f'mark the test with @row("{name}")'
    return rows()[name]


def _check(expected: Row, exception: str, number: int | None, text: str, message: str) -> None:
    assert exception == expected.exception, text
    assert expected.errno in (None, number), text
    assert re.search(message, text), text


@contextmanager
def refused(row_name: str, message: str, folder: Path) -> Iterator[None]:
    """Expect exactly the exception of the row from the block, with `message` in its text, and no change in `folder`.

    `message` is a regular expression.
    """
    expected = _row_of_test(row_name)
    before = tree(folder)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (which one, and its text, is looked at below)
        yield
    error = caught.value
    _check(expected, type(error).__name__, getattr(error, "errno", None), str(error), message)
    assert isinstance(error, (vmsnap.VmsnapError, OSError)) or expected.predicate is None
    assert tree(folder) == before


def refused_elsewhere(
    row_name: str, message: str, folder: Path, script: str, *arguments: object, **environment: str
) -> str:
    """Expect exactly the exception of the row from a script in a process of its own, and return its output.

    `message` is a regular expression, and nothing in `folder` may change.
    """
    expected = _row_of_test(row_name)
    lines = ["    " + line for line in script.strip().splitlines()]
    program = "\n".join(
        [
            "import os, sys, vmsnap",
            "try:",
            *lines,
            "except BaseException as error:",
            "    print('REFUSED', type(error).__name__, getattr(error, 'errno', None), error)",
        ]
    )
    before = tree(folder)
    result = run_python(program, *arguments, **environment)
    refusal = re.search(r"^REFUSED (\w+) (\w+) (.*)", result.stdout, re.DOTALL | re.MULTILINE)
    assert refusal, result.stdout + result.stderr
    number = None if refusal[2] == "None" else int(refusal[2])
    _check(expected, refusal[1], number, refusal[3], message)
    assert tree(folder) == before
    return result.stdout
