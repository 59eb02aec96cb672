"""``vmsnap dump``: a process' memory, or a file, into a new snapshot."""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from vmsnap import InvalidArgumentError, SnapshotWriter
from vmsnap.cli.failure import CommandError
from vmsnap.cli.hold import Moved, while_stopped
from vmsnap.cli.image import Image, format_option, open_image, refuse_format
from vmsnap.cli.keys import WritingKeys, no_durable_option, threads_option, writing_options
from vmsnap.cli.paths import PATH
from vmsnap.cli.process import Mapping, Process, parse_maps, range_name
from vmsnap.cli.terminal import human_size, printable, progress
from vmsnap.process import ProcessRange

# Fits a second-level cache, and is enough chunks for every thread to have some.
PIECE_BYTES = 1 << 20
# As fast as larger ones, and a random read decrypts no more than this.
CHUNK_BYTES = 1 << 16

# A fragment holds every byte of its range, and some processes map terabytes that they never touch: there is none of a
# hole that is so long.
_HOLE_BYTES = 1 << 30
# Looked for so often: a fragment ends in no more zeros than these.
_HOLE_STEP_BYTES = 1 << 26

chunk_size_option = click.option(
    "--chunk-size",
    type=click.IntRange(32, 64 << 20),
    default=CHUNK_BYTES,
    show_default=True,
    help="Bytes encrypted together.",
)


@dataclass
class Summary:
    """What a dump stored, and what it could not."""

    fragments: int = 0
    size: int = 0
    left_out: list[str] = field(default_factory=list)

    def tell_left_out(self) -> None:
        """Name on standard error what could not be read."""
        for text in self.left_out:
            click.echo(f"vmsnap: left out: {printable(text)}", err=True)


def store_file(writer: SnapshotWriter, image: Image, chunk_size_bytes: int) -> Summary:
    """Store a file, or what a pipe gives, as the fragment ``ram``."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    summary = Summary(fragments=1, size=len(image.head))
    with (
        writer.raw_fragment("ram", chunk_size_bytes=chunk_size_bytes) as fragment,
        progress("dump", image.size) as advance,
    ):
        fragment.write(image.head)
        while count := image.read_into(buffer):
            fragment.write(buffer[:count])
            advance(count)
            summary.size += count
    return summary


def store_process(
    writer: SnapshotWriter, process: Process, chunk_size_bytes: int, advance: Callable[[int], None]
) -> Summary:
    """Store the readable mappings of a process, each a fragment of the namespace ``mem``, and its ``maps``.

    A fragment holds every byte of the range in its name. Where a mapping has pages that cannot be read, or a very long
    hole, the ranges around them are stored, and they are named in the summary; a mapping with nothing else is left out.
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
        raise CommandError(f"process {process.pid} has no memory to read: it has ended, or is one of the kernel's")
    if hidden := len(mappings) - len(readable):
        summary.left_out.append(f"mappings that the process itself may not read: {hidden}")
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
    buffer = memoryview(bytearray(PIECE_BYTES))
    pending = [addresses]
    while pending:
        start, end = pending.pop()
        if start == end:
            continue
        at = start
        with memory.raw_fragment(range_name(start, end), chunk_size_bytes=chunk_size_bytes) as fragment:
            while at < end:
                piece = buffer[: end - at]
                count = source.read_into(at - mapping.start, piece)
                if count < len(piece):
                    # What was before the page is read again, since its name tells how long it is.
                    fragment.discard()
                    break
                fragment.write(piece)
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
        # By steps, for a long time may pass.
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


def process_of(target: str) -> int | None:
    """Return the process that `target` names, None where it names a file."""
    if not (target.isascii() and target.isdigit()):
        return None
    if os.path.exists(f"/proc/{target}"):
        return int(target)
    if os.path.exists(target):
        return None
    raise CommandError(f"process {target}: no such process, and no file of that name")


@click.command()
@click.argument("target", metavar="PID|FILE")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--encrypt", is_flag=True, help="Encrypt it; for your own identity, where nothing else is said.")
@writing_options()
@format_option
@chunk_size_option
@threads_option
@no_durable_option
@click.option("--no-stop", is_flag=True, help="Let the process run. What it changes meanwhile may be torn.")
def dump(
    target: str,
    directory: Path,
    new_keys: WritingKeys,
    form: str,
    chunk_size: int,
    threads: int | None,
    no_durable: bool,
    no_stop: bool,
) -> None:
    """Store a process' memory, or a raw RAM file, in a new folder DIR.

    A number is a process, unless there is none of that number but a file. Anything with a slash in it is a file, so
    write ./1234 for a file beside a process 1234.

    A file becomes the fragment "ram"; it may be a pipe, which is read to its end. A file that begins as another format
    is refused, unless it is told to be raw. Of a process each mapping becomes a fragment mem/START-END, named by its
    addresses, and "maps" holds the text of /proc/PID/maps. Pages that cannot be read are left out and named. The
    process is stopped meanwhile, and goes on afterwards if it was running before.

    DIR appears when the dump is complete, and is sealed. A dump that fails leaves nothing behind.
    """
    pid = process_of(target)
    started = time.perf_counter()
    if pid is None:
        with (
            open_image(target, form, may_be_pipe=True) as image,
            new_keys.stage(directory, threads=threads, durable=not no_durable) as writer,
        ):
            summary = store_file(writer, image, chunk_size)
    else:
        refuse_format(form)
        with (
            Process(pid) as process,
            new_keys.stage(directory, threads=threads, durable=not no_durable) as writer,
            # Closed when the process has gone on: it may be the one that shows it.
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
        f"vmsnap: stored {human_size(summary.size)} in {seconds:.2f} s ({human_size(summary.size / seconds)}/s), "
        f"fragments: {summary.fragments}",
        err=True,
    )
    summary.tell_left_out()
