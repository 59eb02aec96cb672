"""``vmsnap dump``: guest memory of a file or of a live process, into a new snapshot."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal, TypeAlias

import click

from vmsnap import GuestRegion, MemoryReport, SnapshotWriter, StagedSnapshot
from vmsnap.cli.command import Command, argument
from vmsnap.cli.failure import CommandError
from vmsnap.cli.hold import Moved, while_stopped
from vmsnap.cli.image import open_image
from vmsnap.cli.keys import WritingKeys, writing_options
from vmsnap.cli.location import Snapshot, new_store_options
from vmsnap.cli.options import (
    archive_option,
    compress_option,
    encrypt_option,
    json_option,
    memory_chunk_size_option,
    no_durable_option,
    no_stop_option,
    take_over_option,
    threads_option,
    uncached_option,
)
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.process import Process, parse_maps
from vmsnap.cli.targets import complete_file, new_snapshot_argument
from vmsnap.cli.terminal import human_size, progress_so_far

# The kernel's own mappings, the same in every process.
_KERNEL = ("[vvar", "[vsyscall]")

# Start and end in the source, and the guest-physical address.
Range: TypeAlias = tuple[int, int, int]


class _Range(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """START-END or START-END@ADDRESS, in hexadecimal as in /proc/PID/maps, with or without 0x."""

    name = "range"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> Range:
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


def process_of(source: str) -> int | None:
    """Return the process that SOURCE names, None if it names a file."""
    if not (source.isascii() and source.isdigit()):
        return None
    if os.path.exists(f"/proc/{source}"):
        return int(source)
    if os.path.exists(source):
        return None
    raise CommandError(f"process {source}: no such process, and no file of that name")


def _regions_of_process(process: Process, ranges: tuple[Range, ...]) -> list[GuestRegion]:
    memory = process.memory
    if not ranges:
        mappings = [each for each in parse_maps(process.maps()) if each.readable]
        ranges = tuple((each.start, each.end, each.start) for each in mappings if not each.label.startswith(_KERNEL))
    if not ranges:
        raise process.without_memory()
    return [GuestRegion(guest, memory, offset=start, size=end - start) for start, end, guest in ranges]


def _tell(report: MemoryReport, *, as_json: bool) -> None:
    """Print the report of a dump: to standard error, or as JSON to standard output."""
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
        click.echo(f"vmsnap: unreadable, stored as zeros: {addresses.start:#x}-{addresses.stop:#x}", err=True)


@click.command(
    cls=Command,
    examples=[
        "vmsnap dump ram.img vm1 --compress lz4 --encrypt",
        "vmsnap dump ram.img vm1 --range 0-c0000000 --range c0000000-140000000@100000000",
        "vmsnap dump 4711 vm1 --range 7f3a00000000-7f3a40000000@0",
    ],
)
@argument(
    "source",
    metavar="SOURCE",
    description="A raw RAM file, a block device, or the ID of a live process. A number is a process ID; if there is no "
    "such process, a file name. ./4711 is always a file.",
    type=TEXT_PATH,
    shell_complete=complete_file,
)
@new_snapshot_argument
@encrypt_option
@writing_options()
@click.option(
    "--range",
    "ranges",
    type=_Range(),
    multiple=True,
    metavar="START-END[@ADDRESS]",
    help="Store only this range of SOURCE, as a region at a guest-physical address. All in hexadecimal; in a process, "
    "START and END are virtual addresses. ADDRESS is START if left out. May be repeated.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "raw"]),
    default="auto",
    show_default=True,
    help="auto refuses a file that begins like another format; raw accepts any file.",
)
@compress_option
@click.option(
    "--on-error",
    type=click.Choice(["raise", "zero"]),
    help="For pages that cannot be read: fail (raise), or store zeros and report them (zero).  [default: zero for a "
    "whole process, otherwise raise]",
)
@click.option("--no-sparse", is_flag=True, help="Read everything, even ranges that the system reports as holes.")
@memory_chunk_size_option
@uncached_option
@threads_option
@archive_option
@no_durable_option
@no_stop_option
@take_over_option
@json_option
@new_store_options
def dump(
    source: str,
    new_snapshot: Snapshot,
    new_keys: WritingKeys,
    ranges: tuple[Range, ...],
    form: str,
    compress: str,
    on_error: Literal["raise", "zero"] | None,
    no_sparse: bool,
    chunk_size: int,
    uncached: bool,
    threads: int | None,
    archive: bool | None,
    no_durable: bool,
    no_stop: bool,
    take_over: bool,
    as_json: bool,
) -> None:
    """Store the memory of a guest in a new snapshot.

    Without --range, a file is one region at address 0, and each mapping of a process is a region at its virtual
    address. Holes and zero pages are not stored. Memory that a process never touched is not read.

    A process is stopped during the dump, and continues afterwards if it was running before. Unreadable pages are
    reported with their guest-physical addresses.

    NEW-SNAPSHOT appears when the dump is complete, and is sealed. A dump that fails leaves nothing behind. A pipe is
    refused: guest memory needs a size and random access.
    """

    def write(
        writer: SnapshotWriter,
        regions: list[GuestRegion],
        default: Literal["raise", "zero"],
        progress: Callable[[int, int], None],
    ) -> MemoryReport:
        return writer.write_memory(
            regions,
            compress="lz4" if compress == "lz4" else None,
            chunk_size_bytes=chunk_size,
            on_error=on_error or default,
            sparse=not no_sparse,
            uncached=uncached,
            progress=progress,
        )

    def stage() -> StagedSnapshot:
        return new_keys.stage(
            new_snapshot, threads=threads, durable=not no_durable, archive=archive, take_over=take_over
        )

    pid = process_of(source)
    if pid is None:
        with (
            open_image(source, form) as file,
            stage() as writer,
            progress_so_far("dump") as show,
        ):
            regions = [GuestRegion(guest, file, offset=start, size=end - start) for start, end, guest in ranges]
            report = write(writer, regions or [GuestRegion(0, file)], "raise", show)
    else:
        if form != "auto":
            raise click.UsageError("--format applies to files, but SOURCE is a process")
        with (
            Process(pid) as process,
            stage() as writer,
            # Closed after the process continues: the process may be the terminal that shows the bar.
            progress_so_far("dump", shown=not process.shows_progress()) as show,
        ):

            def store(moved: Moved) -> MemoryReport:
                def progress(done: int, total: int) -> None:
                    moved(done)
                    show(done, total)

                return write(writer, _regions_of_process(process, ranges), "raise" if ranges else "zero", progress)

            report = store(lambda _place: None) if no_stop else while_stopped(process, store)
    _tell(report, as_json=as_json)
