"""``vmsnap info``: what a snapshot is, as much of it as can be said."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click

import vmsnap
from vmsnap import FragmentReader, SnapshotReader
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.places import directory_argument, json_option, walk
from vmsnap.cli.terminal import human_size, iso_time, print_table, printable, to_terminal
from vmsnap.serialization import format_of

# Of one fragment and of all: enough to tell the format by, in no time.
_LOOKED_AT_BYTES = 64 << 10
_LOOKED_AT_BYTES_IN_ALL = 16 << 20
# In CBOR whatever begins below is a number; a JSON digit is one too, so that they tell nothing.
_CBOR_NUMBERS_BELOW = 0x40

_WRAPPINGS = {
    "raw-key": "a 32-byte key",
    "age": "age",
    "passphrase": "age, with a passphrase",
    "key-provider": "a key service",
}
_VALUES = {
    "cbor": "CBOR, as crosvm has written since March 2025",
    "json": "JSON, as crosvm wrote before March 2025",
    "mixed": "CBOR and JSON",
    "none": "none found",
}


@dataclass(frozen=True)
class Info:
    """What ``--json`` prints; None is what needs the key, or does not apply."""

    root: str
    encrypted: bool
    key_wrapping: str | None
    key_recipients: list[str]
    sealed: bool
    values: str | None
    namespaces: int
    fragments: int
    size: int | None
    stored_size: int
    overhead: int | None
    modified: str | None

    def rows(self, *, exact: bool) -> list[tuple[str, str]]:
        """Return the lines for a program or for a person."""

        def size_of(size: int | None) -> str:
            if size is None:
                return "needs the key"
            if exact:
                return str(size)
            return human_size(size) if size < 1024 else f"{human_size(size)} ({size:,} bytes)"

        overhead = size_of(self.overhead)
        if self.overhead is not None and self.size and not exact:
            overhead += f", {self.overhead / self.size:.2%}"
        wrapped = []
        if self.key_wrapping:
            whom = f" ({', '.join(map(printable, self.key_recipients))})" if self.key_recipients else ""
            wrapped = [("key wrapped by", _WRAPPINGS[self.key_wrapping] + whom)]
        return [
            ("snapshot", printable(self.root)),
            ("encrypted", "yes" if self.encrypted else "no"),
            *wrapped,
            ("sealed", "yes" if self.sealed else "no"),
            ("values", "needs the key" if self.values is None else _VALUES[self.values]),
            ("namespaces", str(self.namespaces)),
            ("fragments", str(self.fragments)),
            ("size", size_of(self.size)),
            ("stored size", size_of(self.stored_size)),
            ("overhead", overhead),
            ("modified", self.modified or "-"),
        ]


def _format_of(fragment: FragmentReader) -> str | None:
    """Return the format of the value that a fragment is, None where it is none."""
    data = fragment.read()
    found = format_of(data)
    return None if found == "cbor" and data[0] < _CBOR_NUMBERS_BELOW else found


def _look(snapshot: SnapshotReader) -> tuple[str, int]:
    """Return which format the values have, and the size of all fragments."""
    size, looked_at, formats = 0, 0, set()
    for _, fragment in walk(snapshot):
        size += fragment.size
        if fragment.size <= _LOOKED_AT_BYTES and looked_at < _LOOKED_AT_BYTES_IN_ALL:
            looked_at += fragment.size
            formats.add(_format_of(fragment))
    formats.discard(None)
    return (formats.pop() or "none" if len(formats) == 1 else "mixed" if formats else "none"), size


def inspect(root: Path, keys: OpeningKeys) -> Info:
    """Find out what a snapshot is; without its key, what shows of it."""
    found = vmsnap.inspect(root)
    wrapping = found.key_wrapping.kind if found.key_wrapping else None
    values, size = None, None
    if wrapping in (None, "age") or keys.given:
        try:
            values, size = _look(keys.open(root))
        except (vmsnap.KeyUnavailableError, vmsnap.AuthenticationError):
            # The user's own identity need not be the one.
            if keys.given:
                raise
    stored_size = sum(fragment.stored_size for fragment in found.fragments)
    return Info(
        root=str(root),
        encrypted=found.encrypted,
        key_wrapping=wrapping,
        key_recipients=found.key_wrapping.recipients if found.key_wrapping else [],
        sealed=found.sealed,
        values=values,
        namespaces=len(found.namespaces),
        fragments=len(found.fragments),
        size=size,
        stored_size=stored_size,
        overhead=None if size is None else stored_size - size,
        modified=iso_time(max((each.modified for each in found.fragments if each.modified is not None), default=None)),
    )


@click.command()
@directory_argument
@opening_options
@json_option
def info(directory: Path, keys: OpeningKeys, as_json: bool) -> None:
    """Tell what a snapshot is: encrypted or not, how large, how many fragments, which format its values have.

    Without the key of an encrypted snapshot it tells what shows all the same, and what needs the key; none of that is
    authenticated. Sealed means that it has a manifest, which `vmsnap verify` reads. The sizes are those of the
    fragments. With --json, what needs the key is null.

    The format is found by looking at fragments of up to 64 KiB, at most 16 MiB of them.
    """
    found = inspect(directory, keys)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    elif to_terminal():
        print_table(found.rows(exact=False))
    else:
        click.echo("".join(f"{label}\t{text}\n" for label, text in found.rows(exact=True)), nl=False)
