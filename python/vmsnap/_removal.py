"""Removing a snapshot that this process has just made, and whose maker failed afterwards."""

import os
import shutil
from pathlib import Path


def remove_snapshot(path: Path) -> None:
    """Remove a directory, or the file of an archive. The caller knows that nobody else uses it.

    Raises
    ------
    OSError
        Something could not be removed.
    """
    if os.path.isfile(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)
