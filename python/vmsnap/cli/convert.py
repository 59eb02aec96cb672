"""``vmsnap encrypt`` and ``vmsnap decrypt``: a snapshot copied into a new one, with another key or none."""

from pathlib import Path

import click

from vmsnap import SnapshotReader, SnapshotWriter
from vmsnap.cli.dump import CHUNK_BYTES
from vmsnap.cli.keys import (
    OpeningKeys,
    WritingKeys,
    no_durable_option,
    opening_options,
    threads_option,
    writing_options,
)
from vmsnap.cli.paths import PATH
from vmsnap.cli.places import pieces, walk
from vmsnap.cli.terminal import human_size, progress

# Of a plain fragment: the library's own for those of a few pages, that of a dump for memory and disks.
_SMALL_BYTES = 1 << 18
_SMALL_CHUNK_BYTES = 4096


def copy_snapshot(source: SnapshotReader, target: SnapshotWriter) -> tuple[int, int]:
    """Copy everything; returns how many fragments, and bytes. Encrypted fragments keep their chunk sizes."""
    total = sum(fragment.size for _, fragment in walk(source))
    count = 0
    with progress("copy", total) as advance:
        pending = [(source, target)]
        while pending:
            reader, writer = pending.pop()
            for name in reader.list_fragments():
                with reader.raw_fragment(name) as old:
                    chunk = old.chunk_size_bytes or (_SMALL_CHUNK_BYTES if old.size <= _SMALL_BYTES else CHUNK_BYTES)
                    with writer.raw_fragment(name, chunk_size_bytes=chunk) as new:
                        for piece in pieces(name, old, 0, old.size):
                            new.write(piece)
                            advance(len(piece))
                count += 1
            pending += [(reader.namespace(name), writer.add_namespace(name)) for name in reader.list_namespaces()]
    return count, total


def _convert(
    source: Path, target: Path, keys: OpeningKeys, new_keys: WritingKeys, *, threads: int | None, durable: bool
) -> None:
    reader = keys.open(source, threads=threads)
    with new_keys.stage(target, threads=threads, durable=durable) as writer:
        count, size = copy_snapshot(reader, writer)
    click.echo(f"vmsnap: copied {human_size(size)}, fragments: {count}", err=True)


_source = click.argument("source", metavar="SRC", type=PATH)
_target = click.argument("target", metavar="DST", type=PATH)


@click.command()
@_source
@_target
@opening_options
@writing_options("new-")
@threads_option
@no_durable_option
def encrypt(
    source: Path, target: Path, keys: OpeningKeys, new_keys: WritingKeys, threads: int | None, no_durable: bool
) -> None:
    """Copy a snapshot into a new one DST that is encrypted.

    For whom is said by -r, -R, --new-key-file or one of --new-passphrase...; your own identity otherwise. SRC may be
    encrypted too, and is opened as by other commands: the copy has a data key of its own, so that who could open SRC
    cannot open it. Chunk sizes are kept.

    DST appears when it is complete, and is sealed. A copy that fails leaves nothing behind.
    """
    given = WritingKeys(True, new_keys.key, new_keys.recipients, new_keys.passphrase)
    _convert(source, target, keys, given, threads=threads, durable=not no_durable)


@click.command()
@_source
@_target
@opening_options
@threads_option
@no_durable_option
def decrypt(source: Path, target: Path, keys: OpeningKeys, threads: int | None, no_durable: bool) -> None:
    """Copy an encrypted snapshot into a new one DST that is plain: readable by all who may read its files.

    DST appears when it is complete, and is sealed. A copy that fails leaves nothing behind.
    """
    _convert(source, target, keys, WritingKeys(), threads=threads, durable=not no_durable)
