"""``vmsnap show``: a fragment as a readable value, or as a hex dump."""

import json
from typing import Literal

import click

from vmsnap import CorruptSnapshotError, FragmentReader
from vmsnap.cli.command import Command
from vmsnap.cli.hexdump import hexdump
from vmsnap.cli.io import batches
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import json_option
from vmsnap.cli.targets import fragment_argument, locate, snapshot_argument
from vmsnap.cli.terminal import print_lines
from vmsnap.cli.values import json_value, value_lines

# A longer fragment is taken for raw bytes, so that guest memory is not read whole to find out.
_VALUE_BYTES = 16 << 20
_SHOWN_BYTES = 4096


def _show_value(value: object, *, as_json: bool, full: bool) -> None:
    if as_json:
        click.echo(json.dumps(json_value(value), indent=2, allow_nan=False))
        return
    print_lines(value_lines(value, full=full))


def _show_bytes(
    path: str, fragment: FragmentReader, offset: int, size: int | None, *, as_json: bool, full: bool
) -> None:
    size = size if size is not None else fragment.size if full else _SHOWN_BYTES
    begin, offset = offset, min(offset, fragment.size)
    end = min(fragment.size, offset + size)
    if as_json:
        shown = b"".join(batches(path, fragment, offset, end))
        found = {"offset": offset, "size": len(shown), "fragment_size": fragment.size, "hex": shown.hex()}
        click.echo(json.dumps(found, indent=2))
    else:
        print_lines(hexdump(batches(path, fragment, offset, end), offset))
    if left := fragment.size - end:
        click.echo(f"vmsnap: {left} more bytes: --offset {end} shows the next ones, --size N more at once", err=True)
    elif begin > fragment.size:
        click.echo(
            f"vmsnap: warning: offset {begin} is beyond the end of {path}, which has {fragment.size} bytes", err=True
        )
    elif not fragment.size:
        click.echo("vmsnap: the fragment is empty", err=True)


@click.command(
    cls=Command,
    examples=["vmsnap show vm1 mem_metadata", "vmsnap show vm1 disks/sda --offset 512 --size 64"],
)
@snapshot_argument
@fragment_argument
@opening_options
@json_option
@click.option("--hex", "as_hex", is_flag=True, help="Show the bytes, even if they are a value.")
@click.option("--format", "format_", type=click.Choice(["cbor", "json"]), help="Decode a value of this format.")
@click.option("--full", is_flag=True, help="Do not shorten anything.")
@click.option("--offset", type=click.IntRange(min=0), metavar="N", help="Show bytes, beginning with this one.")
@click.option("--size", type=click.IntRange(min=0), metavar="N", help="Show this many bytes.  [default: 4096]")
@store_options
def show(
    snapshot: Snapshot,
    path: str,
    keys: OpeningKeys,
    as_json: bool,
    as_hex: bool,
    format_: Literal["cbor", "json"] | None,
    full: bool,
    offset: int | None,
    size: int | None,
) -> None:
    """Show a fragment as a decoded value, or as a hex dump.

    A fragment of up to 16 MiB that is one CBOR or JSON value is shown as that value. Integers from 65536 are also shown
    in hexadecimal, short byte strings as h'00ff', long ones as hex dumps and shortened unless --full is given. Any
    other fragment is shown as hexdump -C does, the first 4 KiB of it. --format decodes a value of any size, and fails
    if the fragment is not one.

    --json prints a value as one JSON document: byte strings as {"hex": "..."}, floats that JSON lacks as "NaN", "inf"
    and "-inf", maps whose keys are not text as lists of [key, value], sets as lists, arrays as nested lists, UUIDs
    and times as text. Bytes are printed as {"offset", "size", "fragment_size", "hex"}.
    """
    raw = as_hex or offset is not None or size is not None
    if raw and format_:
        raise click.UsageError("--format decodes a value: it cannot be combined with --hex, --offset or --size")
    namespace, name = locate(keys.open(snapshot), path)
    with namespace.raw_fragment(name) as fragment:
        if not raw and (format_ or fragment.size <= _VALUE_BYTES):
            try:
                value = namespace.read_fragment(name, format=format_)
            except CorruptSnapshotError as error:
                if format_:
                    raise CorruptSnapshotError(f"{error}; without --format, show detects the format") from error
            else:
                _show_value(value, as_json=as_json, full=full)
                return
        elif not raw:
            click.echo("vmsnap: longer than 16 MiB, shown as bytes; --format cbor or json decodes a value", err=True)
        _show_bytes(path, fragment, offset or 0, size, as_json=as_json, full=full)
