"""The QEMUs that tests run: that of the system, and 10.0 of Debian's backports, which is not installed."""

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from packages import backported

QEMU = "qemu-system-x86_64"

# As pytest names them.
NAMES = ("system", "10.0")

# Firmware of the system: the same for each QEMU, as a package of its own.
_FIRMWARE = Path("/usr/share/seabios")


@dataclass(frozen=True)
class Qemu:
    """A QEMU: the first words of a command line, and its version, such as "10.0.2"."""

    command: tuple[str, ...]
    version: str

    @property
    def number(self) -> tuple[int, int]:
        """The first two numbers of the version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @functools.cached_property
    def _machine_types(self) -> str:
        return subprocess.run([*self.command, "-machine", "help"], check=True, capture_output=True, text=True).stdout

    def knows(self, machine_type: str) -> bool:
        """Whether it has a machine type, such as "pc-q35-7.2"."""
        return any(line.split()[:1] == [machine_type] for line in self._machine_types.splitlines())

    def newest(self, machine: str) -> str:
        """Return the machine type that "pc" or "q35" stands for."""
        found = re.search(rf"^{machine} .*\(alias of (\S+)\)$", self._machine_types, re.MULTILINE)
        assert found, f"{self} does not say what {machine} is"
        return found[1]

    def __str__(self) -> str:
        return f"QEMU {self.version}"


@functools.cache
def found(name: str) -> Qemu:
    """Return the QEMU with one of these names; skips the test where it is not there and cannot be fetched."""
    return _system() if name == "system" else _backports()


def _system() -> Qemu:
    if shutil.which(QEMU) is None:
        pytest.skip(f"there is no {QEMU}: apt install qemu-system-x86")
    return _asked((QEMU,))


def _backports() -> Qemu:
    if not _FIRMWARE.is_dir():
        pytest.skip(f"there is no {_FIRMWARE}: apt install seabios")
    # It finds its own data and modules beside itself.
    root = backported("qemu-system-x86", "qemu-system-common", "qemu-system-data")
    return _asked((str(root / "usr/bin" / QEMU), "-L", str(_FIRMWARE)))


def _asked(command: tuple[str, ...]) -> Qemu:
    told = subprocess.run([*command, "-version"], capture_output=True, text=True)
    version = re.search(r"version (\d+\.\d+\.\d+)", told.stdout)
    if told.returncode != 0 or version is None:
        # Of the backports: a library that QEMU of the system does not need.
        pytest.skip(f"{command[0]} does not start: {told.stderr.strip()}")
    return Qemu(command, version[1])
