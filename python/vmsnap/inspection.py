"""Snapshots as they look without their keys."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vmsnap import _vmsnap
from vmsnap.keys import KeyWrapping
from vmsnap.location import SnapshotLocation, local_path, located

__all__ = ["InspectedFragment", "Inspection", "inspect"]


@dataclass(frozen=True)
class InspectedFragment:
    """A fragment as it looks without the key.

    Attributes
    ----------
    path
        The path of the fragment in the snapshot: names joined with ``/``.
    stored_size
        The size of the fragment as it is stored, in bytes.
    modified
        When the fragment was last written to; None for a time that Python cannot represent. In an archive, when the
        snapshot was sealed.
    finished
        Whether the fragment was finished. Only staged snapshots record this; in one written in place it is always true.
    """

    path: str
    stored_size: int
    modified: datetime | None
    finished: bool


@dataclass(frozen=True)
class Inspection:
    """A snapshot as `inspect` finds it. Nothing of it is authenticated.

    Attributes
    ----------
    location
        The location of the snapshot: an absolute path or a URL.
    key_wrapping
        How the data key is wrapped; None if the snapshot is not encrypted.
    sealed
        Whether the snapshot has a manifest. `verify` reads it.
    namespaces
        The paths of all namespaces, each after the namespace that contains it.
    fragments
        All fragments; the fragments of one namespace are adjacent.
    """

    location: str
    key_wrapping: KeyWrapping | None
    sealed: bool
    namespaces: tuple[str, ...]
    fragments: tuple[InspectedFragment, ...]

    @property
    def path(self) -> Path | None:
        """The location as a `pathlib.Path`; None if it is a URL."""
        return local_path(self.location)

    @property
    def encrypted(self) -> bool:
        """Whether the snapshot is encrypted."""
        return self.key_wrapping is not None


def inspect(location: SnapshotLocation) -> Inspection:
    """Inspect a snapshot without its key.

    >>> import pathlib, tempfile, vmsnap
    >>> location = pathlib.Path(tempfile.mkdtemp()) / "vm1"
    >>> with vmsnap.create(location, key=vmsnap.generate_key()) as snapshot:
    ...     snapshot.add_namespace("cpu").write_fragment("clock", 12)
    >>> found = vmsnap.inspect(location)
    >>> found.encrypted, found.key_wrapping.kind, found.sealed, found.namespaces, found.fragments[0].path
    (True, 'raw-key', True, ('cpu',), 'cpu/clock')

    Raises
    ------
    FileNotFoundError
        The snapshot does not exist.
    CorruptSnapshotError
        The directory contains something that a snapshot cannot contain (a link, a special file, a name that is not
        allowed), the file is not an archive, or ``enc_metadata`` is not a wrapped key.
    """
    absolute, wrapping, sealed, namespaces, fragments = _vmsnap.inspect(located(location))
    return Inspection(
        absolute,
        None if wrapping is None else KeyWrapping(*wrapping),
        sealed,
        tuple(namespaces),
        tuple(InspectedFragment(*fragment) for fragment in fragments),
    )


def is_marked(location: SnapshotLocation) -> bool:
    """Return whether a location has something that only snapshots have: key metadata or a manifest.

    A plain snapshot that is not sealed has neither, so it cannot be told from another directory.
    """
    return _vmsnap.is_marked(located(location))
