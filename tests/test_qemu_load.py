"""Loading a QEMU guest: wrappers, locks, what is left behind after an error or a kill, and every memory backend."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from guest import PATIENCE, QEMU, ask, ended, need_qemu, qemu_command, running
from qemu.qmp import QMPError
from refusals import refused, row
from support import MIB, run_python
from toy_guest import Toy
from vmsnap.qemu import started

SIZE = 64 * MIB

# A shell that waits for QEMU, instead of becoming QEMU.
SHELL = ["sh", "-c", '"$@"; exit $?', "sh"]

# A load that is killed while it fills the memory.
DYING = """
import os, signal, sys
import vmsnap.qemu

def die(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

vmsnap.qemu.load(sys.argv[1], sys.argv[2:], ignore_differences=True, progress=die)
"""


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need_qemu()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Toy, Path]]:
    """A guest that checks its memory, which was saved and has ended, and its snapshot."""
    need_qemu()
    folder = tmp_path_factory.mktemp("guest")
    toy, qmp = Toy(folder), folder / "qmp"
    with running(qemu_command(qmp, *toy.options, size="64M"), qmp) as process:
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    yield toy, folder / "vm1"
    toy.close()


@pytest.fixture
def saved(guest: tuple[Toy, Path], folder: Path, toy: Toy) -> Path:
    """A copy of the snapshot of that guest, which goes on at the console `toy`."""
    toy.follow(guest[0])
    return Path(shutil.copytree(guest[1], folder / "vm1"))


def silent(toy: Toy) -> list[str]:
    """Options for a QEMU that loads the guest, without its console."""
    return ["null" if each.startswith("pipe:") else each for each in toy.options]


def in_file(path: Path, size: str = "64M", more: str = "") -> str:
    return f"memory-backend-file,id=mem,size={size},share=on,mem-path={path}{more}"


def processes_with(qmp: Path) -> list[str]:
    """List each QEMU that has this socket, and each process that starts such a QEMU."""
    done = subprocess.run(["pgrep", "-af", f"unix:{qmp},"], capture_output=True, text=True)
    return done.stdout.splitlines()


def until(is_so: Callable[[], bool], told: Callable[[], object] = lambda: None) -> None:
    """Wait for something."""
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, told()
        time.sleep(0.01)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for the sockets that QEMU connects to."""
    # The path is short, unlike that of pytest.
    with tempfile.TemporaryDirectory(prefix="t-") as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(path)


# Wrappers ---------------------------------------------------------------------------------------------------------


@row("qemu-other-machine")
@pytest.mark.parametrize(
    "wrapper",
    [
        ["timeout", "600"],
        SHELL,
        ["unshare", "--fork", "--pid"],
        ["unshare", "--fork", "--pid", "--mount-proc"],
        ["sudo", "-n"],
    ],
    ids=["timeout", "sh", "unshare", "unshare-proc", "sudo"],
)
def test_qemu_behind_a_wrapper_is_loaded_and_ended(
    saved: Path, tmp_path: Path, qmp: Path, toy: Toy, wrapper: list[str]
) -> None:
    if wrapper[0] in ("unshare", "sudo") and (os.geteuid() != 0 or shutil.which(wrapper[0]) is None):
        pytest.skip(f"{wrapper[0]} needs root, or is not there")
    command = [*wrapper, *qemu_command(qmp, *toy.options, size="64M")]
    report = vmsnap.qemu.load(saved, command)
    assert report.pid != report.process.pid
    toy.ticks(3)
    report.end()
    assert processes_with(qmp) == []
    # And after an error: the memory differs.
    with refused("qemu-other-machine", "the memory of the saved guest", tmp_path):
        vmsnap.qemu.load(saved, [*wrapper, *qemu_command(qmp, size="32M")])
    assert processes_with(qmp) == []


@row("qemu-ends")
def test_qemu_that_ends_at_once_is_reported_with_its_status(saved: Path, folder: Path, qmp: Path) -> None:
    with refused("qemu-ends", r"ended with status 0 before QEMU answered$", folder):
        vmsnap.qemu.load(saved, qemu_command(qmp, "-version"))
    with refused("qemu-ends", r"ended with status 7 before QEMU answered; QEMU printed: too bad", folder):
        vmsnap.qemu.load(saved, ["sh", "-c", "echo too bad >&2; exit 7"])
    with refused("qemu-ends", r"was ended by signal 9 before QEMU answered", folder):
        vmsnap.qemu.load(saved, ["sh", "-c", "kill -9 $$"])


@row("qemu-ends")
@pytest.mark.parametrize("option", ["-serial", "-chardev"])
@pytest.mark.parametrize("wrapper", [[], SHELL], ids=["exec", "sh"])
def test_qemu_that_waits_for_a_client_is_ended(
    saved: Path, folder: Path, qmp: Path, option: str, wrapper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character device is opened before the monitor of vmsnap, a serial port after it."""
    monkeypatch.setattr(started, "_WAITING_SECONDS", 0.2)
    other = f"unix:{qmp}2,server=on,wait=on"
    if option == "-chardev":
        other = f"socket,id=other,path={qmp}2,server=on,wait=on"
    with refused("qemu-ends", f"waits for a client of unix:{qmp}2: use wait=off there", folder):
        vmsnap.qemu.load(saved, [*wrapper, *qemu_command(qmp, option, other)])
    assert processes_with(qmp) == []


def test_a_signal_ends_a_load_that_waits(saved: Path, sockets: Path, qmp: Path) -> None:
    command = ["sh", "-c", '"$@"; exit $?', "sh", *qemu_command(qmp, "-serial", f"unix:{qmp}2,server=on,wait=on")]
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", saved, "--", *command]
    for number in (signal.SIGINT, signal.SIGTERM):
        with ended(subprocess.Popen(load, stderr=subprocess.PIPE)) as loading:
            until(Path(f"{qmp}2").exists)
            loading.send_signal(number)
            loading.communicate(timeout=PATIENCE)
            assert loading.returncode == 128 + number
        assert processes_with(qmp) == []
        assert list(sockets.iterdir()) == []
        Path(f"{qmp}2").unlink()


@row("qemu-ends")
def test_a_command_that_does_not_reach_the_socket_is_told_what_to_do(
    saved: Path, folder: Path, sockets: Path, qmp: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user, and mount")
    hint = "runs as another user or in another mount namespace: run vmsnap itself as that user, or set TMPDIR"
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {sockets}; exec "$@"', "sh"]
    for wrapper in (["setpriv", "--reuid=65534"], hidden):
        with refused("qemu-ends", hint, folder):
            vmsnap.qemu.load(saved, [*wrapper, QEMU])
    assert list(sockets.iterdir()) == []


def test_a_load_without_proc_tells_its_own_error_and_ends_qemu(saved: Path, sockets: Path, qmp: Path, toy: Toy) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    command = qemu_command(qmp, *silent(toy), "-device", "e1000", size="64M")
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", str(saved), "--", *command]
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc; exec "$@"', "sh", *load]
    done = subprocess.run(hidden, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "devices that the saved guest did not have: " in done.stderr
    assert processes_with(qmp) == []
    assert list(sockets.iterdir()) == []


def test_the_socket_has_a_short_path_in_a_private_directory(
    saved: Path, sockets: Path, qmp: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = sockets / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with ended(vmsnap.qemu.load(saved, qemu_command(qmp, *silent(toy), size="64M")).process):
        assert ask(qmp, "query-status")["status"] == "running"
    assert list(deep.iterdir()) == []
    path = started._socket_path()
    with started._listen(path):
        assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(Path(path).parent)


# What is left behind ----------------------------------------------------------------------------------------------


def is_running(qmp: Path) -> bool:
    try:
        return str(ask(qmp, "query-status")["status"]) == "running"
    except (OSError, EOFError, QMPError):
        return False


def has_quit(qmp: Path) -> bool:
    """Tell a QEMU to quit, which serves one client at a time."""
    with suppress(OSError, EOFError, QMPError):
        ask(qmp, "quit")
    return not processes_with(qmp)


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.torture)])
def test_a_load_that_is_interrupted_ends_qemu(
    saved: Path, tmp_path: Path, sockets: Path, qmp: Path, toy: Toy, times: int
) -> None:
    """Also in the moment in which the guest begins to run."""
    ram = tmp_path / "ram"
    command = qemu_command(qmp, *silent(toy), memory=in_file(ram), size="64M")
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", str(saved), "--", *command]
    for number in range(times):
        with ended(subprocess.Popen(load)) as process:
            until(lambda: is_running(qmp))
            time.sleep(random.Random(number).uniform(0, 0.1))
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        until(lambda: not processes_with(qmp) and not any(sockets.iterdir()), lambda: processes_with(qmp))
        ram.unlink(missing_ok=True)


@pytest.mark.parametrize("times", [8, pytest.param(40, marks=pytest.mark.torture)])
@pytest.mark.parametrize("wrapper", [[], SHELL], ids=["exec", "sh"])
def test_a_load_that_is_killed_leaves_neither_qemu_nor_memory(
    saved: Path, tmp_path: Path, sockets: Path, qmp: Path, toy: Toy, wrapper: list[str], times: int
) -> None:
    """At random times. If the guest ran already, it goes on."""
    ram = tmp_path / "ram"
    command = [*wrapper, *qemu_command(qmp, *silent(toy), memory=in_file(ram), size="64M")]
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", str(saved), "--", *command]
    began = time.monotonic()
    with ended(subprocess.Popen(load)) as process:
        until(lambda: is_running(qmp))
        whole = time.monotonic() - began
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    ram.unlink(missing_ok=True)
    early = 0

    def nothing_is_left() -> bool:
        return not processes_with(qmp) and not any(sockets.iterdir()) and not ram.exists()

    for number in range(times):
        with subprocess.Popen(load) as process:
            time.sleep(random.Random(number).uniform(0, whole * 1.2))
            process.kill()
        until(
            lambda: nothing_is_left() or is_running(qmp),
            lambda: [*processes_with(qmp), *sockets.rglob("*"), *ram.parent.glob("ram")],
        )
        if nothing_is_left():
            early += 1
            continue
        until(lambda: has_quit(qmp))
        ram.unlink(missing_ok=True)
    assert early > 0


def test_a_file_that_was_there_is_empty_after_a_load_was_killed(
    saved: Path, tmp_path: Path, qmp: Path, toy: Toy
) -> None:
    ram = tmp_path / "ram"
    command = qemu_command(qmp, *silent(toy), memory=in_file(ram), size="64M")
    for size in (0, SIZE):
        ram.touch()
        os.truncate(ram, size)
        done = run_python(DYING, saved, *command)
        assert done.returncode == -signal.SIGKILL
        until(lambda: not processes_with(qmp) and ram.stat().st_blocks == 0)
    # The next load does not find anything of it.
    with ended(vmsnap.qemu.load(saved, command).process):
        assert ram.stat().st_blocks > 0


@row("qemu-file-locked", "qemu-file-in-use")
def test_of_two_loads_into_one_file_one_is_refused(
    saved: Path, folder: Path, tmp_path: Path, qmp: Path, toy: Toy
) -> None:
    ram = tmp_path / "ram"
    command = qemu_command(qmp, *silent(toy), memory=in_file(ram), size="64M")
    other = qemu_command(Path(f"{qmp}2"), *silent(toy), memory=in_file(ram), size="64M")
    begun, refused_too = threading.Event(), threading.Event()

    def hold(_done: int, _total: int) -> None:
        begun.set()
        assert refused_too.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(lambda: vmsnap.qemu.load(saved, command, progress=hold))
        assert begun.wait(PATIENCE)
        for force in (False, True):
            with refused("qemu-file-locked", "another vmsnap is loading a guest into it", folder):
                vmsnap.qemu.load(saved, other, overwrite=force)
        refused_too.set()
        report = loading.result()
    # The one that was refused did not remove the file.
    assert ram.stat().st_blocks > 0
    with refused("qemu-file-in-use", "is not empty", folder):
        vmsnap.qemu.load(saved, other)
    assert ram.stat().st_blocks > 0
    report.end()
    # And the lock ended with the load.
    vmsnap.qemu.load(saved, other, overwrite=True).end()


def test_many_loads_into_one_file_at_once_leave_one_guest(saved: Path, tmp_path: Path, qmp: Path, toy: Toy) -> None:
    def load(number: int) -> vmsnap.qemu.LoadReport | None:
        command = qemu_command(Path(f"{qmp}{number}"), *silent(toy), memory=in_file(tmp_path / "ram"), size="64M")
        try:
            return vmsnap.qemu.load(saved, command)
        except (FileExistsError, BlockingIOError, FileNotFoundError):
            return None

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            reports = [each for each in pool.map(load, range(4)) if each]
        assert len(reports) <= 1
        for report in reports:
            report.end()
        (tmp_path / "ram").unlink(missing_ok=True)
    assert processes_with(qmp) == []


@row("qemu-other-machine", "qemu-ends")
def test_a_refused_load_leaves_the_memory_file_as_it_was(
    saved: Path, folder: Path, tmp_path: Path, qmp: Path, toy: Toy
) -> None:
    ram = tmp_path / "ram"

    def wrong(memory: str) -> None:
        with refused("qemu-other-machine", "the memory of the saved guest", folder):
            vmsnap.qemu.load(saved, qemu_command(qmp, memory=memory, size="32M"))

    wrong(in_file(ram, "32M"))
    assert not ram.exists()
    with refused("qemu-ends", "virtio-nothing", folder):
        vmsnap.qemu.load(saved, qemu_command(qmp, "-device", "virtio-nothing", memory=in_file(ram), size="64M"))
    assert not ram.exists()
    wrong(in_file(ram, "32M", more=",prealloc=on"))
    assert not ram.exists()
    ram.touch()
    wrong(in_file(ram, "32M"))
    assert ram.stat().st_size == 0
    ram.write_bytes(bytes(MIB) + b"mine" + bytes(31 * MIB - 4))
    wrong(in_file(ram, "32M"))
    assert ram.read_bytes()[MIB : MIB + 4] == b"mine"
    ram.unlink()
    ram.mkdir()
    wrong(in_file(ram, "32M"))
    assert list(ram.iterdir()) == []
    # The corrected command.
    ram.rmdir()
    vmsnap.qemu.load(saved, qemu_command(qmp, *silent(toy), memory=in_file(ram), size="64M")).end()


def in_script(folder: Path, memory: str, size: str) -> list[str]:
    """Return a command that does not tell the path of the memory: a script."""
    script = folder / "start.sh"
    command = shlex.join(qemu_command(folder / "qmp", memory=memory, size=size))
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    return [str(script)]


@row("qemu-other-machine", "qemu-ends")
def test_a_refused_load_removes_a_memory_file_that_the_command_does_not_name(
    saved: Path, folder: Path, tmp_path: Path, qmp: Path
) -> None:
    ram, config = tmp_path / "ram", tmp_path / "config"
    backend = {"qom-type": "memory-backend-file", "size": "32M", "share": "on", "mem-path": ram}
    config.write_text("\n".join(['[object "mem"]', *(f'{name} = "{value}"' for name, value in backend.items()), ""]))
    configured = qemu_command(qmp, memory="", size="32M", machine="pc,memory-backend=mem")
    short = qemu_command(qmp, "-mem-path", ram, memory="", size="32M")
    for command in (short, in_script(tmp_path, in_file(ram, "32M"), "32M"), [*configured, "-readconfig", str(config)]):
        with refused("qemu-other-machine", "the memory of the saved guest", folder):
            vmsnap.qemu.load(saved, command)
        assert not ram.exists()
    # QEMU does not live long enough to be asked.
    with refused("qemu-ends", "virtio-nothing", folder):
        vmsnap.qemu.load(saved, [*short, "-device", "virtio-nothing"])
    assert not ram.exists()
    # A file that was there stays.
    for content in (b"", bytes(32 * MIB)):
        ram.write_bytes(content)
        with refused("qemu-other-machine", "the memory of the saved guest", folder):
            vmsnap.qemu.load(saved, in_script(tmp_path, in_file(ram, "32M"), "32M"))
        assert ram.stat().st_size == 32 * MIB


def test_a_load_that_is_killed_removes_a_memory_file_that_the_command_does_not_name(
    saved: Path, tmp_path: Path, qmp: Path
) -> None:
    done = run_python(DYING, saved, *in_script(tmp_path, in_file(tmp_path / "ram"), "64M"))
    assert done.returncode == -signal.SIGKILL
    until(lambda: not processes_with(qmp) and not (tmp_path / "ram").exists())


def test_preallocated_memory_stays_allocated(saved: Path, small_disk: Path, qmp: Path, toy: Toy) -> None:
    enlarge(small_disk, SIZE + MIB)
    ram = small_disk / "ram"
    memory = in_file(ram, more=",prealloc=on")
    command = qemu_command(qmp, *toy.options, memory=memory, size="64M")
    report = vmsnap.qemu.load(saved, command)
    toy.ticks(3)
    assert ram.stat().st_blocks * 512 >= SIZE
    report.end()
    # Also if it is overwritten; and what the guest does not have is zero then.
    with open(ram, "r+b") as file:
        file.seek(SIZE - MIB)
        file.write(b"mine" * 1000)
    report = vmsnap.qemu.load(saved, command, overwrite=True)
    assert ram.stat().st_blocks * 512 >= SIZE
    assert b"mine" not in ram.read_bytes()
    report.end()


@row("disk-full")
def test_a_full_disk_ends_a_load(saved: Path, folder: Path, small_disk: Path, qmp: Path, toy: Toy) -> None:
    enlarge(small_disk, 2 * MIB)
    ram = small_disk / "ram"
    with refused("disk-full", "No space left", folder):
        vmsnap.qemu.load(saved, qemu_command(qmp, *silent(toy), memory=in_file(ram), size="64M"))
    assert not ram.exists()
    assert processes_with(qmp) == []


def enlarge(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
