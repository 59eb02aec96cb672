"""`import_file`: a snapshot from a file of another program."""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from vmsnap._machine import Machine, RamRange
from vmsnap.errors import QemuError, UnsupportedFormatError
from vmsnap.exchange.compression import decompressed
from vmsnap.exchange.domain import Domain
from vmsnap.exchange.foreign import recognize
from vmsnap.exchange.layout import place
from vmsnap.exchange.libvirt import SaveImage
from vmsnap.exchange.source import Source, opened
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation
from vmsnap.memory import GuestRegion, MemoryReport, Progress
from vmsnap.staging import create

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike, ReadableBuffer, StrPath

    from vmsnap.keys import KeyProvider, Passphrase
    from vmsnap.writer import SnapshotWriter

#: The fragments of a guest that was saved by libvirt.
LIBVIRT_XML, LIBVIRT_COOKIE = "libvirt_xml", "libvirt_cookie"
MACHINE, DEVICE_STATE = "machine", "device_state"


@dataclass(frozen=True)
class ImportReport:
    """The file that `import_file` read, and the sizes of the snapshot."""

    format: Literal["libvirt", "qemu"]
    """The format of the file: of ``virsh save``, or a migration stream of QEMU."""
    compression: str | None
    """The program that compressed the file, such as ``gzip``, or None."""
    machine: Machine
    """The machine that the guest ran on, as far as the file tells."""
    memory: MemoryReport
    """The sizes of the guest memory."""
    device_state_bytes: int
    """The size of the device state, in bytes."""
    seconds: float
    """The time that the call took."""
    snapshot_id: bytes = field(repr=False)
    """The 16 random bytes that identify the snapshot."""
    seal_digest: bytes = field(repr=False)
    """The 32 bytes for `expect_seal_digest` of `open`."""


def import_file(
    file: "StrPath | FileDescriptorLike",
    location: SnapshotLocation,
    encrypt: bool = False,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    recipients: str | Iterable[str] | None = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    compress: Literal["lz4"] | None = None,
    threads: int | None = None,
    durable: bool = True,
    archive: bool | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Make a snapshot of a guest that another program saved in a file.

    The first bytes tell the format: a migration stream that QEMU wrote to a file (``migrate file:PATH``, or
    ``exec:cat > PATH``), or a file of ``virsh save``. Both may be compressed by gzip, bzip2, xz, lzop, zstd or lz4,
    whose programs decompress them. ``vmsnap.qemu.load`` loads the snapshot, and `export_file` makes such a file again.

    Parameters
    ----------
    file
        The path of the file, or an open file or pipe, which is read from its present position on.
    location, encrypt, keys, key, recipients, passphrase, key_provider, threads, durable, archive
        Arguments of `vmsnap.create`.
    compress
        The compression of the guest memory: ``"lz4"``, or None.
    progress
        Called with the number of bytes done and the total. Guest memory is counted twice: it is received, and stored.

    Raises
    ------
    UnsupportedFormatError
        The file is not of such a format, or is truncated or damaged.
    FileNotFoundError
        There is no such file, or the program that decompresses it is not installed.
    InvalidArgumentError
        `file` is a directory or a device, or the snapshot cannot be created, as for `vmsnap.create`.
    FileExistsError, KeyUnavailableError
        The snapshot cannot be created, as for `vmsnap.create`.
    OSError
        The file cannot be read, or the disk is full. Nothing is left behind.
    """
    started = perf_counter()
    given = Keys(encrypt=encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider)
    keys = one_of(keys, given)
    keys = keys if keys.given else None
    with opened(file) as source, ExitStack() as stack:
        contents = _format_of(source)(source, stack)
        staged = create(location, keys=keys, threads=threads, durable=durable, archive=archive)
        with staged as writer:
            try:
                machine, memory, device_state_bytes = _store(contents, source, writer, compress, progress)
                # A program that fails at its end, or an input that could not be read to its end, is an error as well.
                stack.close()
            except QemuError as error:
                source.check()
                raise UnsupportedFormatError(f"{source.label}: {error}") from None
            source.check()
    assert staged.snapshot_id is not None
    assert staged.seal_digest is not None
    return ImportReport(
        format="qemu" if contents.image is None else "libvirt",
        compression=contents.compression,
        machine=machine,
        memory=memory,
        device_state_bytes=device_state_bytes,
        seconds=perf_counter() - started,
        snapshot_id=staged.snapshot_id,
        seal_digest=staged.seal_digest,
    )


@dataclass(frozen=True)
class _Contents:
    """A migration stream that is about to be read."""

    descriptor: int
    compression: str | None = None
    image: SaveImage | None = None
    domain: Domain | None = None


def _qemu(source: Source, _stack: ExitStack) -> _Contents:
    return _Contents(source.descriptor)


def _compressed(compression: str, source: Source, stack: ExitStack) -> _Contents:
    return _Contents(stack.enter_context(decompressed(compression, source.descriptor, source.label)), compression)


def _libvirt(source: Source, stack: ExitStack) -> _Contents:
    image = SaveImage.read(source)
    domain = Domain.parse(image.xml, source.label)
    descriptor, compression = source.descriptor, image.compression
    if compression is not None:
        descriptor = stack.enter_context(decompressed(compression, descriptor, source.label))
    return _Contents(descriptor, compression, image, domain)


#: The formats by their first bytes.
_FORMATS: tuple[tuple[bytes, Callable[[Source, ExitStack], _Contents]], ...] = (
    (rb"LibvirtQemud(Save|Part)", _libvirt),
    (rb"QEVM", _qemu),
    # A compressed migration stream. These are the signatures of vmsnap.exchange.foreign.
    (rb"\x1f\x8b\x08", partial(_compressed, "gzip")),
    (rb"BZh[1-9]1AY&SY", partial(_compressed, "bzip2")),
    (rb"\xfd7zXZ\0", partial(_compressed, "xz")),
    (rb"\x89LZO\0\r\n\x1a\n", partial(_compressed, "lzop")),
    (rb"\x28\xb5\x2f\xfd", partial(_compressed, "zstd")),
    (rb"\x04\x22\x4d\x18", partial(_compressed, "lz4")),
)


def _format_of(source: Source) -> Callable[[Source, ExitStack], _Contents]:
    for begins, begin in _FORMATS:
        if re.match(begins, source.head, re.DOTALL):
            return begin
    if not source.head:
        raise UnsupportedFormatError(f"{source.label} is empty")
    found = recognize(source.head)
    what = f"is {found.name}" if found else "begins like no file that vmsnap can import"
    raise UnsupportedFormatError(
        f"{source.label} {what}: import a file of virsh save, or a migration stream of QEMU; "
        "vmsnap dump stores raw memory"
    )


def _store(
    contents: _Contents,
    source: Source,
    writer: "SnapshotWriter",
    compress: Literal["lz4"] | None,
    progress: Progress | None,
) -> tuple[Machine, MemoryReport, int]:
    """Store a guest, and return its machine, the report of its memory and the size of the device state."""
    image, domain = contents.image, contents.domain
    if image is not None:
        for name, text in ((LIBVIRT_XML, image.xml), (LIBVIRT_COOKIE, image.cookie)):
            if text:
                with writer.raw_fragment(name) as fragment:
                    fragment.write(text)
    halves = _Halves(progress)
    with writer.receive_migration(contents.descriptor, None, progress=halves.first) as stream:
        blocks = [block for block in stream.blocks if block.taken]
        # Without the capability, the pages of a block without records are zero, as in MigrationStream.memory.
        missing = [block.name for block in blocks if stream.ignores_shared and block.size_bytes and not block.records]
        if not blocks or missing:
            left_out = f"the memory {missing[0]!r}" if missing else "the guest memory"
            raise UnsupportedFormatError(
                f"{source.label} does not contain {left_out}: QEMU leaves shared memory out with the capability "
                "x-ignore-shared; save the guest with vmsnap qemu save"
            )
        machine_type = stream.machine_type or (domain.machine_type if domain else "")
        parts = place(machine_type, [(block.name, block.size_bytes) for block in blocks], domain)
        machine = Machine(
            qemu_version="",
            target=domain.architecture if domain else "",
            machine_type=machine_type,
            ram=[RamRange(part.block, part.guest_base, part.offset, part.size, part.mapped) for part in parts],
            state="running" if image is None or image.running else "paused",
        )
        writer.write_fragment(MACHINE, machine)
        regions = [
            GuestRegion(part.guest_base, stream.memory(part.block, part.offset, part.size), size=part.size)
            for part in parts
        ]
        memory = writer.write_memory(regions, compress=compress, progress=halves.second)
        return machine, memory, stream.device_state_bytes


class _Halves:
    """Progress of two steps as one: the first half is the first step."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._size = 0

    def first(self, done: int, total: int) -> None:
        self._size = total
        if self._progress is not None:
            self._progress(min(done, total), 2 * total)

    def second(self, done: int, total: int) -> None:
        if self._progress is not None:
            size = self._size or total
            self._progress(size + (done * size // total if total else size), 2 * size)
