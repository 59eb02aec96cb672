"""``vmsnap dump-memory``, ``restore-memory`` and ``peek``: guest memory into a snapshot, and out of one."""

import errno
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from vmsnap import GuestMemory, GuestRegion, MemoryReport, SnapshotWriter
from vmsnap.cli.copy import new_file, refuse_inside
from vmsnap.cli.dump import PIECE_BYTES, chunk_size_option, process_of
from vmsnap.cli.failure import CommandError
from vmsnap.cli.hexdump import hexdump
from vmsnap.cli.hold import Moved, while_stopped
from vmsnap.cli.image import Image, format_option, open_image, refuse_format
from vmsnap.cli.keys import (
    OpeningKeys,
    WritingKeys,
    no_durable_option,
    opening_options,
    threads_option,
    writing_options,
)
from vmsnap.cli.paths import PATH, TEXT_PATH
from vmsnap.cli.places import directory_argument, enter, json_option, namespace_option
from vmsnap.cli.process import Process, parse_maps
from vmsnap.cli.terminal import human_size, print_lines, progress_so_far

# The kernel's own, the same in every process.
_KERNEL = ("[vvar", "[vsyscall]")

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


compress_option = click.option(
    "--compress", type=click.Choice(["none", "lz4"]), default="none", show_default=True, help="Compression."
)


# click has a type parameter for these since 8.4 only.
class _Number(click.ParamType):  # type: ignore[type-arg]
    """An address or a size: decimal, also with K, M, G or T for powers of 1024, or hexadecimal after 0x."""

    name = "number"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(0x[0-9a-f]+)|([0-9]+)([kmgt]?)(i?b)?", str(value), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is no number: 4096, 0x1000 or 4K", parameter, context)
        digits, decimal, unit, _ = found.groups()
        return int(digits, 16) if digits else int(decimal) * _UNITS[unit.lower()]


class _Range(click.ParamType):  # type: ignore[type-arg]
    """START-END or START-END@GUEST_ADDRESS, in hexadecimal as in /proc/PID/maps, with or without 0x."""

    name = "range"

    def convert(
        self, value: object, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, int, int]:
        number = "(?:0x)?([0-9a-f]+)"
        found = re.fullmatch(f"{number}-{number}(?:@{number})?", str(value), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r} is not START-END or START-END@ADDRESS, in hexadecimal", parameter, context)
        start, end, guest = (None if digits is None else int(digits, 16) for digits in found.groups())
        assert start is not None
        assert end is not None
        if end <= start:
            self.fail(f"{value!r} ends before it begins", parameter, context)
        return start, end, start if guest is None else guest


def open_memory(directory: Path, namespace: str, keys: OpeningKeys, threads: int | None) -> GuestMemory:
    """Open the guest memory in a snapshot, or in a namespace of it."""
    return enter(keys.open(directory, threads=threads), namespace).memory()


def _regions_of_file(image: Image, ranges: tuple[tuple[int, int, int], ...]) -> list[GuestRegion]:
    if not ranges:
        return [GuestRegion(0, image.file)]
    return [GuestRegion(guest, image.file, offset=start, size=end - start) for start, end, guest in ranges]


def _regions_of_process(process: Process, ranges: tuple[tuple[int, int, int], ...]) -> list[GuestRegion]:
    memory = process.memory
    if not ranges:
        mappings = [each for each in parse_maps(process.maps()) if each.readable]
        ranges = tuple((each.start, each.end, each.start) for each in mappings if not each.label.startswith(_KERNEL))
    if not ranges:
        raise CommandError(f"process {process.pid} has no memory to read: it has ended, or is one of the kernel's")
    return [GuestRegion(guest, memory, offset=start, size=end - start) for start, end, guest in ranges]


def _write(
    writer: SnapshotWriter,
    regions: list[GuestRegion],
    compress: str,
    chunk_size: int,
    on_error: Literal["raise", "zero"],
    sparse: bool,
    progress: Callable[[int, int], None],
) -> MemoryReport:
    return writer.write_memory(
        regions,
        compress="lz4" if compress == "lz4" else None,
        chunk_size_bytes=chunk_size,
        on_error=on_error,
        sparse=sparse,
        progress=progress,
    )


def _tell(report: MemoryReport, *, as_json: bool) -> None:
    """Print what was stored: to standard error, or as JSON to standard output."""
    if as_json:
        told = asdict(report) | {"unreadable": [[each.start, each.stop] for each in report.unreadable]}
        click.echo(json.dumps(told))
    else:
        click.echo(
            f"vmsnap: stored {human_size(report.logical_bytes)} of guest memory in {report.seconds:.2f} s: "
            f"{human_size(report.data_bytes)} of data (ranges: {report.ranges:,}), {human_size(report.stored_bytes)} "
            "on disk",
            err=True,
        )
    for addresses in report.unreadable:
        click.echo(f"vmsnap: cannot be read, stored as zeros: {addresses.start:#x}-{addresses.stop:#x}", err=True)


@click.command("dump-memory")
@click.argument("target", metavar="FILE|PID")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--encrypt", is_flag=True, help="Encrypt it; for your own identity, where nothing else is said.")
@writing_options()
@click.option(
    "--range",
    "ranges",
    type=_Range(),
    multiple=True,
    metavar="START-END[@ADDRESS]",
    help="A region, in hexadecimal: where it is in FILE or PID, and its guest-physical address (by default the same).",
)
@format_option
@compress_option
@click.option(
    "--on-error",
    type=click.Choice(["raise", "zero"]),
    help="Pages that cannot be read: an error, or zeros.  [default: zeros where all of a process is stored]",
)
@click.option(
    "--no-sparse", is_flag=True, help="Read everything: do not trust what the file system or the kernel says of holes."
)
@chunk_size_option
@threads_option
@no_durable_option
@click.option("--no-stop", is_flag=True, help="Let the process run. What it changes meanwhile may be torn.")
@json_option
def dump_memory(
    target: str,
    directory: Path,
    new_keys: WritingKeys,
    ranges: tuple[tuple[int, int, int], ...],
    form: str,
    compress: str,
    on_error: Literal["raise", "zero"] | None,
    no_sparse: bool,
    chunk_size: int,
    threads: int | None,
    no_durable: bool,
    no_stop: bool,
    as_json: bool,
) -> None:
    """Store guest memory, of a raw RAM file or of a live process, in a new folder DIR.

    Without --range, a file is one region at address 0; of a process each mapping is a region at its virtual address.
    Holes and pages of zeros are not stored; what the process never touched is not read. A file that begins as another
    format is refused, unless it is told to be raw.

    A number is a process, unless there is none of that number but a file. The process is stopped meanwhile, and goes on
    afterwards if it was running before. Pages that cannot be read are named with their guest-physical address.

    DIR appears when the dump is complete, and is sealed. A dump that fails leaves nothing behind.
    """
    pid = process_of(target)
    if pid is None:
        with (
            open_image(target, form) as image,
            new_keys.stage(directory, threads=threads, durable=not no_durable) as writer,
            progress_so_far("dump") as show,
        ):
            regions = _regions_of_file(image, ranges)
            report = _write(writer, regions, compress, chunk_size, on_error or "raise", not no_sparse, show)
    else:
        refuse_format(form)
        with (
            Process(pid) as process,
            new_keys.stage(directory, threads=threads, durable=not no_durable) as writer,
            # Closed when the process has gone on: it may be the one that shows it.
            progress_so_far("dump", shown=not process.shows_progress()) as show,
        ):

            def store(moved: Moved) -> MemoryReport:
                def progress(done: int, total: int) -> None:
                    moved(done)
                    show(done, total)

                regions = _regions_of_process(process, ranges)
                how = on_error or ("raise" if ranges else "zero")
                return _write(writer, regions, compress, chunk_size, how, not no_sparse, progress)

            report = store(lambda _place: None) if no_stop else while_stopped(process, store)
    _tell(report, as_json=as_json)


@click.command("restore-memory")
@directory_argument
@click.argument("file", metavar="FILE", type=TEXT_PATH)
@namespace_option
@opening_options
@click.option("--region", type=click.IntRange(min=0), metavar="N", help="Only the region of that number, from 0 on.")
@click.option("--force", is_flag=True, help="Replace an existing plain file outside of the snapshot.")
@threads_option
def restore_memory(
    directory: Path, file: str, namespace: str, keys: OpeningKeys, region: int | None, force: bool, threads: int | None
) -> None:
    """Write guest memory to a sparse raw file.

    An address is found at its distance from the lowest one: a region at 0x100000000 comes after the hole before it.
    With --region the file has that region alone.

    A restore that fails leaves nothing behind.
    """
    memory = open_memory(directory, namespace, keys, threads)
    refuse_inside(file, str(directory))
    regions = memory.regions
    if region is not None and region >= len(regions):
        raise CommandError(f"{directory}: has {len(regions)} memory regions, numbered from 0, and no region {region}")
    wanted = range(len(regions)) if region is None else range(region, region + 1)
    lowest = min((regions[number].start for number in wanted), default=0)
    with new_file(file, force=force) as out, progress_so_far("restore") as show:
        targets = [
            GuestRegion(each.start, out.fileno(), offset=each.start - lowest) if number in wanted else None
            for number, each in enumerate(regions)
        ]
        try:
            memory.restore(targets, progress=show)
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            span = human_size(max(regions[number].stop for number in wanted) - lowest)
            raise CommandError(
                f"{file}: cannot have {span}, from the lowest address to the highest: --region N"
            ) from error


def _pieces(memory: GuestMemory, address: int, size: int) -> Iterator[bytes]:
    for at in range(address, address + size, PIECE_BYTES):
        yield memory.read(at, min(PIECE_BYTES, address + size - at))


@click.command()
@directory_argument
@click.argument("address", type=_Number())
@click.argument("size", type=_Number())
@namespace_option
@opening_options
@json_option
@threads_option
def peek(
    directory: Path,
    address: int,
    size: int,
    namespace: str,
    keys: OpeningKeys,
    as_json: bool,
    threads: int | None,
) -> None:
    """Show SIZE bytes of guest memory from the guest-physical ADDRESS on, as hexdump -C does.

    Numbers are decimal, or hexadecimal after 0x; 4K is 4096. Only what is shown is decrypted and decompressed.
    """
    memory = open_memory(directory, namespace, keys, threads)
    if not any(each.start <= address and address + size <= each.stop for each in memory.regions):
        memory.read(address, size)  # says what there is
    if as_json:
        click.echo(json.dumps({"address": address, "size": size, "hex": memory.read(address, size).hex()}))
    else:
        print_lines(hexdump(_pieces(memory, address, size), address))
