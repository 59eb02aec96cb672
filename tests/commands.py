"""The command line as a user runs it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def write_private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def run(
    *arguments: str | Path | int, status: int = 0, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `vmsnap` in pipes and check its exit status. Its output must not contain an escape code or a traceback."""
    command = [sys.executable, "-m", "vmsnap", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, cwd=cwd, env=os.environ | (env or {}), check=False, timeout=300)
    assert done.returncode == status, done.stderr.decode()
    assert b"\x1b" not in done.stderr
    assert b"Traceback" not in done.stderr
    return done


def error_of(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on standard error of a command that failed and printed nothing else."""
    assert done.stdout == b""
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("vmsnap: error: ")
    return line
