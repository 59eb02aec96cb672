"""File systems that cannot do all that a local one can: sync a directory, rename, tell other hosts of a lock."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vmsnap
from commands import error_of
from refusals import refused_elsewhere, row
from support import pattern, run_python_well

# The error of a file system that does not support sync.
CANNOT_SYNC = ["EINVAL", "EOPNOTSUPP", "EBADF", "ENOSYS"]

# Syncs, in this order: the fragment, its directory, the root; the manifest, the root again, the parent directory.
CREATE = """
with vmsnap.create(sys.argv[1], durable=len(sys.argv) < 3, threads=1) as snapshot:
    snapshot.add_namespace("cpu").write_fragment("clock", 12)
"""

# A hidden directory as a killed writer leaves it.
LEFT = ".vmsnap-0123456789abcdef"

# As `statfs` gives them in its first eight bytes; linux/magic.h.
NETWORK = {"NFS": 0x6969, "CIFS": 0xFF534D42, "9p": 0x01021997, "FUSE": 0x65735546, "Ceph": 0x00C36400}
LOCAL = {"ext4": 0xEF53, "XFS": 0x58465342, "tmpfs": 0x01021994, "overlayfs": 0x794C7630}


def injected(injection: str) -> list[str]:
    """Return the prefix of a command whose system calls fail."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("there is no strace")
    probe = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here: {probe.stderr}")
    call = injection.partition(":")[0]
    return [program, "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={injection}"]


def f_type(number: int) -> str:
    """Return the injection that makes every file system one of this type."""
    return f"fstatfs:poke_exit=@arg2={number.to_bytes(8, 'little').hex()}"


def command_line(injection: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [*injected(injection), sys.executable, "-m", "vmsnap", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=300)


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> "Inject":
    return Inject(monkeypatch, tmp_path_factory.mktemp("bin") / "python")


class Inject:
    """Lets the system calls of every Python fail that is started from here on."""

    def __init__(self, patch: pytest.MonkeyPatch, wrapper: Path) -> None:
        self._patch, self._wrapper, self._python = patch, wrapper, sys.executable

    def __call__(self, injection: str) -> None:
        command = " ".join(f"'{each}'" for each in [*injected(injection), self._python])
        self._wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        self._wrapper.chmod(0o700)
        self._patch.setattr(sys, "executable", str(self._wrapper))


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram.img"
    path.write_bytes(pattern(1 << 16))
    return path


# Syncs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directories", ["2..3", "5+"])
@pytest.mark.parametrize("error", CANNOT_SYNC)
def test_a_directory_that_cannot_be_synced_is_no_error(
    folder: Path, inject: Inject, error: str, directories: str
) -> None:
    inject(f"fsync:error={error}:when={directories}")
    run_python_well(f"import sys, vmsnap\n{CREATE}", folder / "vm1")
    assert os.listdir(folder) == ["vm1"]
    assert vmsnap.verify(folder / "vm1").ok


@row("cannot-sync")
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("error", CANNOT_SYNC)
def test_a_file_that_cannot_be_synced_is_an_error_with_a_way_out(
    folder: Path, inject: Inject, error: str, number: int
) -> None:
    inject(f"fsync:error={error}:when={number}")
    what = "cannot sync .cpu/clock.: " if number == 1 else "vmsnap_manifest of .*"
    if error == "EINVAL":
        message = f"cannot commit the snapshot .*vm1: {what}.*cannot sync files.*durable=False, --no-durable"
        refused_elsewhere("cannot-sync", message, folder, CREATE, folder / "vm1")
    inject(f"fsync:error={error}")
    run_python_well(f"import sys, vmsnap\n{CREATE}", folder / "vm1", "not durable")
    assert vmsnap.verify(folder / "vm1").ok


@pytest.mark.parametrize("number", range(1, 6))
def test_a_sync_that_fails_is_an_error_of_what_was_synced(folder: Path, ram: Path, number: int) -> None:
    """The disk's, and not that a file system does not know how to."""
    done = command_line(f"fsync:error=EIO:when={number}", "dump", ram, folder / "vm1")
    assert done.returncode == 1
    line = error_of(done)
    if (folder / "vm1").exists():  # the last
        assert "complete and in place, but the last sync failed, so it may not survive a power failure" in line
        return
    assert line.startswith(f"vmsnap: error: cannot commit the snapshot {folder}/vm1: ")
    synced = ('cannot sync "mem', "cannot sync the snapshot's directory", "vmsnap_manifest of ")
    assert any(text in line for text in synced)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("command", ["dump", "encrypt", "decrypt", "seal"])
def test_the_command_line_leaves_the_syncs_out_where_told(
    folder: Path, ram: Path, tmp_path: Path, command: str
) -> None:
    """No sync is tried, even if it could not succeed."""
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(bytes(32))
    base = tmp_path / "base"
    vmsnap.SnapshotWriter(base, key=bytes(32) if command == "decrypt" else None).write_fragment("clock", 12)
    out = base if command == "seal" else folder / "vm1"
    arguments: dict[str, list[object]] = {
        "encrypt": [base, out, "--new-key-file", key],
        "decrypt": [base, out, "--key-file", key],
        "seal": [base],
    }
    wanted = [command, *arguments.get(command, [ram, out])]
    refused = error_of(command_line("fsync:error=EINVAL", *wanted))
    assert "--no-durable" in refused
    assert os.listdir(folder) == []
    assert command_line("fsync:error=EINVAL", *wanted, "--no-durable").returncode == 0
    assert vmsnap.verify(out, key=bytes(32) if command == "encrypt" else None).ok


@pytest.mark.parametrize("error", CANNOT_SYNC)
def test_a_new_identity_is_made_where_its_directory_cannot_be_synced(tmp_path: Path, ram: Path, error: str) -> None:
    home = {"XDG_CONFIG_HOME": str(tmp_path / "home")}
    command = [*injected(f"fsync:error={error}:when=2"), sys.executable, "-m", "vmsnap"]
    done = subprocess.run(
        [*command, "dump", ram, tmp_path / "vm1", "--encrypt", "--no-durable"],
        env=os.environ | home,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert vmsnap.verify(tmp_path / "vm1", identities=tmp_path / "home/vmsnap/identity.txt").ok


# Renaming ------------------------------------------------------------------------------------------------------------

# Calls, in this order: the manifest, the root into place, the root away where that was refused.
INTO_PLACE = "when=2+"


@row("cannot-rename")
def test_a_rename_across_file_systems_is_refused_and_leaves_nothing(folder: Path, inject: Inject) -> None:
    inject(f"renameat2:error=EXDEV:{INTO_PLACE}")
    message = "cannot commit the snapshot .*vm1: the file system cannot rename .*another directory: Invalid cross"
    refused_elsewhere("cannot-rename", message, folder, CREATE, folder / "vm1")


@pytest.mark.parametrize("error", ["EXDEV", "EPERM", "EIO"])
def test_the_command_line_leaves_nothing_where_it_cannot_rename(folder: Path, ram: Path, error: str) -> None:
    done = command_line(f"renameat2:error={error}:{INTO_PLACE}", "dump", ram, folder / "vm1")
    assert done.returncode == 1
    assert "cannot commit the snapshot" in error_of(done)
    assert "cannot be made" not in error_of(done)
    assert os.listdir(folder) == []


def test_a_commit_that_could_not_rename_may_be_tried_again_or_discarded(folder: Path, inject: Inject) -> None:
    script = """
import os, sys, vmsnap
again, gone = (vmsnap.create(os.path.join(sys.argv[1], name)) for name in ("again", "gone"))
for staged in (again, gone):
    staged.writer.write_fragment("clock", 12)
    try:
        staged.commit()
    except OSError as error:
        print(error.errno)
print(len(os.listdir(sys.argv[1])))
again.commit()
gone.discard()
print(os.listdir(sys.argv[1]))
"""
    # The manifest and the root of each; then the manifest of the first once more, and its root.
    inject("renameat2:error=EXDEV:when=2..4+2")
    assert run_python_well(script, folder).split() == ["18", "18", "2", "['again']"]
    assert vmsnap.verify(folder / "again").ok


@pytest.mark.parametrize("error", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_without_a_rename_that_replaces_nothing_a_plain_one_does(folder: Path, ram: Path, error: str) -> None:
    done = command_line(f"renameat2:error={error}", "dump", ram, folder / "vm1")
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == ["vm1"]
    assert vmsnap.verify(folder / "vm1").ok


# Locks ---------------------------------------------------------------------------------------------------------------

CLEAN = "vmsnap.clean(sys.argv[1])"


@row("clean-among-hosts")
@pytest.mark.parametrize("name", NETWORK)
def test_clean_removes_nothing_where_other_hosts_may_write(folder: Path, inject: Inject, name: str) -> None:
    (folder / LEFT).mkdir()
    inject(f_type(NETWORK[name]))
    message = f"cannot tell whether .*{LEFT} is in use: it is on {name}, .* other hosts; .* by hand"
    refused_elsewhere("clean-among-hosts", message, folder, CLEAN, folder)


def test_the_command_line_says_so_too(folder: Path) -> None:
    (folder / LEFT).mkdir()
    done = command_line(f_type(NETWORK["NFS"]), "clean", folder)
    assert done.returncode == 1
    assert "it is on NFS" in error_of(done)
    assert os.listdir(folder) == [LEFT]


def test_clean_removes_what_was_left_in_a_snapshot_only_where_no_other_host_writes(folder: Path) -> None:
    vmsnap.SnapshotWriter(folder / "vm1")
    (folder / "vm1" / LEFT).touch()
    assert command_line(f_type(NETWORK["CIFS"]), "clean", folder / "vm1").returncode == 1
    assert os.listdir(folder / "vm1") == [LEFT]


def test_there_is_no_error_where_nothing_was_left(folder: Path) -> None:
    done = command_line(f_type(NETWORK["NFS"]), "clean", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("name", LOCAL)
def test_clean_goes_on_where_a_lock_tells_everybody(folder: Path, name: str) -> None:
    (folder / LEFT).mkdir()
    done = command_line(f_type(LOCAL[name]), "clean", folder)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == []


def test_a_file_system_that_cannot_be_asked_is_not_cleaned(folder: Path) -> None:
    (folder / LEFT).mkdir()
    assert "the type of its file system is unknown" in error_of(command_line("fstatfs:error=ENOSYS", "clean", folder))
    assert os.listdir(folder) == [LEFT]
