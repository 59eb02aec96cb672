"""``vmsnap show``: a fragment as a value that a person can read, or as a hex dump."""

import json
from pathlib import Path
from typing import Literal

import click

from vmsnap import CorruptSnapshotError, FragmentReader
from vmsnap.cli.hexdump import hexdump
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.places import directory_argument, fragment_argument, json_option, locate, pieces
from vmsnap.cli.terminal import print_lines
from vmsnap.cli.values import json_value, value_lines

# A fragment that is longer is taken for raw bytes, so that guest memory is not read whole to find out.
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
    offset = min(offset, fragment.size)
    end = min(fragment.size, offset + size)
    if as_json:
        part = b"".join(pieces(path, fragment, offset, end))
        shown = {"offset": offset, "size": len(part), "fragment_size": fragment.size, "hex": part.hex()}
        click.echo(json.dumps(shown, indent=2))
    else:
        print_lines(hexdump(pieces(path, fragment, offset, end), offset))
    if left := fragment.size - end:
        click.echo(f"vmsnap: {left} more bytes follow: --offset {end} shows the next, --size N more at once", err=True)
    elif not fragment.size:
        click.echo("vmsnap: the fragment is empty", err=True)


@click.command()
@directory_argument
@fragment_argument
@opening_options
@json_option
@click.option("--hex", "as_hex", is_flag=True, help="Show the bytes, even of a value.")
@click.option("--format", "format_", type=click.Choice(["cbor", "json"]), help="Read a value in this format.")
@click.option("--full", is_flag=True, help="Cut nothing off.")
@click.option("--offset", type=click.IntRange(min=0), help="Show the bytes from this one.")
@click.option("--size", type=click.IntRange(min=0), help="Show so many bytes. [default: 4096]")
def show(
    directory: Path,
    path: str,
    keys: OpeningKeys,
    as_json: bool,
    as_hex: bool,
    format_: Literal["cbor", "json"] | None,
    full: bool,
    offset: int | None,
    size: int | None,
) -> None:
    """Show a fragment: the value in it, or its bytes.

    PATH is the fragment's, with the namespaces it is in: a/b/name.

    A fragment of up to 16 MiB that is one value in CBOR or JSON is shown as that value: whole numbers from 65536 in
    hexadecimal too, byte strings as h'...' or as a hex dump, long ones cut off unless --full is given. Any other
    fragment is shown as `hexdump -C` would, 4 KiB of it. --format takes a value of any size, and it is an error where
    there is none.

    --json prints a value as one JSON document: byte strings as {"hex": "..."}; floats that JSON has not as "NaN",
    "inf" and "-inf"; maps with a key that is no text as a list of [key, value]; sets as lists; arrays as nested lists;
    UUIDs and times as text. Bytes are {"offset", "size", "fragment_size", "hex"}.
    """
    raw = as_hex or offset is not None or size is not None
    if raw and format_:
        raise click.UsageError("--format is for a value: it goes with none of --hex, --offset and --size")
    namespace, name = locate(keys.open(directory), path)
    with namespace.raw_fragment(name) as fragment:
        if not raw and (format_ or fragment.size <= _VALUE_BYTES):
            try:
                value = namespace.read_fragment(name, format=format_)
            except CorruptSnapshotError:
                if format_:
                    raise
            else:
                _show_value(value, as_json=as_json, full=full)
                return
        elif not raw:
            click.echo("vmsnap: longer than 16 MiB: if it is a value, --format cbor or json shows it", err=True)
        _show_bytes(path, fragment, offset or 0, size, as_json=as_json, full=full)
