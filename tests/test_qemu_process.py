"""The process behind a monitor is found, however QEMU was started."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import vmsnap.qemu
from commands import error_of, run
from guest import PATIENCE, ask, need_qemu, qemu_command, running
from refusals import refused, row
from seccomp import refusing
from support import run_python_well
from surveyed import only_block, surveyed

_SURVEY = """
import asyncio, json, sys
from contextlib import ExitStack
from pathlib import Path
from vmsnap.qemu.monitor import connected, connection_to
from vmsnap.qemu.survey import survey

async def looking():
    connection = connection_to(Path(sys.argv[1]))
    SANDBOX
    with ExitStack() as stack:
        async with connected(connection, "QEMU") as monitor:
            ram = await survey(monitor, stack)
        [block] = ram.blocks
        print(json.dumps([ram.pid, block.file is not None, str(block.why_no_file), ram.machine.command_line]))

asyncio.run(looking())
"""


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need_qemu()


@contextmanager
def within(wrapper: list[str], command: list[str], qmp: Path) -> Iterator[None]:
    """Run a QEMU in another program, and end QEMU before that."""
    with running([*wrapper, *command], qmp):
        try:
            yield
        finally:
            with suppress(EOFError):  # QEMU may end before it has answered
                ask(qmp, "quit")


def command_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def need_namespaces() -> None:
    if subprocess.run(["unshare", "-fp", "true"], capture_output=True).returncode != 0:
        pytest.skip("only root can make a PID namespace")


def unshared(*command: object) -> list[str]:
    need_namespaces()
    return ["unshare", "--kill-child", "-fp", *map(str, command)]


@pytest.mark.parametrize("wrapper", [["sh", "-c", '"$@"; exit $?', "sh"], ["timeout", "600"], ["unshare"]])
def test_a_qemu_in_a_wrapper_is_found(tmp_path: Path, qmp: Path, wrapper: list[str]) -> None:
    if wrapper == ["unshare"]:
        wrapper = unshared()
    command = qemu_command(qmp, size="16M")
    with within(wrapper, command, qmp):
        with surveyed(qmp) as ram:
            assert command_of(ram.pid).startswith("qemu-system")
            assert only_block(ram).file is not None
            assert ram.machine.command_line == command
        report = vmsnap.qemu.save(qmp, tmp_path / "vm1")
        assert report.machine.command_line == command
    assert vmsnap.verify(tmp_path / "vm1").ok


def test_a_qemu_whose_socket_another_process_created_is_found(tmp_path: Path, qmp: Path) -> None:
    """Libvirt passes the socket on, and so does systemd."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(qmp))
        server.listen()
        command = qemu_command(tmp_path / "other", size="16M")
        command += ["-chardev", f"socket,id=m,fd={server.fileno()},server=on,wait=off", "-mon", "m,mode=control"]
        process = subprocess.Popen(command, pass_fds=[server.fileno()])
    try:
        with surveyed(qmp) as ram:
            assert ram.pid == process.pid
            assert only_block(ram).file is not None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("pair", [False, True])
def test_a_qemu_in_a_wrapper_that_connects_is_found(tmp_path: Path, qmp: Path, pair: bool) -> None:
    """The shell, too, has the socket open where it passes one on."""
    command = ["sh", "-c", '"$@"; exit $?', "sh", *qemu_command(qmp, size="16M"), "-mon", "m,mode=control"]
    with socket.socket(socket.AF_UNIX) as server, ExitStack() as stack:
        if pair:
            ours, theirs = socket.socketpair()
            with theirs:
                command += ["-chardev", f"socket,id=m,fd={theirs.fileno()}"]
                shell = stack.enter_context(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
        else:
            server.bind(str(tmp_path / "server"))
            server.listen()
            server.settimeout(PATIENCE)
            command += ["-chardev", f"socket,id=m,path={tmp_path}/server"]
            shell = stack.enter_context(subprocess.Popen(command))
            ours = server.accept()[0]
        stack.callback(shell.kill)
        try:
            with surveyed(ours, to_fill=True) as ram:
                assert command_of(ram.pid).startswith("qemu-system")
                assert only_block(ram).writable
        finally:
            with suppress(EOFError):
                ask(qmp, "quit")


@row("qemu-other-process")
@pytest.mark.parametrize("where", ["of another QEMU", "of no QEMU", "of no process"])
def test_a_process_id_is_checked(tmp_path: Path, qmp: Path, where: str) -> None:
    """The memory of one guest with the devices of another would be a snapshot that crashes."""
    other = tmp_path / "other"
    folder = tmp_path / "snapshots"
    folder.mkdir()
    with running(qemu_command(qmp, size="16M"), qmp) as process, running(qemu_command(other, size="16M"), other) as two:
        with subprocess.Popen(["true"]) as ended:
            pass
        pid = {"of another QEMU": two.pid, "of no QEMU": os.getpid(), "of no process": ended.pid}[where]
        with refused("qemu-other-process", f"process {pid} does not have .*leave out .*--pid", folder):
            vmsnap.qemu.save(qmp, folder / "vm1", pid=pid)
        line = error_of(run("qemu", "save", "--qmp", qmp, folder / "vm1", "--pid", pid, status=1))
        assert f"process {pid} does not have the monitor's socket open" in line
        vmsnap.qemu.save(qmp, folder / "vm1", pid=process.pid)


def test_in_another_namespace_the_process_is_not_visible_and_that_is_no_error(qmp: Path) -> None:
    with running(qemu_command(qmp, size="16M"), qmp):
        command = unshared("--mount-proc", sys.executable, "-c", _SURVEY.replace("SANDBOX", ""), qmp)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('[null, false, "the process of QEMU is not visible here: it runs in another PID')
        assert done.stdout.endswith(", []]\n")


def test_a_guest_whose_process_may_not_be_looked_into_is_surveyed(tmp_path: Path, qmp: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user as well")
    become = "import os; os.setgid(65534); os.setuid(65534)"
    with running(qemu_command(qmp, size="16M"), qmp):
        told = run_python_well(_SURVEY.replace("SANDBOX", become), qmp)
    assert told.startswith("[null, false, ")
    assert "no permission to access QEMU: run as root, or as the user of QEMU" in told


def test_in_a_sandbox_without_netlink_the_creator_of_the_socket_is_qemu(qmp: Path) -> None:
    script = _SURVEY.replace("SANDBOX", 'exec(sys.argv[2], {"__name__": "sandbox"})')
    with running(qemu_command(qmp, size="16M"), qmp) as process:
        told = run_python_well(script, qmp, refusing(13, "socket"))
        assert told.startswith(f'[{process.pid}, true, "None", ')
