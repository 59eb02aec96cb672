"""Virtual-machine snapshots with random access, written in parallel, optionally encrypted and compressed.

A snapshot is a directory of fragments (byte blobs: guest memory, a disk, the state of a device), nested by namespaces.

>>> import pathlib, tempfile, vmsnap
>>> location = pathlib.Path(tempfile.mkdtemp()) / "vm1"
>>> keys = vmsnap.Keys(key=vmsnap.generate_key())
>>> with vmsnap.create(location, keys=keys) as snapshot:
...     with snapshot.add_namespace("disks").raw_fragment("sda", chunk_size_bytes=65536) as fragment:
...         fragment.write(b"boot sector" * 1000)
11000
>>> reader = vmsnap.open(location, keys=keys)
>>> with reader.namespace("disks").raw_fragment("sda") as fragment:
...     fragment.read_at(11, 4), fragment.size
(b'boot', 11000)
"""

from vmsnap._vmsnap import __version__, aead_provider, generate_key
from vmsnap.about import BuildInfo, build_info
from vmsnap.archive import SealId, pack, unpack
from vmsnap.errors import (
    AuthenticationError,
    CorruptSnapshotError,
    InvalidArgumentError,
    KeyUnavailableError,
    NewIdentityWarning,
    NotEncryptedError,
    NotSealedError,
    QemuError,
    SealedError,
    SerializationError,
    StateError,
    UnsupportedFormatError,
    VmsnapError,
)
from vmsnap.exchange import ExportReport, ImportReport, export_file, import_file
from vmsnap.inspection import InspectedFragment, Inspection, inspect
from vmsnap.io import Fragment, FragmentReader
from vmsnap.keys import IdentityFile, KeyProvider, Keys, KeyWrapping, generate_identity, recipients_of, rekey
from vmsnap.location import Location
from vmsnap.memory import GuestMemory, GuestRegion, MemoryReport, ProcessMemory
from vmsnap.reader import SnapshotReader
from vmsnap.removal import remove
from vmsnap.staging import Cleaned, StagedSnapshot, clean, create, seal
from vmsnap.transfer import Pushed, pull, push
from vmsnap.verification import Problem, Verification, verify
from vmsnap.writer import SnapshotWriter

# Opens a snapshot to read it: the class, under the name that goes with `create`.
open = SnapshotReader

__all__ = [
    "AuthenticationError",
    "BuildInfo",
    "Cleaned",
    "CorruptSnapshotError",
    "ExportReport",
    "Fragment",
    "FragmentReader",
    "GuestMemory",
    "GuestRegion",
    "IdentityFile",
    "ImportReport",
    "InspectedFragment",
    "Inspection",
    "InvalidArgumentError",
    "KeyProvider",
    "KeyUnavailableError",
    "KeyWrapping",
    "Keys",
    "Location",
    "MemoryReport",
    "NewIdentityWarning",
    "NotEncryptedError",
    "NotSealedError",
    "Problem",
    "ProcessMemory",
    "Pushed",
    "QemuError",
    "SealId",
    "SealedError",
    "SerializationError",
    "SnapshotReader",
    "SnapshotWriter",
    "StagedSnapshot",
    "StateError",
    "UnsupportedFormatError",
    "Verification",
    "VmsnapError",
    "__version__",
    "aead_provider",
    "build_info",
    "clean",
    "create",
    "export_file",
    "generate_identity",
    "generate_key",
    "import_file",
    "inspect",
    "open",
    "pack",
    "pull",
    "push",
    "recipients_of",
    "rekey",
    "remove",
    "seal",
    "unpack",
    "verify",
]
