"""Removing snapshots."""

from vmsnap import _vmsnap
from vmsnap.location import SnapshotLocation, located

__all__ = ["remove"]


def remove(location: SnapshotLocation) -> None:
    """Remove a snapshot: a directory, an archive, or a snapshot in an object store. No key is needed.

    A reader finds the whole snapshot or none: a directory gets another name first, and in an object store the manifest
    is removed first. A removal in an object store that was interrupted can be repeated.

    >>> import pathlib, tempfile, vmsnap
    >>> location = pathlib.Path(tempfile.mkdtemp()) / "vm1"
    >>> with vmsnap.create(location) as snapshot:
    ...     snapshot.write_fragment("clock", 12)
    >>> vmsnap.remove(location)
    >>> location.exists()
    False

    Raises
    ------
    FileNotFoundError
        There is no snapshot.
    InvalidArgumentError
        The directory has neither key metadata nor a manifest, so that it may be something else; or another snapshot is
        below the URL.
    CorruptSnapshotError
        It contains something that a snapshot cannot contain.
    OSError
        Something could not be removed.
    """
    _vmsnap.remove(located(location), False)


def remove_snapshot(location: SnapshotLocation) -> None:
    """Remove a snapshot that this process has just made, and whose maker failed afterwards. It is not looked at.

    Raises
    ------
    OSError
        Something could not be removed.
    """
    _vmsnap.remove(located(location), True)
