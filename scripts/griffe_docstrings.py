"""Prepare docstrings for the page of the Python API.

Parameters that share an entry (``key, identities``) get an entry each, because griffe would give all of them the type
of the first. A public name in backquotes becomes a link.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

_SHARED_ENTRY = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)+)\n((?:    .*\n?)+)", re.MULTILINE)
_IN_BACKQUOTES = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Docstrings(griffe.Extension):
    """The extension that mkdocs.yml names."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite all docstrings of a package."""
        links = {name: f"[`{name}`][{pkg.path}.{name}]" for name in map(str, pkg.exports or ())}
        for docstring in _docstrings(pkg):
            text = _SHARED_ENTRY.sub(_one_by_one, docstring.value)
            docstring.value = _IN_BACKQUOTES.sub(lambda name: links.get(name[1], name[0]), text)


def _docstrings(found: griffe.Object) -> Iterator[griffe.Docstring]:
    if found.docstring:
        yield found.docstring
    for member in found.members.values():
        if not member.is_alias:
            yield from _docstrings(member)


def _one_by_one(entry: re.Match[str]) -> str:
    description = entry[2] if entry[2].endswith("\n") else f"{entry[2]}\n"
    return "".join(f"{name}\n{description}" for name in entry[1].split(", "))
