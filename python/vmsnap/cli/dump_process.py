"""``vmsnap dump-process``: all mappings of a process, each a fragment of a new snapshot."""

import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click

from vmsnap import InvalidArgumentError, SnapshotWriter
from vmsnap.cli.command import Command, argument
from vmsnap.cli.hold import Moved, while_stopped
from vmsnap.cli.io import COPY_BATCH_BYTES
from vmsnap.cli.keys import WritingKeys, writing_options
from vmsnap.cli.location import Snapshot, new_store_options
from vmsnap.cli.options import (
    archive_option,
    chunk_size_option,
    encrypt_option,
    no_durable_option,
    no_stop_option,
    threads_option,
)
from vmsnap.cli.process import Mapping, Process, parse_maps, range_name
from vmsnap.cli.targets import new_snapshot_argument
from vmsnap.cli.terminal import human_size, printable, progress
from vmsnap.process import ProcessRange

# A fragment holds every byte of its range, and some processes map terabytes that they never touch: a hole of this size
# is left out.
_HOLE_BYTES = 1 << 30
# Holes are searched in steps of this size, so a fragment ends in no more zeros than these.
_HOLE_STEP_BYTES = 1 << 26


@dataclass
class Summary:
    """The number and size of stored fragments, and the memory that was left out."""

    fragments: int = 0
    size: int = 0
    left_out: list[str] = field(default_factory=list)

    def tell_left_out(self) -> None:
        """Print the memory that was left out on standard error."""
        for text in self.left_out:
            click.echo(f"vmsnap: left out: {printable(text)}", err=True)


def store_process(
    writer: SnapshotWriter, process: Process, chunk_size_bytes: int, advance: Callable[[int], None]
) -> Summary:
    """Store the readable mappings of a process, each a fragment of the namespace ``mem``, and its ``maps``.

    A fragment holds every byte of the range in its name. If a mapping has unreadable pages, or a very long hole, the
    ranges around them are stored and the summary names them. A mapping without any readable page is left out.
    """
    maps = process.maps()
    with writer.raw_fragment("maps", chunk_size_bytes=chunk_size_bytes) as fragment:
        fragment.write(maps)
    mappings = parse_maps(maps)
    readable = [mapping for mapping in mappings if mapping.readable]
    summary = Summary(fragments=1, size=len(maps))
    memory = writer.add_namespace("mem")
    for mapping in readable:
        _store_mapping(memory, process, mapping, chunk_size_bytes, summary, advance)
    if summary.fragments == 1:
        raise process.without_memory()
    if hidden := len(mappings) - len(readable):
        summary.left_out.append(f"{hidden} mappings that the process itself may not read")
    return summary


def _store_mapping(
    memory: SnapshotWriter,
    process: Process,
    mapping: Mapping,
    chunk_size_bytes: int,
    summary: Summary,
    advance: Callable[[int], None],
) -> None:
    try:
        source = process.range(mapping.start, mapping.end)
    except InvalidArgumentError:  # unmapped meanwhile, by a process that is not stopped
        summary.left_out.append(f"{range_name(mapping.start, mapping.end)} {mapping.label}")
        return
    done = mapping.start
    for start, end in _long_holes(source, mapping):
        _store_range(memory, source, mapping, (done, start), chunk_size_bytes, summary, advance)
        summary.left_out.append(f"{range_name(start, end)} {mapping.label} (nothing but zeros)")
        advance(end - start)
        done = end
    _store_range(memory, source, mapping, (done, mapping.end), chunk_size_bytes, summary, advance)


def _store_range(
    memory: SnapshotWriter,
    source: ProcessRange,
    mapping: Mapping,
    addresses: tuple[int, int],
    chunk_size_bytes: int,
    summary: Summary,
    advance: Callable[[int], None],
) -> None:
    buffer = memoryview(bytearray(COPY_BATCH_BYTES))
    pending = [addresses]
    while pending:
        start, end = pending.pop()
        if start == end:
            continue
        at = start
        with memory.raw_fragment(range_name(start, end), chunk_size_bytes=chunk_size_bytes) as fragment:
            while at < end:
                batch = buffer[: end - at]
                count = source.read_into(at - mapping.start, batch)
                if count < len(batch):
                    # The range before the page is read again, because its fragment gets another name.
                    fragment.discard()
                    break
                fragment.write(batch)
                advance(count)
                at += count
        if at == end:
            summary.fragments += 1
            summary.size += end - start
            continue
        advance(start - at)
        bad = at + count
        resume = _next_readable(source, mapping, (bad, end), advance)
        summary.left_out.append(f"{range_name(bad, resume)} {mapping.label}")
        pending += [(resume, end), (start, bad)]


def _next_readable(
    source: ProcessRange, mapping: Mapping, addresses: tuple[int, int], advance: Callable[[int], None]
) -> int:
    at, end = addresses
    while at < end:
        # In steps, because the search may take long.
        until = min(at + _HOLE_STEP_BYTES, end)
        found = source.next_readable(at - mapping.start, until - mapping.start) + mapping.start
        advance(found - at)
        if found < until:
            return found
        at = until
    return end


def _long_holes(source: ProcessRange, mapping: Mapping) -> Iterator[tuple[int, int]]:
    """Give the ranges of addresses that hold nothing but zeros for very long."""
    at = mapping.start
    while at < mapping.end:
        found = source.next_data(at - mapping.start)
        data = mapping.end if found is None else mapping.start + found - found % mmap.PAGESIZE
        if data - at >= _HOLE_BYTES:
            yield at, data
        at = max(at, data) + _HOLE_STEP_BYTES


class _Pid(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """The ID of a process."""

    name = "process ID"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdigit()):
            self.fail(f"{text!r} is not a process ID; to store a file, use vmsnap dump", parameter, context)
        return int(text)


@click.command(
    "dump-process",
    cls=Command,
    examples=["vmsnap dump-process 4711 process1 --encrypt", "vmsnap dump-process 4711 process1 --key-file vm.key"],
)
@argument("pid", metavar="PID", description="The ID of the process.", type=_Pid())
@new_snapshot_argument
@encrypt_option
@writing_options()
@chunk_size_option
@threads_option
@archive_option
@no_durable_option
@no_stop_option
@new_store_options
def dump_process(
    pid: int,
    new_snapshot: Snapshot,
    new_keys: WritingKeys,
    chunk_size: int,
    threads: int | None,
    archive: bool | None,
    no_durable: bool,
    no_stop: bool,
) -> None:
    """Store all memory of a process, a fragment per mapping.

    This is for examining a process. For the memory of a guest use "vmsnap dump", which leaves out holes, and stores
    memory by guest-physical address.

    The fragment "mem/START-END" holds the mapping at these addresses, and the fragment "maps" the text of
    /proc/PID/maps. Pages that cannot be read, and holes of 1 GiB or more, are left out and reported.

    The process is stopped during the dump, and continues afterwards if it was running before.

    NEW-SNAPSHOT appears when the dump is complete, and is sealed. A dump that fails leaves nothing behind.
    """
    started = time.perf_counter()
    with (
        Process(pid) as process,
        new_keys.stage(new_snapshot, threads=threads, durable=not no_durable, archive=archive) as writer,
        # Closed after the process continues: the process may be the terminal that shows the bar.
        progress("dump", process.readable_bytes(), shown=not process.shows_progress()) as show,
    ):

        def store(moved: Moved) -> Summary:
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                moved(done)
                show(count)

            return store_process(writer, process, chunk_size, advance)

        summary = store(lambda _place: None) if no_stop else while_stopped(process, store)
    seconds = time.perf_counter() - started
    click.echo(
        f"vmsnap: stored {human_size(summary.size)} in {seconds:.2f} s ({human_size(summary.size / seconds)}/s) in "
        f"{summary.fragments} fragments",
        err=True,
    )
    summary.tell_left_out()
