"""``vmsnap tree``: the namespaces and fragments of a snapshot as a tree."""

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from vmsnap import SnapshotReader
from vmsnap.cli.command import Command
from vmsnap.cli.entry import Entry, entries
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import json_option
from vmsnap.cli.targets import enter, expecting_snapshot, namespace_argument, snapshot_argument
from vmsnap.cli.terminal import human_size, printable, to_terminal

# Columns that rich indents by level, and columns to leave for a name.
_INDENT = 4
_NAME_COLUMNS = 24
# Longer than any line: nothing is wrapped or cut off.
_ENDLESS_COLUMNS = 1 << 20


class Namespace:
    """A namespace with its fragments and the namespaces in it."""

    def __init__(self, reader: SnapshotReader, name: str) -> None:
        self.name = name
        self.path = reader.namespace_path
        self.fragments: list[Entry] = []
        self.namespaces: list[Namespace] = []
        self.count = 0
        self.size = 0


def read_tree(snapshot: SnapshotReader, location: Snapshot) -> tuple[Namespace, int]:
    """Return the contents of a namespace of the snapshot at `location`, and the number of levels."""
    by_namespace: dict[str, list[Entry]] = {}
    for entry in entries(snapshot, location):
        by_namespace.setdefault(entry.path.rpartition("/")[0], []).append(entry)
    root = Namespace(snapshot, snapshot.namespace_path.rpartition("/")[2])
    seen = [(root, snapshot, 1)]
    # Each namespace comes after its parent, so sums are made from the end to the start.
    for parent, reader, level in seen:
        parent.fragments = by_namespace.get(parent.path, [])
        for name in reader.list_namespaces():
            within = reader.namespace(name)
            parent.namespaces.append(Namespace(within, name))
            seen.append((parent.namespaces[-1], within, level + 1))
    for namespace, _, _ in reversed(seen):
        namespace.count = len(namespace.fragments) + sum(each.count for each in namespace.namespaces)
        namespace.size = sum(each.size for each in namespace.fragments)
        namespace.size += sum(each.size for each in namespace.namespaces)
    return root, seen[-1][2]


def as_object(root: Namespace) -> dict[str, Any]:
    """Return a namespace as ``--json`` prints it."""
    objects: dict[int, dict[str, Any]] = {}
    pending = [root]
    for namespace in pending:
        pending += namespace.namespaces
    for namespace in reversed(pending):
        objects[id(namespace)] = {
            "name": namespace.name,
            "path": namespace.path,
            "fragments": [{"name": each.path.rpartition("/")[2]} | asdict(each) for each in namespace.fragments],
            "namespaces": [objects[id(each)] for each in namespace.namespaces],
        }
    return objects[id(root)]


def as_tree(root: Namespace, label: str, *, exact: bool) -> Tree:
    """Return a namespace as it is drawn, with sizes for a program or for a person."""

    def size_of(size: int) -> str:
        return f"{size} byte{'' if size == 1 else 's'}" if exact else human_size(size)

    def title(name: str, namespace: Namespace) -> Text:
        count = f"{namespace.count} fragment{'' if namespace.count == 1 else 's'}, {size_of(namespace.size)}"
        return Text.assemble((name, "bold"), "  ", (count, "dim"), overflow="fold")

    drawn = Tree(title(label, root), guide_style="dim", highlight=False)
    pending = [(root, drawn)]
    for namespace, branch in pending:
        for entry in namespace.fragments:
            name = printable(entry.path.rpartition("/")[2])
            branch.add(Text.assemble(name, "  ", (size_of(entry.size), "dim"), overflow="fold"))
        for within in namespace.namespaces:
            pending.append((within, branch.add(title(printable(within.name) + "/", within))))
    return drawn


@click.command(cls=Command, examples=["vmsnap tree vm1", "vmsnap tree vm1 pci --key-file vm.key"])
@snapshot_argument
@namespace_argument
@opening_options
@json_option
@store_options
def tree(snapshot: Snapshot, path: str, keys: OpeningKeys, as_json: bool) -> None:
    """Draw the namespaces and fragments of a snapshot as a tree.

    If the output is not a terminal, sizes are in bytes and nothing is wrapped. --json prints nested objects with name,
    path, fragments and namespaces.
    """
    with expecting_snapshot(snapshot):
        root, levels = read_tree(enter(keys.open(snapshot), path), snapshot)
    if as_json:
        click.echo(json.dumps(as_object(root), indent=2))
        return
    label = printable(f"{snapshot}/{path}" if path else str(snapshot))
    if to_terminal():
        console = Console(highlight=False)
        # A name that is too long continues below itself. If the tree is deeper than the screen is wide, that would be a
        # column of letters: then the terminal wraps the lines.
        if levels * _INDENT + _NAME_COLUMNS > console.width:
            console.width = _ENDLESS_COLUMNS
        console.print(as_tree(root, label, exact=False), soft_wrap=console.width == _ENDLESS_COLUMNS)
    else:
        plain = Console(file=sys.stdout, color_system=None, force_terminal=False, highlight=False)
        plain.width = _ENDLESS_COLUMNS
        plain.print(as_tree(root, label, exact=True), soft_wrap=True)
