"""The table in docs/errors.md itself: each row has a test, and its exception and its predicate in Rust agree."""

import builtins
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import vmsnap
from refusals import ERRORS_PAGE, rows

REPOSITORY = ERRORS_PAGE.parents[1]


def rows_by_test() -> dict[Callable[..., None], set[str]]:
    """The tests of all files that are marked with rows, also where pytest was asked to run this file alone."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        for name, test in vars(importlib.import_module(file.stem)).items():
            marks = getattr(test, "pytestmark", []) if name.startswith("test_") else []
            if names := {row for mark in marks if mark.name == "row" for row in mark.args}:
                found[inspect.unwrap(test)] = names
    return found


def constants(code: types.CodeType) -> Iterator[object]:
    """Every literal of a function and of the functions inside it."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from constants(constant)
        else:
            yield constant


def test_every_row_of_the_table_has_a_test_and_every_test_a_row() -> None:
    tested = rows_by_test()
    assert set().union(*tested.values()) == set(rows())
    # `refused` takes only rows that its test is marked with. Here: each mark is of a row that the test names as well.
    for test, names in tested.items():
        assert names <= set(constants(test.__code__)), test.__name__


def test_the_table_names_exceptions_and_predicates_that_belong_together() -> None:
    classes = {
        "AuthenticationError": "is_authentication",
        "CorruptSnapshotError": "is_corrupt",
        "InvalidArgumentError": "is_invalid_argument",
        "KeyUnavailableError": "is_key_unavailable",
        "MemoryError": "is_out_of_memory",
        "NotEncryptedError": "is_not_encrypted",
        "NotSealedError": "is_not_sealed",
        "SealedError": "is_sealed",
        "SerializationError": "is_serialization",
        "StateError": "is_state",
        "UnsupportedFormatError": "is_unsupported_format",
        "KeyboardInterrupt": "is_interrupted",
    }
    predicates = set(re.findall(r"pub fn (is_\w+)\(", (REPOSITORY / "src/error.rs").read_text()))
    for row in rows().values():
        if row.predicate is None:
            continue
        assert row.predicate in predicates, row.name
        if row.predicate in ("is_io", "is_transient"):
            assert issubclass(getattr(builtins, row.exception), OSError), row.name
        else:
            assert classes[row.exception] == row.predicate, row.name
    # Nothing is left out either.
    own = {name for name in vmsnap.__all__ if name.endswith("Error")} - {"VmsnapError"}
    assert own <= {row.exception for row in rows().values()}
    assert {row.predicate for row in rows().values()} >= predicates


def test_the_exceptions_have_one_base_and_bad_arguments_are_value_errors() -> None:
    for name in vmsnap.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(vmsnap, name), vmsnap.VmsnapError)
    assert issubclass(vmsnap.InvalidArgumentError, ValueError)
    assert issubclass(vmsnap.SerializationError, ValueError)
    assert not issubclass(vmsnap.VmsnapError, OSError)
