"""Removing a snapshot that this process has just made, and whose maker failed afterwards."""

from pathlib import Path

from vmsnap import _vmsnap


def remove_snapshot(path: Path) -> None:
    """Remove a snapshot, a directory or an archive. The caller knows that nobody else uses it.

    Raises
    ------
    OSError
        Something could not be removed.
    """
    _vmsnap.remove(path)
