"""A fragment as lists and trees show it."""

from dataclasses import dataclass

from vmsnap import SnapshotReader
from vmsnap.cli.location import Snapshot
from vmsnap.cli.targets import times, walk
from vmsnap.cli.terminal import human_size, iso_time, printable


@dataclass(frozen=True)
class Entry:
    """A fragment as lists show it. ``--json`` prints the fields."""

    path: str
    size: int
    stored_size: int
    chunk_size_bytes: int | None
    modified: str | None

    def line(self, long: bool) -> str:
        """Return the line for a program: exact, with tabs between the columns."""
        columns = [printable(self.path), self.size]
        if long:
            columns += [self.stored_size, self.chunk_size_bytes or "-", self.modified or "-"]
        return "\t".join(map(str, columns)) + "\n"

    def row(self, long: bool) -> list[str]:
        """Return the cells of the table for a person."""
        path = printable(self.path)
        if not long:
            return [f"{self.size:,}", path]
        chunk = "-" if self.chunk_size_bytes is None else human_size(self.chunk_size_bytes)
        return [human_size(self.size), human_size(self.stored_size), chunk, self.modified or "-", path]


def entries(snapshot: SnapshotReader, location: Snapshot) -> list[Entry]:
    """Return all fragments in a namespace of the snapshot at `location` and in the namespaces below it, sorted."""
    modified = times(location)
    return [
        Entry(path, fragment.size, fragment.stored_size, fragment.chunk_size_bytes, iso_time(modified.get(path)))
        for path, fragment in walk(snapshot)
    ]
