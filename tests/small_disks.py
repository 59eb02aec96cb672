"""File systems that are soon full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs with options on a new directory. The test is skipped where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "vmsnap-test", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small file system cannot be mounted: {error.stderr.strip()}")
    try:
        yield path
    finally:
        # Lazily: the traceback of a test that failed may still hold a file.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
