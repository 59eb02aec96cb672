"""`export_file`: a file for another program from a snapshot."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from vmsnap._machine import Machine, listed_name
from vmsnap.errors import InvalidArgumentError, QemuError
from vmsnap.exchange.domain import Domain
from vmsnap.exchange.importing import DEVICE_STATE, LIBVIRT_COOKIE, LIBVIRT_XML, MACHINE
from vmsnap.exchange.libvirt import MAX_XML_BYTES, SaveImage
from vmsnap.exchange.new_file import new_file
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation
from vmsnap.memory import Progress
from vmsnap.migration import SentBlock
from vmsnap.reader import SnapshotReader

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike, ReadableBuffer, StrPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase


@dataclass(frozen=True)
class ExportReport:
    """The file that `export_file` wrote."""

    written_bytes: int
    """The size of the file."""
    machine: Machine
    """The machine that the guest ran on."""
    seconds: float
    """The time that the call took."""


def export_file(
    location: SnapshotLocation,
    file: "StrPath | FileDescriptorLike",
    format: Literal["libvirt", "qemu"],
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
    durable: bool = True,
    xml: "StrPath | None" = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the QEMU guest in a snapshot to a file of another program.

    The file is not encrypted and not compressed. It contains all of the guest memory; zero pages take 9 bytes.

    Parameters
    ----------
    location
        The snapshot: a directory, or an archive.
    file
        The path of the file, where nothing may exist, or an open file or pipe.
    format
        ``"qemu"`` for a migration stream, which QEMU loads with ``-incoming file:PATH`` or ``exec:cat PATH``, or
        ``"libvirt"`` for a file that ``virsh restore`` accepts.
    keys, key, identities, passphrase, key_provider, threads, expect_seal_digest
        Arguments of `vmsnap.open`.
    durable
        Whether the call waits until a new file is on the disk.
    xml
        A file with the XML of the libvirt domain, as ``virsh dumpxml --security-info --migratable`` prints it. A
        snapshot that was imported from libvirt has its own, which is the default.
    progress
        Called with the number of bytes of memory done and the total.

    Raises
    ------
    QemuError
        The snapshot does not contain a QEMU guest, its device state lacks a block of the guest memory, or the XML of
        the domain is missing. Nothing was written.
    FileExistsError
        Something exists at the path.
    InvalidArgumentError
        `format` is unknown, or the XML of the domain is not valid.
    AuthenticationError, CorruptSnapshotError
        The snapshot is damaged or was changed. A new file is removed.
    KeyUnavailableError, NotEncryptedError, NotSealedError, FileNotFoundError, UnsupportedFormatError
        The snapshot cannot be opened, as for `vmsnap.open`.
    OSError
        The file cannot be written. A new file is removed; bytes that were written to an open file stay there.
    """
    started = perf_counter()
    if format not in ("libvirt", "qemu"):
        raise InvalidArgumentError(f'format must be "libvirt" or "qemu", not {format!r}')
    if xml is not None and format != "libvirt":
        raise InvalidArgumentError('xml is only for the format "libvirt"')
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    keys = one_of(keys, given)
    reader = SnapshotReader(
        location, keys=keys if keys.given else None, threads=threads, expect_seal_digest=expect_seal_digest
    )
    machine = _machine_of(reader)
    header = _header(reader, machine, xml) if format == "libvirt" else b""
    sent = _sent(reader, machine)
    with _output(file, durable=durable) as output:
        rest = memoryview(header)
        while rest:
            rest = rest[os.write(output, rest) :]
        written = reader.send_migration(output, sent, threads=threads, progress=progress)
    return ExportReport(len(header) + written, machine, perf_counter() - started)


@contextmanager
def _output(file: "StrPath | FileDescriptorLike", *, durable: bool) -> Iterator[int]:
    if isinstance(file, (str, os.PathLike)):
        with new_file(os.fspath(file), durable=durable) as descriptor:
            yield descriptor
    else:
        yield file if isinstance(file, int) else file.fileno()


def _machine_of(reader: SnapshotReader) -> Machine:
    names = reader.list_fragments()
    for name, what in ((MACHINE, "does not contain a QEMU guest"), (DEVICE_STATE, "contains no device state")):
        if name not in names:
            raise QemuError(f"{reader.location} {what}: it has no fragment {name!r}")
    machine = reader.read_fragment(MACHINE, type=Machine)
    machine.check_format(reader.location)
    return machine


def _sent(reader: SnapshotReader, machine: Machine) -> list[SentBlock]:
    """Return the blocks of guest memory, with the places of their pages in the snapshot.

    Raises
    ------
    QemuError
        The device state lacks a block.
    """
    listed = {name for name, _ in reader.migration_front(DEVICE_STATE).blocks}
    ranges = dict[str, list[tuple[int, int, int]]]()
    for each in machine.ram:
        if (name := listed_name(each.stream_name, listed)) is None:
            raise QemuError(
                f"{reader.location} cannot be exported: its device state lacks the guest memory {each.stream_name!r}"
                f"{_why_lacking(machine)}; load the snapshot with vmsnap qemu load"
            )
        ranges.setdefault(name, []).append((each.offset, each.guest_base, each.size))
    # Pages of zeros too: the memory that the file is loaded into may contain other bytes. vmsnap 0.1 left all memory in
    # the stream of QEMU 8.1 and newer, beside `mem`.
    return [SentBlock(name, name, parts, zeros=True, replaced=True) for name, parts in ranges.items()]


def _why_lacking(machine: Machine) -> str:
    """Return why a device state may lack guest memory: QEMU marks the memory of virtio-pmem as not migratable."""
    if any(each.type.startswith("virtio-pmem") for each in machine.devices or []):
        return ", because QEMU never migrates the memory of a virtio-pmem device"
    return ""


def _header(reader: SnapshotReader, machine: Machine, xml: "StrPath | None") -> bytes:
    """Return the beginning of a file of libvirt."""
    stored = LIBVIRT_XML in reader.list_fragments()
    if xml is not None:
        label = os.fspath(xml)
        with Path(xml).open("rb") as file:
            text = file.read(MAX_XML_BYTES + 1).rstrip(b"\n")
    elif stored:
        label = f"{reader.location}, fragment {LIBVIRT_XML}"
        text = _read(reader, LIBVIRT_XML)
    else:
        raise QemuError(
            f"{reader.location} cannot be exported for libvirt: the XML of the domain is missing, because the guest "
            "was not imported from libvirt; pass the output of virsh dumpxml --security-info --migratable as xml "
            "(--xml FILE)"
        )
    Domain.parse(text, label)
    # The cookie belongs to the XML that libvirt wrote with it.
    cookie = _read(reader, LIBVIRT_COOKIE) if xml is None and LIBVIRT_COOKIE in reader.list_fragments() else b""
    return SaveImage(text, cookie, machine.state != "paused").header()


def _read(reader: SnapshotReader, name: str) -> bytes:
    with reader.raw_fragment(name) as fragment:
        return fragment.read(MAX_XML_BYTES + 1)
