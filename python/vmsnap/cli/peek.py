"""``vmsnap peek``: guest memory at an address, as a hex dump."""

import json
import re
from collections.abc import Iterator

import click

from vmsnap import GuestMemory
from vmsnap.cli.command import Command, argument
from vmsnap.cli.hexdump import hexdump
from vmsnap.cli.io import COPY_BATCH_BYTES
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import json_option, threads_option
from vmsnap.cli.targets import namespace_option, open_memory, snapshot_argument
from vmsnap.cli.terminal import print_lines

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class _Number(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """An address or a size: decimal, also with K, M, G or T for powers of 1024, or hexadecimal after 0x."""

    name = "number"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(0x[0-9a-f]+)|([0-9]+)([kmgt]?)(i?b)?", str(value), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is not a number such as 4096, 0x1000 or 4K", parameter, context)
        digits, decimal, unit, _ = found.groups()
        return int(digits, 16) if digits else int(decimal) * _UNITS[unit.lower()]


def _batches(memory: GuestMemory, address: int, size: int) -> Iterator[bytes]:
    for at in range(address, address + size, COPY_BATCH_BYTES):
        yield memory.read(at, min(COPY_BATCH_BYTES, address + size - at))


@click.command(cls=Command, examples=["vmsnap peek vm1 0x1000 64", "vmsnap peek vm1 0x100000000 4K --json"])
@snapshot_argument
@argument("address", metavar="ADDRESS", description="The guest-physical address of the first byte.", type=_Number())
@argument("size", metavar="SIZE", description="The number of bytes.", type=_Number())
@namespace_option
@opening_options
@json_option
@threads_option
@store_options
def peek(
    snapshot: Snapshot,
    address: int,
    size: int,
    namespace: str,
    keys: OpeningKeys,
    as_json: bool,
    threads: int | None,
) -> None:
    """Show guest memory at an address, as hexdump -C does.

    Numbers are decimal (4096), decimal with a unit (4K, 2M, 1G), or hexadecimal (0x1000). Only the chunks that contain
    the bytes are read, decrypted and decompressed. A range that leaves its region is an error.
    """
    memory = open_memory(snapshot, namespace, keys, threads)
    if not any(each.start <= address and address + size <= each.stop for each in memory.regions):
        memory.read(address, size)  # raises the error that names the regions
    if as_json:
        click.echo(json.dumps({"address": address, "size": size, "hex": memory.read(address, size).hex()}))
    else:
        print_lines(hexdump(_batches(memory, address, size), address))
