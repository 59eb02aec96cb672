"""Virtual-machine snapshots: encrypted, written in parallel, readable at random.

A snapshot is a folder of fragments (byte blobs: guest memory, a disk, a device's state), nested by namespaces.

>>> import pathlib, tempfile, vmsnap
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> key = vmsnap.generate_key()
>>> writer = vmsnap.SnapshotWriter(folder / "vm1", key=key)
>>> with writer.add_namespace("disks").raw_fragment("sda", chunk_size_bytes=65536) as fragment:
...     fragment.write(b"boot sector" * 1000)
11000
>>> reader = vmsnap.SnapshotReader(folder / "vm1", key=key)
>>> with reader.namespace("disks").raw_fragment("sda") as fragment:
...     fragment.read_at(11, 4), fragment.size
(b'boot', 11000)
"""

from vmsnap._vmsnap import __version__, aead_provider, generate_key
from vmsnap.errors import (
    AuthenticationError,
    CorruptSnapshotError,
    FragmentStateError,
    InvalidArgumentError,
    KeyUnavailableError,
    NewIdentityWarning,
    NotEncryptedError,
    NotSealedError,
    QemuError,
    SerializationError,
    UnsupportedFormatError,
    VmsnapError,
)
from vmsnap.io import Fragment, FragmentReader
from vmsnap.keys import IdentityFile, KeyProvider, generate_identity, recipients_of, rekey
from vmsnap.memory import GuestMemory, GuestRegion, MemoryReport, ProcessMemory
from vmsnap.sealing import (
    Cleaned,
    Problem,
    StagedSnapshot,
    Verification,
    clean,
    create,
    open,
    seal,
    verify,
)
from vmsnap.snapshot import SnapshotReader, SnapshotWriter

__all__ = [
    "AuthenticationError",
    "Cleaned",
    "CorruptSnapshotError",
    "Fragment",
    "FragmentReader",
    "FragmentStateError",
    "GuestMemory",
    "GuestRegion",
    "IdentityFile",
    "InvalidArgumentError",
    "KeyProvider",
    "KeyUnavailableError",
    "MemoryReport",
    "NewIdentityWarning",
    "NotEncryptedError",
    "NotSealedError",
    "Problem",
    "ProcessMemory",
    "QemuError",
    "SerializationError",
    "SnapshotReader",
    "SnapshotWriter",
    "StagedSnapshot",
    "UnsupportedFormatError",
    "Verification",
    "VmsnapError",
    "__version__",
    "aead_provider",
    "clean",
    "create",
    "generate_identity",
    "generate_key",
    "open",
    "recipients_of",
    "rekey",
    "seal",
    "verify",
]
