"""A libvirt of its own for a test: a session daemon in a directory, and a domain with the toy guest."""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guest import PATIENCE, QEMU
from toy_guest import Toy

NAME = "vmsnap-toy"
# libvirt takes root for the system's own daemon, so that root runs a session as this user.
_NOBODY = 65534

_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  {memory}
  <vcpu>2</vcpu>
  {cpu}
  <features><acpi/></features>
  <os><type arch='x86_64' machine='{machine}'>hvm</type><kernel>{kernel}</kernel></os>
  <devices>
    {dimm}
    <emulator>{qemu}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='pipe'><source path='{console}'/></serial>
  </devices>
</domain>
"""
_SLOTS = "<maxMemory slots='1' unit='MiB'>1024</maxMemory>"
_DIMM = "<memory model='dimm'><target><size unit='MiB'>{mib}</size><node>0</node></target></memory>"
TWO_NODES = """
<cpu><numa>
  <cell id='0' cpus='0' memory='24' unit='MiB'/><cell id='1' cpus='1' memory='40' unit='MiB'/>
</numa></cpu>
"""


class Libvirt:
    """A session of libvirt, in a directory that its user owns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as_user = []
        if os.geteuid() == 0:
            self._as_user = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        # Without the proxies of a machine, its session bus and its language.
        kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
        self._environment = kept | {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "LC_ALL": "C"}

    def give(self, path: Path) -> Path:
        """Let the user of the session use a file."""
        if self._as_user:
            os.chown(path, _NOBODY, _NOBODY)
        return path

    @contextmanager
    def daemon(self, **settings: str) -> Iterator[None]:
        """Run the daemon, and end its domains with it.

        Parameters
        ----------
        settings
            Settings of ``qemu.conf``.
        """
        configuration = self.folder / ".config/libvirt/qemu.conf"
        for each in reversed(configuration.relative_to(self.folder).parents[:-1]):
            (self.folder / each).mkdir(exist_ok=True)
            self.give(self.folder / each)
        # The default starts virtlogd, which stays for two minutes.
        settings |= {"stdio_handler": "file"}
        configuration.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
        socket = self.folder / "libvirt/libvirt-sock"
        command = [*self._as_user, shutil.which("libvirtd", path=_path()) or "libvirtd"]
        with (
            open(self.folder / "log", "wb") as log,
            subprocess.Popen(command, env=self._environment, stdout=log, stderr=log) as process,
        ):
            try:
                until = time.monotonic() + PATIENCE
                while not socket.exists():
                    assert process.poll() is None, (self.folder / "log").read_text()
                    assert time.monotonic() < until, "libvirtd makes no socket"
                    time.sleep(0.01)
                try:
                    yield
                finally:
                    for name in self.virsh("list", "--name").split():
                        self.virsh("destroy", name)
            finally:
                process.terminate()
                process.wait()

    def virsh(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a command of virsh, and return what it prints."""
        command = [*self._as_user, "virsh", "-q", "-c", "qemu:///session", *map(str, arguments)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=PATIENCE)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def shim(self) -> None:
        """Make a command ``virsh`` in the directory: for this session, and for files of the user that runs it."""
        give = f'[ ! -f "$2" ] || chown {_NOBODY}:{_NOBODY} "$2"' if self._as_user else ""
        environment = [f"{name}={text}" for name, text in self._environment.items()]
        command = shlex.join([*self._as_user, "env", *environment, str(shutil.which("virsh")), "-c", "qemu:///session"])
        (self.folder / "virsh").write_text(f'#!/bin/sh\n{give}\ncase $1 in save) set -- save "$2" "$PWD/$3";; esac\n')
        with (self.folder / "virsh").open("a") as script:
            script.write(f'exec {command} "$@"\n')
        (self.folder / "virsh").chmod(0o755)

    def start(self, toy: Toy, *, name: str = NAME, machine: str = "pc", cpu: str = "", dimm: int = 0) -> None:
        """Start a domain with the toy guest, whose files are in this directory. The daemon's end ends it.

        Parameters
        ----------
        toy, name, machine, cpu
            The guest, the name of the domain, its machine type, and the element for its processors.
        dimm
            The size of a DIMM in MiB, or 0. It needs NUMA nodes.
        """
        for each in (self.folder / "toy.in", self.folder / "toy.out", self.folder / "toy.kernel"):
            self.give(each)
        text = _DOMAIN.format(
            name=name,
            memory=f"{_SLOTS if dimm else ''}<memory unit='MiB'>{64 + dimm}</memory>",
            dimm=_DIMM.format(mib=dimm) if dimm else "",
            cpu=cpu,
            machine=machine,
            kernel=self.folder / "toy.kernel",
            qemu=shutil.which(QEMU),
            console=toy.path,
        )
        domain = self.folder / "domain.xml"
        domain.write_text(text)
        self.virsh("create", domain)


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


@contextmanager
def session() -> Iterator[Libvirt]:
    """Give a session of libvirt; skips the test where there is none."""
    for program in ("libvirtd", "virsh", "setpriv", QEMU):
        if shutil.which(program, path=_path()) is None:
            pytest.skip(f"there is no {program}: apt install libvirt-daemon libvirt-clients")
    # The directories of pytest belong to the user that runs it. The path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="vmsnap-", ignore_cleanup_errors=True) as folder:
        made = Libvirt(Path(folder))
        made.give(Path(folder))
        yield made
