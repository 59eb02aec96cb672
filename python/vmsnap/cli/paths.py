"""Paths as arguments. An empty one is refused, because pathlib takes it for the current directory."""

import os
from pathlib import Path

import click


class _NonEmptyPath(click.Path):
    """A path that is not empty, as ``"$VARIABLE"`` in a script is if the variable is not set."""

    def convert(
        self, value: "str | os.PathLike[str]", parameter: click.Parameter | None, context: click.Context | None
    ) -> "str | bytes | os.PathLike[str]":
        if not os.fspath(value):
            self.fail("the path is empty", parameter, context)
        return super().convert(value, parameter, context)


PATH = _NonEmptyPath(path_type=Path)
TEXT_PATH = _NonEmptyPath()
