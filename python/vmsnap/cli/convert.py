"""``vmsnap encrypt`` and ``vmsnap decrypt``: a snapshot copied into a new one, with another key or with none."""

import click

from vmsnap import SnapshotReader, SnapshotWriter
from vmsnap.cli.command import Command
from vmsnap.cli.io import batches
from vmsnap.cli.keys import OpeningKeys, WritingKeys, opening_options, writing_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import CHUNK_BYTES, archive_option, no_durable_option, threads_option
from vmsnap.cli.targets import new_snapshot_argument, snapshot_argument, walk
from vmsnap.cli.terminal import human_size, progress

# Of a plain fragment: the library's own chunk size for a few pages, that of a dump for memory and disks.
_SMALL_BYTES = 1 << 18
_SMALL_CHUNK_BYTES = 4096


def copy_snapshot(source: SnapshotReader, target: SnapshotWriter) -> tuple[int, int]:
    """Copy everything, and return the number of fragments and of bytes. Encrypted fragments keep their chunk sizes."""
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
                        for batch in batches(name, old, 0, old.size):
                            new.write(batch)
                            advance(len(batch))
                count += 1
            pending += [(reader.namespace(name), writer.add_namespace(name)) for name in reader.list_namespaces()]
    return count, total


def _convert(
    source: Snapshot,
    target: Snapshot,
    keys: OpeningKeys,
    new_keys: WritingKeys,
    *,
    threads: int | None,
    durable: bool,
    archive: bool | None,
) -> None:
    reader = keys.open(source, threads=threads)
    with new_keys.stage(target, threads=threads, durable=durable, archive=archive) as writer:
        count, size = copy_snapshot(reader, writer)
    click.echo(f"vmsnap: copied {count} fragment{'' if count == 1 else 's'}, {human_size(size)}", err=True)


@click.command(
    cls=Command,
    examples=["vmsnap encrypt vm1 vm2", "vmsnap encrypt vm1 vm2 -i id.txt -R team.txt"],
)
@snapshot_argument
@new_snapshot_argument
@opening_options
@writing_options("new-")
@threads_option
@archive_option
@no_durable_option
@store_options
def encrypt(
    snapshot: Snapshot,
    new_snapshot: Snapshot,
    keys: OpeningKeys,
    new_keys: WritingKeys,
    threads: int | None,
    archive: bool | None,
    no_durable: bool,
) -> None:
    """Copy a snapshot into a new one that is encrypted.

    -r, -R, --new-key-file or a --new-passphrase option says who can open the copy; without any of them, your own
    identity. SNAPSHOT may be encrypted itself. The copy gets a new data key, so somebody who kept that of
    SNAPSHOT cannot open the copy. Chunk sizes are kept.

    NEW-SNAPSHOT appears when it is complete, and is sealed. A copy that fails leaves nothing behind.
    """
    given = WritingKeys(True, new_keys.key, new_keys.recipients, new_keys.passphrase)
    _convert(snapshot, new_snapshot, keys, given, threads=threads, durable=not no_durable, archive=archive)


@click.command(
    cls=Command, examples=["vmsnap decrypt vm1 vm1-plain", "vmsnap decrypt vm1 vm1-plain --passphrase-file secret.txt"]
)
@snapshot_argument
@new_snapshot_argument
@opening_options
@threads_option
@archive_option
@no_durable_option
@store_options
def decrypt(
    snapshot: Snapshot,
    new_snapshot: Snapshot,
    keys: OpeningKeys,
    threads: int | None,
    archive: bool | None,
    no_durable: bool,
) -> None:
    """Copy an encrypted snapshot into a new one that is plain.

    Everybody who may read the files of NEW-SNAPSHOT can read its contents.

    NEW-SNAPSHOT appears when it is complete, and is sealed. A copy that fails leaves nothing behind.
    """
    _convert(snapshot, new_snapshot, keys, WritingKeys(), threads=threads, durable=not no_durable, archive=archive)
