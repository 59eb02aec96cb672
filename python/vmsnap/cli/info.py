"""``vmsnap info``: a summary of a snapshot, as far as it can be told without the key."""

import json
from dataclasses import asdict, dataclass

import click

import vmsnap
from vmsnap import FragmentReader, SnapshotReader
from vmsnap.cli.command import Command
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import json_option
from vmsnap.cli.targets import doubt, expecting_snapshot, snapshot_argument, walk
from vmsnap.cli.terminal import human_size, iso_time, print_table, printable, to_terminal
from vmsnap.serialization import format_of

# Limits for one fragment and for all: enough to recognize the format quickly.
_LOOKED_AT_BYTES = 64 << 10
_LOOKED_AT_BYTES_IN_ALL = 16 << 20
# A CBOR value that begins below is a number, and so is a JSON digit: these do not tell the format.
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
    """The summary that ``--json`` prints. A field is None if it needs the key, or does not apply."""

    location: str
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
        """Return the lines: with exact numbers for a program, or readable ones for a person."""

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
            ("snapshot", printable(self.location)),
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
    """Return the format of the value in a fragment, None if the fragment is not a value."""
    data = fragment.read()
    found = format_of(data)
    return None if found == "cbor" and data[0] < _CBOR_NUMBERS_BELOW else found


def _look(snapshot: SnapshotReader) -> tuple[str, int]:
    """Return the format of the values, and the size of all fragments."""
    size, looked_at, formats = 0, 0, set()
    for _, fragment in walk(snapshot):
        size += fragment.size
        if fragment.size <= _LOOKED_AT_BYTES and looked_at < _LOOKED_AT_BYTES_IN_ALL:
            looked_at += fragment.size
            formats.add(_format_of(fragment))
    formats.discard(None)
    return (formats.pop() or "none" if len(formats) == 1 else "mixed" if formats else "none"), size


def summarize(location: Snapshot, keys: OpeningKeys) -> Info:
    """Return the summary of a snapshot. Without its key, only visible properties are included."""
    found = vmsnap.inspect(location)
    wrapping = found.key_wrapping.kind if found.key_wrapping else None
    values, size = None, None
    if wrapping in (None, "age") or keys.given:
        try:
            values, size = _look(keys.open(location))
        except (vmsnap.KeyUnavailableError, vmsnap.AuthenticationError):
            # The user's own identity need not open this snapshot.
            if keys.given:
                raise
    stored_size = sum(fragment.stored_size for fragment in found.fragments)
    return Info(
        location=str(location),
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


@click.command(cls=Command, examples=["vmsnap info vm1", "vmsnap info vm1 --json --key-file vm.key"])
@snapshot_argument
@opening_options
@json_option
@store_options
def info(snapshot: Snapshot, keys: OpeningKeys, as_json: bool) -> None:
    """Show the encryption, the seal and the size of a snapshot.

    Without the key of an encrypted snapshot, some values are "needs the key" (null in --json). Nothing here is
    authenticated: "sealed" means that there is a manifest, which "vmsnap verify" checks. Sizes count fragments only.

    To find the format of values, fragments of up to 64 KiB are read, at most 16 MiB in all.
    """
    with expecting_snapshot(snapshot):
        found = summarize(snapshot, keys)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    elif to_terminal():
        print_table(found.rows(exact=False))
    else:
        click.echo("".join(f"{label}\t{text}\n" for label, text in found.rows(exact=True)), nl=False)
    doubt(snapshot)
