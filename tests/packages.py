"""Debian packages for tests, in target/guest/packages/: fetched by `apt-get download` and unpacked, not installed."""

import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / "target/guest"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold the lock of a name in the cache, so that only one process creates that file at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unpacked(package: str) -> Path:
    """Return the directory of the files of a Debian package, fetched where it is not there yet."""
    return _made(package, [package], list)


def backported(*packages: str) -> Path:
    """Return the directory of the files of packages of bookworm-backports, which this system need not know."""
    return _made(f"{packages[0]}-backported", [f"{each}/bookworm-backports" for each in packages], _backports)


def told(*command: str) -> str:
    """Return what a command of apt prints; skips the test where there is no apt or it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip(f"there is no {command[0]} to fetch packages of Debian with")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"`{' '.join(command)}` failed: {error.stderr.strip()} (try apt-get update)")


def _made(name: str, packages: Sequence[str], options: Callable[[], list[str]]) -> Path:
    made = CACHE / "packages" / name
    with alone("packages"):
        made.parent.mkdir(exist_ok=True)
        if made.is_dir():
            return made
        # Under its name when it is whole.
        with tempfile.TemporaryDirectory(dir=CACHE) as beside:
            told("env", "-C", beside, "apt-get", *options(), "download", *packages)
            for archive in Path(beside).glob("*.deb"):
                told("dpkg", "-x", str(archive), f"{beside}/files")
            os.rename(f"{beside}/files", made)
    return made


def _backports() -> list[str]:
    """Return options with which apt knows bookworm-backports, of the mirror that this system uses, and nothing else.

    The list of sources and all that apt keeps are files of its own, so that nothing of the system changes.
    """
    fields = ("Created-By: Packages", "Origin: Debian", "Codename: bookworm", "Component: main")
    mirrors = re.findall(r"^\S+$", told("apt-get", "indextargets", "--format", "$(REPO_URI)", *fields), re.MULTILINE)
    if not mirrors:
        pytest.skip("apt knows no Debian 12 (bookworm), whose backports have QEMU 10.0")
    place = CACHE / "apt"
    signed = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
    options = {
        "Dir::Etc::sourcelist": place / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": place / "lists",
        "Dir::Cache": place / "cache",
        "APT::Sandbox::User": "",
    }
    named = [f"-o{name}={value}" for name, value in options.items()]
    for directory in ("lists/partial", "cache/archives/partial"):
        (place / directory).mkdir(parents=True, exist_ok=True)
    (place / "sources.list").write_text(f"deb {signed}{mirrors[0]} bookworm-backports main\n")
    told("apt-get", *named, "-q", "--error-on=any", "update")
    return named
