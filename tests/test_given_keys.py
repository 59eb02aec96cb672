"""Keys as people have and give them: what is given and empty is refused, and never taken for what is not given."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from commands import error_of, run, write_private
from refusals import refused, refused_elsewhere, row
from support import pattern, run_python, tree
from vmsnap.keys import KeyWrapping, key_wrapping

ECDSA = (
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHFliOyIZs1gxGF3fmDxFykQhE88wy6AKDGFBfn0R6"
    "ZuvRmENABZQa9+pj9hMki+LX0qDJbmHTiWDbYv/cmFt/Q= bob@host"
)
# The type, and of the key the type again: all that shows whether it is one.
SECURITY_KEY = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29t carol@host"
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN dave@host, the second"


@pytest.fixture
def identity() -> str:
    return vmsnap.generate_identity()


@pytest.fixture
def recipient(identity: str) -> str:
    [recipient] = vmsnap.recipients_of(identity)
    return recipient


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    file = tmp_path / "ram.img"
    file.write_bytes(pattern(100_000))
    return file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for settings that does not exist yet; returns the file that an identity is made in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings/vmsnap/identity.txt"


def shell(tmp_path: Path, command: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which `vmsnap` is the command line."""
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    script = f'vmsnap() {{ "{sys.executable}" -m vmsnap "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=os.environ | environment, capture_output=True, timeout=300
    )
    assert done.returncode == status, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


# Recipients that nobody is among --------------------------------------------------------------------------------------

# The new snapshot is vm2, where there is one; vm1 is there, encrypted with vm.key, and plain is.
WRITING = {
    "dump": "dump ram.img vm2 {}",
    "dump-process": "dump-process $$ vm2 {}",
    "dump --encrypt": "dump ram.img vm2 --encrypt {}",
    "put --create": "put ram.img vm2 ram --create {}",
    "qemu save": "qemu save --qmp none.qmp vm2 {}",
    "qemu save --encrypt": "qemu save --qmp none.qmp vm2 --encrypt {}",
    "encrypt": "encrypt plain vm2 {}",
    "encrypt of an encrypted one": "encrypt vm1 vm2 --key-file vm.key {}",
    "rekey": "rekey vm1 --key-file vm.key {}",
}


def some_snapshots(folder: Path) -> None:
    write_private(folder / "vm.key", key := vmsnap.generate_key())
    vmsnap.SnapshotWriter(folder / "vm1", key=key).write_fragment("clock", 1)
    vmsnap.SnapshotWriter(folder / "plain").write_fragment("clock", 1)


@pytest.mark.parametrize("command", WRITING)
def test_a_file_of_recipients_that_names_nobody_is_refused_by_every_command(
    tmp_path: Path, ram: Path, home: Path, command: str
) -> None:
    some_snapshots(tmp_path)
    (tmp_path / "empty.txt").touch()
    before = tree(tmp_path)
    for given in ("-R empty.txt", "-R <(false)"):
        line = error_of(shell(tmp_path, f"vmsnap {WRITING[command].format(given)}", status=1))
        assert ": the file contains no recipients; write one per line" in line
        assert tree(tmp_path) == before


def test_each_file_of_recipients_has_to_name_somebody(tmp_path: Path, ram: Path, home: Path, recipient: str) -> None:
    (tmp_path / "comments.txt").write_text("# the team\r\n\r\n  # nobody yet\r\n")
    (tmp_path / "good.txt").write_text(recipient)
    before = tree(tmp_path)
    for given, named in (
        ("-R comments.txt", "comments.txt"),
        ("--encrypt -R comments.txt", "comments.txt"),
        ("-R /dev/null", "/dev/null"),
        ("-R <(false)", "/dev/fd/"),
        # Others do not make up for it.
        ("-R good.txt -R comments.txt", "comments.txt"),
        (f"-r {recipient} -R comments.txt", "comments.txt"),
    ):
        line = error_of(shell(tmp_path, f"vmsnap dump ram.img vm2 {given}", status=1))
        assert f"{named}" in line
        assert ": the file contains no recipients; " in line
        assert tree(tmp_path) == before
    shell(tmp_path, "vmsnap dump ram.img vm2 -R good.txt -R <(cat good.txt)")
    assert key_wrapping(tmp_path / "vm2") == KeyWrapping("age", None, ["X25519", "X25519"])


@pytest.mark.parametrize("command", WRITING)
def test_an_option_for_keys_that_is_empty_is_refused_by_every_command(
    tmp_path: Path, ram: Path, home: Path, command: str
) -> None:
    some_snapshots(tmp_path)
    prefix = "--new-" if command.startswith(("encrypt", "rekey")) else "--"
    cases = [("-R ''", 2, "the path is empty")]
    if command != "put --create":
        cases.append((f"{prefix}key-file ''", 2, "the path is empty"))
        cases.append((f"{prefix}key-file /dev/null", 1, "is not a key file: expected 32 bytes"))
    if not command.startswith("qemu"):  # which looks for QEMU first, and finds none
        cases.append(('-r "$NOBODY"', 1, '"" is not an age recipient'))
    before = tree(tmp_path)
    for given, status, said in cases:
        done = shell(tmp_path, f"vmsnap {WRITING[command].format(given)}", status=status)
        assert said in done.stderr.decode()
        assert tree(tmp_path) == before


def test_files_of_keys_that_are_empty_are_refused(tmp_path: Path, ram: Path, home: Path) -> None:
    write_private(tmp_path / "empty", b"")
    before = tree(tmp_path)
    for option, said in (
        ("--key-file", "is not a key file: expected 32 bytes"),
        ("--passphrase-file", "must be a passphrase of 1 to 4096 bytes"),
    ):
        for file in ("empty", "/dev/null", "<(false)"):
            done = shell(tmp_path, f"vmsnap dump ram.img vm2 {option} {file}", status=1)
            assert said in error_of(done)
            assert tree(tmp_path) == before


def test_an_empty_path_is_not_the_current_directory(tmp_path: Path, key_file: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_fragment("clock", 1)
    before = tree(tmp_path)
    for arguments in (
        ["ls", ""],
        ["verify", ""],
        ["seal", ""],
        ["clean", ""],
        ["encrypt", "", tmp_path / "vm2"],
        ["decrypt", "vm1", ""],
        ["ls", "", "-i", ""],
        ["keygen", "-o", ""],
        ["ls", tmp_path / "vm1", "--passphrase-fd", "-1"],
    ):
        assert b"Error: Invalid value for" in run(*arguments, status=2, cwd=tmp_path / "vm1").stderr
        assert tree(tmp_path) == before


@row("unparsable-recipient", "key-length", "empty-passphrase")
@pytest.mark.parametrize("make", [vmsnap.SnapshotWriter, vmsnap.create])
def test_no_recipients_are_refused_by_the_library(tmp_path: Path, home: Path, make: Callable[..., object]) -> None:
    key = vmsnap.generate_key()
    vmsnap.SnapshotWriter(tmp_path / "vm1", key=key)
    nobody: list[Any] = [[], (), iter([]), {}, set()]
    for recipients in nobody:
        for encrypt in (False, True):
            with refused(
                "unparsable-recipient", "the list of recipients is empty, so nobody could open the snapshot", tmp_path
            ):
                make(tmp_path / "vm2", encrypt, recipients=recipients)
        with refused("unparsable-recipient", "the list of recipients is empty", tmp_path):
            vmsnap.rekey(tmp_path / "vm1", key=key, recipients=recipients)
    for text in ("", " ", "\n"):
        with refused("unparsable-recipient", '"" is not an age recipient', tmp_path):
            make(tmp_path / "vm2", recipients=text.strip())
    with refused("key-length", "32 bytes", tmp_path):
        make(tmp_path / "vm2", key=b"")
    with refused("empty-passphrase", "cannot be empty", tmp_path):
        make(tmp_path / "vm2", passphrase="")


@row("unparsable-identity", "not-encrypted")
def test_no_identities_open_nothing(tmp_path: Path, home: Path, recipient: str, identity: str) -> None:
    """Neither a snapshot that one's own identity would open, nor a plain one."""
    home.parent.mkdir(parents=True)
    write_private(home, identity.encode())
    vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=recipient)
    vmsnap.SnapshotWriter(tmp_path / "plain")
    assert vmsnap.SnapshotReader(tmp_path / "vm1").encrypted
    nothing: list[Any] = [[], (), iter([])]
    for identities in nothing:
        with refused("unparsable-identity", "the list of identities is empty", tmp_path):
            vmsnap.SnapshotReader(tmp_path / "vm1", identities=identities)
    with refused("not-encrypted", "is not encrypted", tmp_path):
        vmsnap.SnapshotReader(tmp_path / "plain", identities=[])
    empty = write_private(tmp_path / "empty", b"")
    for path in (empty, Path("/dev/null")):
        assert "it contains no identity" in error_of(run("ls", tmp_path / "vm1", "-i", path, status=1))
        assert "it contains no identity" in error_of(run("ls", tmp_path / "vm1", "-i", home, "-i", path, status=1))
        with refused("unparsable-identity", f"{path}: it contains no identity", tmp_path):
            vmsnap.recipients_of(path)


@row("unparsable-identity")
@pytest.mark.parametrize("name", ["VMSNAP_IDENTITY", "VMSNAP_IDENTITY_FILE"])
def test_a_variable_for_an_identity_that_is_empty_is_refused(
    tmp_path: Path, home: Path, recipient: str, identity: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parent.mkdir(parents=True)
    write_private(home, identity.encode())
    vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=recipient)
    monkeypatch.setenv(name, "")
    message = rf"\${name} is set but empty; set it to an identity, or unset it"
    with refused("unparsable-identity", message, tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", True)
    with refused("unparsable-identity", message, tmp_path):
        vmsnap.SnapshotReader(tmp_path / "vm1")


def test_variables_that_others_define_may_be_empty(
    tmp_path: Path, home: Path, recipient: str, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    home.parent.mkdir(parents=True)
    write_private(home, identity.encode())
    # Joined with an empty path it would be looked for here.
    write_private(tmp_path / "vmsnap-identity", b"")
    monkeypatch.chdir(tmp_path)
    vmsnap.SnapshotWriter(tmp_path / "vm1", True)
    assert vmsnap.SnapshotReader(tmp_path / "vm1", identities=identity).encrypted


# Files as people have them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    ["{}", "\ufeff{}\r\n", "\ufeff# the team\r\n\r\n{}", "  {}\t\n", "{} # alice", "{}\n" + ED25519 + "\n"],
)
def test_recipients_are_read_as_editors_write_them(tmp_path: Path, ram: Path, recipient: str, form: str) -> None:
    (tmp_path / "team.txt").write_text(form.format(recipient), newline="")
    done = run("dump", ram, tmp_path / "vm1", "-R", tmp_path / "team.txt")
    assert b"ignored" not in done.stderr
    kinds = [kind.split()[0] for kind in key_wrapping(tmp_path / "vm1").recipients]  # type: ignore[union-attr]
    assert kinds == ["X25519", "ssh-ed25519"][: 1 + ("ssh-" in form)]


def test_ssh_keys_that_age_cannot_encrypt_to_are_ignored_with_a_warning(
    tmp_path: Path, ram: Path, recipient: str
) -> None:
    team = tmp_path / "team.txt"
    team.write_text(f"# the team\n{ECDSA}\n{recipient}\n{SECURITY_KEY}\n")
    told = run("dump", ram, tmp_path / "vm1", "-R", team).stderr.decode()
    assert f"vmsnap: {team}: line 2 is ignored: age supports SSH keys of the types" in told
    assert f"{team}: line 4 is ignored: " in told
    assert "not sk-ssh-ed25519@openssh.com\n" in told
    assert key_wrapping(tmp_path / "vm1") == KeyWrapping("age", None, ["X25519"])
    team.write_text(f"{ECDSA}\n")
    before = tree(tmp_path)
    line = error_of(run("dump", ram, tmp_path / "vm2", "-R", team, status=1))
    assert f"{team}: the file contains no recipients that age supports; line 1 is ignored: " in line
    # Given as such it is an error.
    assert "cannot be used as a recipient" in error_of(run("dump", ram, tmp_path / "vm2", "-r", ECDSA, status=1))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hunter2", "is not an age recipient: expected age1"),
        ("ssh-ed25519 AAAA hunter2", "is not an age recipient"),
        ("AGE-SECRET-KEY-1HUNTER2", "is an identity"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "is not an age recipient"),
    ],
)
def test_a_line_that_is_not_a_recipient_is_named_with_its_file_and_not_quoted(
    tmp_path: Path, ram: Path, recipient: str, line: str, said: str
) -> None:
    team = tmp_path / "team.txt"
    team.write_text(f"# the team\r\n{recipient}\r\n\r\n{line}\r\n", newline="")
    before = tree(tmp_path)
    told = error_of(run("dump", ram, tmp_path / "vm1", "-R", team, status=1))
    assert f"{team}: line 4 {said}" in told
    assert "hunter2" not in told.lower()
    assert tree(tmp_path) == before
    team.write_bytes(recipient.encode("utf-16"))
    assert f"{team}: the file is encoded in UTF-16; save it in UTF-8" in error_of(
        run("dump", ram, tmp_path / "vm1", "-R", team, status=1)
    )
    assert "cannot be read" in error_of(run("dump", ram, tmp_path / "vm1", "-R", tmp_path, status=1))


@row("unparsable-identity")
@pytest.mark.parametrize("form", ["\ufeff{}\r\n", "\r\n  {} \r\n", "# me\r\n{}"])
def test_identities_are_read_as_editors_write_them(tmp_path: Path, recipient: str, identity: str, form: str) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=recipient)
    file = write_private(tmp_path / "id.txt", form.format(identity).encode())
    assert vmsnap.SnapshotReader(tmp_path / "vm1", identities=file).encrypted
    assert vmsnap.recipients_of(file) == [recipient]
    write_private(file, file.read_bytes() + b"\r\nhunter2\r\n")
    number = 1 + file.read_bytes().split(b"\n").index(b"hunter2\r")
    for call in (vmsnap.recipients_of, lambda file: vmsnap.SnapshotReader(tmp_path / "vm1", identities=file)):
        with refused("unparsable-identity", f"{file}: line {number} is not an identity", tmp_path):
            call(file)
    write_private(file, identity.encode("utf-16"))
    with refused("unparsable-identity", f"{file}: it is encoded in UTF-16; save it in UTF-8", tmp_path):
        vmsnap.recipients_of(file)


def test_an_ssh_key_may_have_a_mark_and_other_line_ends(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("there is no ssh-keygen")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=(tmp_path / "key.pub").read_text())
    content = (tmp_path / "key").read_bytes()
    file = write_private(tmp_path / "key.txt", b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert vmsnap.SnapshotReader(tmp_path / "vm1", identities=file).encrypted


# Who may use the file of a key ----------------------------------------------------------------------------------------


@pytest.fixture
def secrets(tmp_path: Path, identity: str) -> dict[str, Path]:
    """A file for each option that takes a secret."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    return {
        "--key-file": write_private(folder / "k", vmsnap.generate_key()),
        "--passphrase-file": write_private(folder / "p", b"hunter2\n"),
        "-i": write_private(folder / "i", identity.encode()),
    }


def snapshots_for(folder: Path, secrets: dict[str, Path], recipient: str) -> dict[str, Path]:
    vmsnap.SnapshotWriter(folder / "--key-file", key=secrets["--key-file"].read_bytes())
    vmsnap.SnapshotWriter(folder / "--passphrase-file", passphrase="hunter2")
    vmsnap.SnapshotWriter(folder / "-i", recipients=recipient)
    return {option: folder / option for option in secrets}


def test_secrets_that_others_may_use_are_refused_whatever_they_are(
    tmp_path: Path, secrets: dict[str, Path], recipient: str
) -> None:
    for option, root in snapshots_for(tmp_path, secrets, recipient).items():
        for mode in (0o644, 0o640, 0o444, 0o440, 0o602):
            secrets[option].chmod(mode)
            told = error_of(run("ls", root, option, secrets[option], status=3 if option == "-i" else 1))
            assert (
                f"{secrets[option]}: other users may read or change it (mode {mode:04o}): chmod 600 '{secrets[option]}'"
                in told
            )
            assert f"pass its contents, in a shell as <(cat '{secrets[option]}')" in told
        secrets[option].chmod(0o400)
        run("ls", root, option, secrets[option])


def test_a_secret_may_come_from_a_pipe_however_late(tmp_path: Path, secrets: dict[str, Path], recipient: str) -> None:
    for option, root in snapshots_for(tmp_path, secrets, recipient).items():
        secrets[option].chmod(0o644)
        shell(tmp_path, f"vmsnap ls ./{root.name} {option} <(cat {secrets[option]})")
        # The other end writes nothing until the process waits for it.
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "vmsnap", "ls", str(root), option, f"/dev/fd/{reader}"]
        with subprocess.Popen(command, pass_fds=[reader], stderr=subprocess.PIPE) as child:
            await_opened_again(child.pid, f"pipe:[{os.fstat(reader).st_ino}]")
            os.write(writer, secrets[option].read_bytes())
            os.close(writer)
            os.close(reader)
            assert child.stderr is not None
            assert (child.stderr.read(), child.wait(timeout=60)) == (b"", 0)


def await_opened_again(pid: int, name: str) -> None:
    """Wait until a process has opened a pipe that it inherited a second time."""
    import time

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        count = 0
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                count += os.readlink(entry.path) == name
            except FileNotFoundError:
                continue
        if count == 2:
            return
        time.sleep(0.01)
    pytest.fail("the pipe was not opened")


def test_on_a_read_only_file_system_secrets_may_be_readable(
    tmp_path: Path, small_disk: Path, secrets: dict[str, Path], recipient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes mounts secrets, and systemd credentials: nobody can change their modes."""
    roots = snapshots_for(tmp_path, secrets, recipient)
    (small_disk / "bad").write_bytes(vmsnap.generate_key())
    (small_disk / "bad").chmod(0o666)
    for index, mode in enumerate((0o444, 0o440, 0o644)):
        for option, file in secrets.items():
            shutil.copy(file, small_disk / f"{option}{index}")
            (small_disk / f"{option}{index}").chmod(mode)
    shutil.copy(secrets["-i"], small_disk / "vmsnap-identity")
    (small_disk / "vmsnap-identity").chmod(0o444)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for option, root in roots.items():
        for index in range(3):
            run("ls", root, option, small_disk / f"{option}{index}")
    assert "other users may read or change it" in error_of(
        run("ls", roots["--key-file"], "--key-file", small_disk / "bad", status=1)
    )
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(small_disk))
    assert vmsnap.SnapshotReader(roots["-i"]).encrypted


def test_of_another_owner_s_secret_a_group_may_read(tmp_path: Path, secrets: dict[str, Path], recipient: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for option, root in snapshots_for(tmp_path, secrets, recipient).items():
        os.chown(secrets[option], 65534, 65534)
        secrets[option].chmod(0o440)
        run("ls", root, option, secrets[option])
        for mode in (0o444, 0o460):
            secrets[option].chmod(mode)
            assert "other users may read or change it" in error_of(
                run("ls", root, option, secrets[option], status=3 if option == "-i" else 1)
            )


# Warnings as errors ---------------------------------------------------------------------------------------------------

MAKERS = {
    "SnapshotWriter": "vmsnap.SnapshotWriter(sys.argv[1] + '/vm1', encrypt=True)",
    "create": "vmsnap.create(sys.argv[1] + '/vm1', encrypt=True).commit()",
}


@row("new-identity")
@pytest.mark.parametrize("maker", MAKERS)
def test_where_the_warning_of_a_new_identity_is_an_error_nothing_is_made(
    tmp_path: Path, home: Path, maker: str
) -> None:
    script = f"import warnings; warnings.simplefilter('error'); {MAKERS[maker]}"
    message = f"creating the identity {home}"
    for _ in range(2):  # the second time too: there is no identity yet
        refused_elsewhere("new-identity", message, tmp_path, script, tmp_path)
    # What was there before stays.
    home.parent.mkdir(parents=True)
    refused_elsewhere("new-identity", message, tmp_path, script, tmp_path)
    result = run_python(f"import sys, vmsnap; {MAKERS[maker]}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("NewIdentityWarning") == 1
    assert vmsnap.SnapshotReader(tmp_path / "vm1", identities=home).encrypted


def test_the_command_line_tells_of_a_new_identity_whatever_python_is_told_of_warnings(
    tmp_path: Path, ram: Path, home: Path
) -> None:
    for number, setting in enumerate(("error", "ignore", "")):
        shutil.rmtree(home.parent, ignore_errors=True)
        root = tmp_path / f"vm{number}"
        done = run("dump", ram, root, "--encrypt", env={"PYTHONWARNINGS": setting})
        assert done.stderr.decode().count(f"vmsnap: creating the identity {home}: back it up") == 1
        assert vmsnap.verify(root).ok
