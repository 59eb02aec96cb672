"""Keys: who can open what, and what everything that cannot be used gives."""

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cbor2
import pytest
import vmsnap
from commands import error_of, run, write_private
from key_provider import SocketProvider, key_service
from refusals import refused, refused_elsewhere, row
from support import pattern, read, run_python, run_python_well, tree, write
from toolchains import UnavailableError, go_programs
from vmsnap.keys import KeyWrapping, key_wrapping

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = REPOSITORY / "tests/programs"

PLUGIN_RECIPIENT = "age1vmsnaptest1w3jhxapqwfjkx6tsd9jkuaqlga587"
PLUGIN_IDENTITY = "AGE-PLUGIN-VMSNAPTEST-1W3JHXAPQD9JX2MN5D968JSED2W8"
POST_QUANTUM_RECIPIENT = "age1pq1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqfqj7ru"
# As `ssh-keygen` makes them; an RSA key is slow to make.
PASSPHRASE = "correct horse battery staple"
AGE_CHECKSUM = "h1:X0TZjehAZylOIj4DubWYU1vWQxv9bJpo+Uu2/LGhi1o="
NO_PYRAGE = "no pyrage beside this Python: pip install --group age (no wheel for free-threaded CPython)"


@dataclass(frozen=True)
class Pair:
    """An identity and its recipient."""

    identity: str
    recipient: str

    @classmethod
    def new(cls) -> "Pair":
        identity = vmsnap.generate_identity()
        [recipient] = vmsnap.recipients_of(identity)
        return cls(identity, recipient)

    def file(self, path: Path) -> Path:
        return write_private(path, self.identity.encode() + b"\n")


@pytest.fixture
def pair() -> Pair:
    return Pair.new()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for settings that is not there yet; returns the file that an identity belongs into."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings/vmsnap/identity.txt"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{PROGRAMS}:{os.environ['PATH']}")


def ssh_key(path: Path, kind: str, passphrase: str = "") -> Path:
    if not shutil.which("ssh-keygen"):
        pytest.skip("there is no ssh-keygen")
    size = ["-b", "2048"] if kind == "rsa" else []
    subprocess.run(["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def go_age() -> Path:
    """The folder with the Go programs `age` and `age-keygen`."""
    try:
        return go_programs("filippo.io/age", "v1.2.1", AGE_CHECKSUM, "./cmd/age", "./cmd/age-keygen", least="1.19")
    except UnavailableError as error:
        pytest.skip(f"age cannot be built: {error}")


# Who can open what ----------------------------------------------------------------------------------------------------


def check_opens(root: Path, **credentials: Any) -> None:
    """Read back what `write_some` wrote, and add to it."""
    reader = vmsnap.SnapshotReader(root, **credentials)
    assert reader.encrypted
    assert read(reader.namespace("disks"), "sda") == pattern(10_000)
    vmsnap.SnapshotWriter.open(root, **credentials).write_fragment(f"more {time.monotonic_ns()}", 1)


def write_some(root: Path, **credentials: Any) -> vmsnap.SnapshotWriter:
    writer = vmsnap.SnapshotWriter(root, **credentials)
    write(writer.add_namespace("disks"), "sda", pattern(10_000), 1024)
    return writer


def test_recipients_are_opened_by_their_identities(tmp_path: Path, pair: Pair) -> None:
    other, third = Pair.new(), Pair.new()
    root = write_some(tmp_path / "vm1", recipients=[pair.recipient, other.recipient]).path
    several = write_private(tmp_path / "several.txt", f"# mine\n{third.identity}\n\n{other.identity}\n".encode())
    forms: list[Any] = [
        pair.identity,
        [pair.identity],
        (third.identity, other.identity),
        f"# a comment\n{other.identity}\n",
        pair.file(tmp_path / "id.txt"),
        [several],
        [vmsnap.IdentityFile(several, "not needed")],
    ]
    for identities in forms:
        check_opens(root, identities=identities)
    assert key_wrapping(root) == KeyWrapping("age", None, ["X25519", "X25519"])
    assert vmsnap.recipients_of(several) == [third.recipient, other.recipient]


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
@pytest.mark.parametrize("passphrase", ["", PASSPHRASE])
def test_ssh_keys_are_recipients_and_identities(tmp_path: Path, kind: str, passphrase: str, pair: Pair) -> None:
    file = ssh_key(tmp_path / "key", kind, passphrase)
    public = (tmp_path / "key.pub").read_text()
    root = write_some(tmp_path / "vm1", recipients=[public, pair.recipient]).path
    identity: Any = vmsnap.IdentityFile(file, passphrase) if passphrase else file
    check_opens(root, identities=identity)
    if not passphrase:
        check_opens(root, identities=file.read_text())
    check_opens(root, identities=pair.identity)
    [first, second] = key_wrapping(root).recipients  # type: ignore[union-attr]
    assert first.startswith(f"ssh-{kind} ")
    assert second == "X25519"
    assert public.startswith(vmsnap.recipients_of(identity)[0])


def test_a_plugin_wraps_and_unwraps(tmp_path: Path, plugin: None, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", recipients=[pair.recipient, PLUGIN_RECIPIENT]).path
    check_opens(root, identities=PLUGIN_IDENTITY)
    check_opens(root, identities=write_private(tmp_path / "id.txt", PLUGIN_IDENTITY.encode()))
    check_opens(root, identities=pair.identity)
    assert key_wrapping(root) == KeyWrapping("age", None, ["X25519", "vmsnaptest"])


@pytest.mark.parametrize("form", [PASSPHRASE, PASSPHRASE.encode(), lambda: PASSPHRASE, lambda: PASSPHRASE.encode()])
def test_a_passphrase_opens_what_it_was_written_with(tmp_path: Path, form: Any) -> None:
    root = write_some(tmp_path / "vm1", passphrase=form).path
    check_opens(root, passphrase=form)
    assert key_wrapping(root) == KeyWrapping("passphrase", None, [])


def test_a_bytearray_is_taken_and_cleared(tmp_path: Path) -> None:
    for call in (vmsnap.SnapshotWriter, vmsnap.SnapshotReader):
        passphrase = bytearray(PASSPHRASE.encode())
        call(tmp_path / "vm1", passphrase=passphrase)
        assert passphrase == bytes(len(PASSPHRASE))


def test_a_passphrase_is_not_asked_for_in_vain(tmp_path: Path, key: bytes, pair: Pair) -> None:
    def ask() -> str:
        pytest.fail("asked")

    vmsnap.SnapshotWriter(tmp_path / "raw", key=key)
    vmsnap.SnapshotWriter(tmp_path / "plain")
    vmsnap.SnapshotWriter(tmp_path / "age", recipients=pair.recipient)
    for name in ("raw", "plain", "age", "absent"):
        with pytest.raises((vmsnap.KeyUnavailableError, vmsnap.NotEncryptedError, FileNotFoundError)):
            vmsnap.SnapshotReader(tmp_path / name, passphrase=ask)
    with pytest.raises(FileExistsError):
        vmsnap.SnapshotWriter(tmp_path / "raw", passphrase=ask)
    check = vmsnap.SnapshotReader(tmp_path / "age", identities=vmsnap.IdentityFile(pair.file(tmp_path / "id"), ask))
    assert check.encrypted


def test_what_asks_for_a_passphrase_may_raise(tmp_path: Path) -> None:
    class MineError(Exception):
        pass

    for error in (MineError("mine"), KeyboardInterrupt(), SystemExit(3)):

        def ask(error: BaseException = error) -> str:
            raise error

        with pytest.raises(type(error)) as caught:
            vmsnap.SnapshotWriter(tmp_path / "vm1", passphrase=ask)
        assert caught.value is error
        assert not (tmp_path / "vm1").exists()


def test_a_key_service_opens_what_it_wrapped(tmp_path: Path) -> None:
    with key_service(tmp_path) as socket:
        provider = SocketProvider(socket)
        root = write_some(tmp_path / "vm1", key_provider=provider).path
        check_opens(root, key_provider=provider)
        assert key_wrapping(root) == KeyWrapping("key-provider", "socket-service", [])
        content = (root / "enc_metadata").read_bytes()
        assert content.startswith(b"\xd9\xd9\xf7")  # tag 55799, self-described CBOR
        envelope = cbor2.loads(content[3:])
        assert list(envelope) == ["format", "version", "provider", "wrapped"]
        assert (envelope["format"], envelope["version"]) == ("vmsnap-wrapped-key", 1)
        payload = cbor2.loads(provider.unwrap(envelope["wrapped"]))
        assert list(payload) == ["format", "version", "snapshot_id", "data_key", "sealed", "requires"]


def test_a_provider_may_return_any_buffer_and_is_called_without_the_interpreter_s_lock(tmp_path: Path) -> None:
    class Provider:
        name = "Kürzel with spaces"

        def wrap(self, payload: bytes) -> bytearray:
            event.wait(5)
            return bytearray(one ^ 0x55 for one in payload)

        def unwrap(self, wrapped: bytes) -> memoryview:
            return memoryview(bytes(self.wrap(wrapped)))

    event = threading.Event()
    threading.Timer(0.1, event.set).start()
    root = write_some(tmp_path / "vm1", key_provider=Provider()).path
    check_opens(root, key_provider=Provider())


def test_handles_travel_with_their_key_alone(tmp_path: Path, pair: Pair) -> None:
    """A pickle needs neither identity nor provider any more."""
    import pickle

    writer = write_some(tmp_path / "vm1", recipients=pair.recipient)
    pickle.loads(pickle.dumps(writer)).write_fragment("a", 1)
    reader = vmsnap.SnapshotReader(tmp_path / "vm1", identities=pair.identity)
    assert pickle.loads(pickle.dumps(reader)).read_fragment("a") == 1


# The default identity ------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_writer_makes_an_identity_and_all_use_it(tmp_path: Path, home: Path) -> None:
    with pytest.warns(vmsnap.NewIdentityWarning, match=f"creating the identity {home}: back it up") as caught:
        write_some(tmp_path / "vm1", encrypt=True)
    assert caught[0].filename == write_some.__code__.co_filename
    assert (mode(home), mode(home.parent)) == (0o600, 0o700)
    comment, public, identity = home.read_text().splitlines()
    assert comment.startswith("# created: 20")
    assert public == f"# public key: {vmsnap.recipients_of(identity)[0]}"
    assert os.listdir(home.parent) == ["identity.txt"]
    before = tree(home.parent)
    with warnings.catch_warnings(action="error"):
        write_some(tmp_path / "vm2", encrypt=True)
        for name in ("vm1", "vm2"):
            check_opens(tmp_path / name)
            check_opens(tmp_path / name, identities=home)
    assert tree(home.parent) == before


@row("no-identity")
def test_a_reader_makes_no_identity(tmp_path: Path, home: Path, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    with refused("no-identity", rf"no identity in \$VMSNAP_IDENTITY, .* or {home}; pass the key that", tmp_path):
        vmsnap.SnapshotReader(root)
    assert not home.parent.exists()


@row("wrong-identity")
def test_identities_are_looked_for_in_order(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair.new() for _ in range(4)]
    for index, each in enumerate(pairs):
        write_some(tmp_path / str(index), recipients=each.recipient)
    (tmp_path / "credentials").mkdir()
    home.parent.mkdir(parents=True)
    pairs[3].file(home)
    check_opens(tmp_path / "3")
    pairs[2].file(tmp_path / "credentials/vmsnap-identity").chmod(0o440)  # as systemd makes them
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    check_opens(tmp_path / "2")
    monkeypatch.setenv("VMSNAP_IDENTITY_FILE", str(pairs[1].file(tmp_path / "id.txt")))
    check_opens(tmp_path / "1")
    monkeypatch.setenv("VMSNAP_IDENTITY", pairs[0].identity)
    check_opens(tmp_path / "0")
    with warnings.catch_warnings(action="error"):
        write_some(tmp_path / "new", encrypt=True)
    monkeypatch.delenv("VMSNAP_IDENTITY")
    with refused("wrong-identity", "id.txt .*none of the identities opens it", tmp_path):
        vmsnap.SnapshotReader(tmp_path / "new")
    check_opens(tmp_path / "new", identities=pairs[0].identity)
    # A folder of credentials without ours is that of another program's.
    monkeypatch.delenv("VMSNAP_IDENTITY_FILE")
    (tmp_path / "credentials/vmsnap-identity").unlink()
    check_opens(tmp_path / "3")


def test_processes_that_make_an_identity_at_once_agree_on_one(tmp_path: Path, home: Path) -> None:
    script = "import sys, vmsnap; vmsnap.SnapshotWriter(sys.argv[1], True).write_fragment('a', 1)"
    for turn in range(3):
        shutil.rmtree(home.parent, ignore_errors=True)
        with ThreadPoolExecutor(6) as pool:
            roots = [tmp_path / f"{turn}-{index}" for index in range(6)]
            results = list(pool.map(lambda root: run_python(script, root), roots))
        assert [result.returncode for result in results] == [0] * 6
        assert sum("NewIdentityWarning" in result.stderr for result in results) == 1
        assert os.listdir(home.parent) == ["identity.txt"]
        for root in roots:
            assert vmsnap.SnapshotReader(root).read_fragment("a") == 1


@row("unparsable-identity", "identity-for-all", "identity-directory")
@pytest.mark.parametrize("where", ["VMSNAP_IDENTITY", "VMSNAP_IDENTITY_FILE", "home"])
def test_a_default_identity_that_cannot_be_used_is_an_error_and_nothing_else_is_tried(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    secret = "AGE-SECRET-KEY-1HUNTER2"
    file = write_private(tmp_path / "id.txt", f"# ok\n{secret}\n".encode())
    if where == "home":
        home.parent.mkdir(parents=True)
        shutil.move(file, home)
        file = home
    else:
        monkeypatch.setenv(where, f"# ok\n{secret}" if where == "VMSNAP_IDENTITY" else str(file))
    place = r"\$VMSNAP_IDENTITY: " if where == "VMSNAP_IDENTITY" else f"{file}.*: "
    with refused("unparsable-identity", f"{place}line 2 is not an identity", tmp_path) as _:
        vmsnap.SnapshotWriter(tmp_path / "vm1", True)
    if where == "VMSNAP_IDENTITY":
        return
    file.write_text(vmsnap.generate_identity())
    file.chmod(0o644)
    with refused(
        "identity-for-all", rf"{file}.*other users may read or change it \(mode 0644\): chmod 600 '{file}'", tmp_path
    ):
        vmsnap.SnapshotWriter(tmp_path / "vm1", True)
    file.write_text("")
    file.chmod(0o600)
    with refused("unparsable-identity", "it contains no identity", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", True)
    file.unlink()
    file.mkdir()
    with refused("identity-directory", f"{file}.*cannot be read", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", True)


@row("identity-missing")
def test_a_file_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("VMSNAP_IDENTITY_FILE", str(tmp_path / "absent.txt"))
    with refused("identity-missing", r"absent.txt \(from \$VMSNAP_IDENTITY_FILE\).*cannot be read", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", True)
    root = write_some(tmp_path / "vm1", recipients=Pair.new().recipient).path
    with refused("identity-missing", "absent.txt: cannot be read", tmp_path):
        vmsnap.SnapshotReader(root, identities=Path("absent.txt"))


@row("unwritable-home")
def test_a_home_that_cannot_be_written_to_is_an_error(tmp_path: Path, home: Path) -> None:
    (tmp_path / "settings").write_text("a file")
    with refused("unwritable-home", f"cannot create the identity file {home}; set .VMSNAP_IDENTITY_FILE", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", True)


@row("no-home")
def test_without_a_home_nothing_is_made(tmp_path: Path) -> None:
    script = (
        "[os.environ.pop(name, None) for name in ('HOME', 'XDG_CONFIG_HOME')]; vmsnap.SnapshotWriter(sys.argv[1], True)"
    )
    message = r"there is no place for an identity: set \$XDG_CONFIG_HOME, \$HOME or \$VMSNAP_IDENTITY_FILE"
    refused_elsewhere("no-home", message, tmp_path, script, tmp_path / "vm1")


# Others' age ---------------------------------------------------------------------------------------------------------


def test_age_in_go_and_vmsnap_open_each_other_s(tmp_path: Path, go_age: Path, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    identity = pair.file(tmp_path / "id.txt")
    command = [go_age / "age", "-d", "-i", identity, root / "enc_metadata"]
    payload = subprocess.run(command, check=True, capture_output=True).stdout
    assert cbor2.loads(payload)["format"] == "vmsnap-key"

    made = tmp_path / "made.txt"
    subprocess.run([go_age / "age-keygen", "-o", made], check=True, capture_output=True)
    [recipient] = vmsnap.recipients_of(made)
    shown = subprocess.run([go_age / "age-keygen", "-y", made], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == recipient == run("keygen", "--recipient", made).stdout.decode().strip()
    ours = tmp_path / "ours.txt"
    run("keygen", "-o", ours)
    shown = subprocess.run([go_age / "age-keygen", "-y", ours], check=True, capture_output=True, text=True).stdout
    assert vmsnap.recipients_of(ours) == [shown.strip()]

    wrapped = subprocess.run([go_age / "age", "-r", recipient], check=True, capture_output=True, input=payload).stdout
    (root / "enc_metadata").write_bytes(wrapped)
    check_opens(root, identities=made)


def test_pyrage_and_vmsnap_open_each_other_s(tmp_path: Path, pair: Pair) -> None:
    pyrage = pytest.importorskip("pyrage", reason=NO_PYRAGE)

    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    file = root / "enc_metadata"
    identity = pyrage.x25519.Identity.from_str(pair.identity)
    payload = pyrage.decrypt(file.read_bytes(), [identity])
    file.write_bytes(pyrage.encrypt(payload, [identity.to_public()]))
    check_opens(root, identities=pair.identity)
    file.write_bytes(pyrage.passphrase.encrypt(payload, PASSPHRASE))
    check_opens(root, passphrase=PASSPHRASE)
    vmsnap.rekey(root, passphrase=PASSPHRASE, new_passphrase="another")
    assert pyrage.passphrase.decrypt(file.read_bytes(), "another") == payload


@row("wrong-passphrase", "identity-encrypted")
def test_an_identity_file_that_age_encrypted_opens_with_its_passphrase(tmp_path: Path, pair: Pair) -> None:
    pyrage = pytest.importorskip("pyrage", reason=NO_PYRAGE)

    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    for armored in (False, True):
        file = tmp_path / f"{armored}.age"
        file.write_bytes(pyrage.passphrase.encrypt(pair.identity.encode(), PASSPHRASE, armored=armored))
        file.chmod(0o644)  # it is no secret
        assert vmsnap.SnapshotReader(root, identities=vmsnap.IdentityFile(file, lambda: PASSPHRASE)).encrypted
    with refused("wrong-passphrase", f"{file}: the passphrase or identity is wrong", tmp_path):
        vmsnap.SnapshotReader(root, identities=vmsnap.IdentityFile(file, "wrong"))
    with refused("identity-encrypted", f"{file} is encrypted; pass its passphrase with it", tmp_path):
        vmsnap.SnapshotReader(root, identities=file)


def test_in_an_emergency_age_and_a_script_are_enough(tmp_path: Path, go_age: Path, pair: Pair) -> None:
    """The procedure of docs/keys.md, with no vmsnap."""
    write_some(tmp_path / "vm1", recipients=pair.recipient)
    for file in (REPOSITORY / "examples/readers/python").glob("*.py"):
        shutil.copy(file, tmp_path)
    # Beside the script it comes first, so that nothing of ours could be imported.
    (tmp_path / "vmsnap.py").write_text("raise ImportError('there is no vmsnap')")
    pair.file(tmp_path / "id.txt")
    page = (REPOSITORY / "docs/keys.md").read_text()
    [command] = re.findall(r"```sh\n(.*)\n```", page.partition("## Without vmsnap")[2])
    path = f"{go_age}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True)
    assert (tmp_path / "sda.img").read_bytes() == pattern(10_000), done.stderr


# Rekey ----------------------------------------------------------------------------------------------------------------


def test_rekey_changes_what_opens_and_nothing_else(tmp_path: Path, key: bytes, pair: Pair, home: Path) -> None:
    root = write_some(tmp_path / "vm1", key=key).path
    fragments = {path: entry for path, entry in tree(root).items() if path != "enc_metadata"}
    other = Pair.new()
    with key_service(tmp_path) as socket:
        provider = SocketProvider(socket)
        steps: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
            ({"key": key}, {"recipients": [pair.recipient]}, {"identities": pair.identity}),
            ({"identities": pair.identity}, {"recipients": other.recipient}, {"identities": [other.identity]}),
            ({"identities": other.identity}, {"new_passphrase": "one"}, {"passphrase": "one"}),
            ({"passphrase": "one"}, {"new_passphrase": lambda: "two"}, {"passphrase": "two"}),
            ({"passphrase": "two"}, {"new_key_provider": provider}, {"key_provider": provider}),
            ({"key_provider": provider}, {"new_key": key[::-1]}, {"key": key[::-1]}),
            ({"key": key[::-1]}, {"new_key": key}, {"key": key}),
        ]
        for old, new, opens in steps:
            vmsnap.rekey(root, **old, **new)
            assert read(vmsnap.SnapshotReader(root, **opens).namespace("disks"), "sda") == pattern(10_000)
            assert mode(root / "enc_metadata") == 0o600
            with pytest.raises((vmsnap.AuthenticationError, vmsnap.KeyUnavailableError)):
                vmsnap.SnapshotReader(root, **old)
            assert {path: entry for path, entry in tree(root).items() if path != "enc_metadata"} == fragments


def test_rekey_keeps_what_a_later_version_wrote_into_the_payload(tmp_path: Path, pair: Pair) -> None:
    pyrage = pytest.importorskip("pyrage", reason=NO_PYRAGE)

    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    identity = pyrage.x25519.Identity.from_str(pair.identity)
    file = root / "enc_metadata"
    payload = cbor2.loads(pyrage.decrypt(file.read_bytes(), [identity])) | {"note": ["later", {"a": 1}]}
    file.write_bytes(pyrage.encrypt(cbor2.dumps(payload), [identity.to_public()]))
    vmsnap.rekey(root, identities=pair.identity, recipients=pair.recipient)
    assert pyrage.decrypt(file.read_bytes(), [identity]) == cbor2.dumps(payload)


@row("rekey-for-nobody", "two-kinds", "wrong-key", "unparsable-recipient", "not-encrypted")
def test_rekey_that_cannot_be_done_leaves_everything(tmp_path: Path, key: bytes, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", key=key).path
    with refused("rekey-for-nobody", "no new key was given", tmp_path):
        vmsnap.rekey(root, key=key)
    with refused("two-kinds", "a key and recipients cannot be passed together", tmp_path):
        vmsnap.rekey(root, key=key, new_key=key, recipients=pair.recipient)
    with refused("wrong-key", "enc_metadata of .*vm1", tmp_path):
        vmsnap.rekey(root, key=key[::-1], recipients=pair.recipient)
    with refused("unparsable-recipient", "is not an age recipient", tmp_path):
        vmsnap.rekey(root, key=key, recipients="age1")
    write_some(tmp_path / "vm2")
    with refused("not-encrypted", "vm2 is not encrypted", tmp_path):
        vmsnap.rekey(tmp_path / "vm2", recipients=pair.recipient)


# What cannot be used --------------------------------------------------------------------------------------------------


@row("unparsable-recipient", "plugin-missing")
def test_what_is_no_recipient_is_refused_before_anything_is_made(tmp_path: Path, pair: Pair, plugin: None) -> None:
    cases: list[tuple[str, str]] = [
        ("", "is not an age recipient"),
        ("age1", "expected age1"),
        (pair.recipient[:-1] + ("p" if pair.recipient.endswith("q") else "q"), "expected age1"),
        ("ssh-ed25519 AAAA", "expected age1… or an SSH public key"),
        (pair.identity, r"the given recipient is an identity \(AGE-…\), which is secret; pass the recipient"),
    ]
    for recipient, message in cases:
        with refused("unparsable-recipient", f"cannot create the encrypted snapshot .*vm1: .*{message}", tmp_path):
            vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=[pair.recipient, recipient])
    missing = {
        "age1nosuchplugin10q5t30u5": "age-plugin-nosuchplugin is not on the PATH: install it",
        POST_QUANTUM_RECIPIENT: r"age-plugin-pq is not on the PATH \(post-quantum recipients, age1pq…, need",
    }
    for recipient, message in missing.items():
        with refused("plugin-missing", f"cannot create the encrypted snapshot .*vm1: .*{message}", tmp_path):
            vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=[pair.recipient, recipient])
    with refused(
        "unparsable-recipient", "the list of recipients is empty, so nobody could open the snapshot", tmp_path
    ):
        vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=[])
    ecdsa = ssh_key(tmp_path / "key", "ecdsa").with_suffix(".pub").read_text()
    with refused(
        "unparsable-recipient",
        "types ssh-ed25519 and ssh-rsa, not ecdsa-sha2",
        tmp_path,
    ):
        vmsnap.SnapshotWriter(tmp_path / "vm1", recipients=ecdsa)


@row("unparsable-identity", "identity-for-all")
def test_what_is_no_identity_is_refused(tmp_path: Path, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    cases: list[tuple[Any, str]] = [
        ("hunter2", "the text is not an identity"),
        ("id.txt", "pass the path of a file as a Path"),
        (pair.recipient, "the text is not an identity"),
        ("AGE-SECRET-KEY-1HUNTER2", "line 1 is not an identity"),
        (f"{pair.identity}\nhunter2", "line 2 is not an identity"),
        (f"# me\n\n{pair.recipient}", "line 3 is a recipient, not an identity"),
        ("AGE-SECRET-KEY-PQ-1QQQQ", "line 1 is a post-quantum identity"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2", "not an SSH key that age can read"),
        (ssh_key(tmp_path / "key", "ecdsa"), "SSH key"),
        ([], "the list of identities is empty"),
        ("# nothing", "it contains no identity"),
    ]
    for identity, message in cases:
        with refused("unparsable-identity", message, tmp_path) as _:
            vmsnap.SnapshotReader(root, identities=identity)
    (tmp_path / "key").chmod(0o640)
    with refused("identity-for-all", "other users may read or change it", tmp_path):
        vmsnap.SnapshotReader(root, identities=tmp_path / "key")


def test_no_secret_is_in_an_error_or_a_repr(tmp_path: Path, pair: Pair, key: bytes) -> None:
    secret = pair.identity[16:40]
    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    shown = [
        repr(vmsnap.IdentityFile("id.txt", "hunter2")),
        repr(vmsnap.SnapshotReader(root, identities=pair.identity)),
    ]
    attempts: list[dict[str, Any]] = [
        {"identities": f"{pair.identity}\n{pair.identity}x"},
        {"identities": pair.identity[:-1]},
        {"identities": pair.identity, "passphrase": "hunter2"},
        {"identities": pair.identity.lower()},
        {"passphrase": "hunter2"},
        {"key": key},
    ]
    for attempt in attempts:
        with pytest.raises(vmsnap.VmsnapError) as caught:
            vmsnap.SnapshotReader(root, **attempt)
        shown.append(f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}")
    for text in shown:
        assert secret not in text.upper()
        assert "hunter2" not in text
        assert key.hex() not in text


@row("plugin-failed")
def test_a_plugin_that_fails_is_told_with_what_it_said(
    tmp_path: Path, plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_some(tmp_path / "vm1", recipients=PLUGIN_RECIPIENT).path
    for behaviour, message in (("refuse", r"the \[31mcard\[0m is not in the reader"), ("garbage", "the plugin failed")):
        monkeypatch.setenv("AGE_PLUGIN_VMSNAPTEST", behaviour)
        with refused("plugin-failed", message, tmp_path):
            vmsnap.SnapshotWriter(tmp_path / "vm2", recipients=PLUGIN_RECIPIENT)
        with refused("plugin-failed", message, tmp_path):
            vmsnap.SnapshotReader(root, identities=PLUGIN_IDENTITY)


def test_a_plugin_that_hangs_can_be_interrupted(tmp_path: Path) -> None:
    script = """
import os, signal, sys, threading, time
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
began = time.monotonic()
try:
    vmsnap.SnapshotWriter(sys.argv[1], recipients=sys.argv[2])
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - began < 5, flush=True)
    os._exit(0)  # the plugin is still there
"""
    environment = {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "AGE_PLUGIN_VMSNAPTEST": "hang"}
    printed = run_python_well("import vmsnap\n" + script, tmp_path / "vm1", PLUGIN_RECIPIENT, **environment)
    assert printed == "interrupted True\n"
    assert not (tmp_path / "vm1").exists()
    subprocess.run(["pkill", "-f", "age-plugin-vmsnaptest"])


@row("empty-passphrase")
@pytest.mark.parametrize("given", ["", b"", bytearray(), lambda: ""])
def test_an_empty_passphrase_is_refused(tmp_path: Path, given: Any) -> None:
    with refused("empty-passphrase", "a passphrase cannot be empty", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", passphrase=given)


@pytest.mark.parametrize("given", ["hunter2\ud800", b"hunter2\xff", lambda: b"hunter2\xff"])
def test_a_passphrase_that_is_not_utf_8_is_refused_and_not_shown(tmp_path: Path, given: Any) -> None:
    with pytest.raises(vmsnap.InvalidArgumentError, match=r"a passphrase must be UTF-8$") as caught:
        vmsnap.SnapshotWriter(tmp_path / "vm1", passphrase=given)
    assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r} {vars(caught.value)}"
    assert not (tmp_path / "vm1").exists()


@pytest.mark.parametrize("given", [5, ["a"], lambda: None])
def test_what_is_no_passphrase_is_a_type_error(tmp_path: Path, given: Any) -> None:
    with pytest.raises(TypeError, match="a passphrase must be str, bytes or bytearray, not"):
        vmsnap.SnapshotWriter(tmp_path / "vm1", passphrase=given)
    assert not (tmp_path / "vm1").exists()


@row("two-kinds")
def test_two_kinds_of_keys_are_refused(tmp_path: Path, key: bytes, pair: Pair) -> None:
    with refused(
        "two-kinds", "a key and recipients cannot be passed together: a snapshot has one kind of key", tmp_path
    ):
        vmsnap.SnapshotWriter(tmp_path / "vm1", key=key, recipients=pair.recipient)
    root = write_some(tmp_path / "vm1", key=key).path
    with refused("two-kinds", "a key and a passphrase cannot be passed together", tmp_path):
        vmsnap.SnapshotReader(root, key=key, passphrase="x")


@row("other-wrapping")
def test_a_key_of_another_kind_is_told_what_to_pass(tmp_path: Path, key: bytes, pair: Pair) -> None:
    with key_service(tmp_path) as socket:
        kinds: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
            "raw": ({"key": key}, {"key": key}, "with a 32-byte key.*: pass the key that it was written with"),
            "age": (
                {"recipients": pair.recipient},
                {"identities": pair.identity},
                "to age recipients.*: pass identities",
            ),
            "passphrase": ({"passphrase": "x"}, {"passphrase": "x"}, "with a passphrase.*: pass the passphrase"),
            "provider": (
                {"key_provider": SocketProvider(socket)},
                {"key_provider": SocketProvider(socket)},
                'by the key service "socket-service".*: pass a key provider of that name',
            ),
        }
        for name, (written, _, _) in kinds.items():
            write_some(tmp_path / name, **written)
        for name, (_, _, message) in kinds.items():
            for other, (_, opens, _) in kinds.items():
                if name != other:
                    with refused("other-wrapping", f"enc_metadata of .*{name}: .*{message}", tmp_path / name):
                        vmsnap.SnapshotReader(tmp_path / name, **opens)


@row("wrong-identity", "wrong-passphrase")
def test_a_wrong_identity_or_passphrase_is_not_told_from_damage(tmp_path: Path, pair: Pair) -> None:
    root = write_some(tmp_path / "age", recipients=pair.recipient).path
    with refused(
        "wrong-identity", "none of the identities opens it: it is encrypted to other recipients, or it is damaged", root
    ):
        vmsnap.SnapshotReader(root, identities=[Pair.new().identity, Pair.new().identity])
    root = write_some(tmp_path / "passphrase", passphrase="right").path
    with refused("wrong-passphrase", "the passphrase or identity is wrong, or the file is damaged", root):
        vmsnap.SnapshotReader(root, passphrase="wrong")


@row("key-metadata-damaged")
def test_damaged_key_metadata_is_refused_wherever_the_damage_is(tmp_path: Path, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    file = root / "enc_metadata"
    whole = file.read_bytes()
    for position in range(0, len(whole), 3):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(
                (vmsnap.AuthenticationError, vmsnap.CorruptSnapshotError, vmsnap.UnsupportedFormatError)
            ) as caught:
                vmsnap.SnapshotReader(root, identities=pair.identity)
            assert f"enc_metadata of {root}: " in str(caught.value)
    file.write_bytes(whole + b"x")
    with refused("key-metadata-damaged", "damaged", root):
        vmsnap.SnapshotReader(root, identities=pair.identity)
    file.write_bytes(whole)
    check_opens(root, identities=pair.identity)


@row("wrong-data-key")
def test_key_metadata_of_another_snapshot_opens_no_fragment(tmp_path: Path, pair: Pair) -> None:
    roots = [write_some(tmp_path / name, recipients=pair.recipient).path for name in ("one", "two")]
    shutil.copy(roots[0] / "enc_metadata", roots[1] / "enc_metadata")
    reader = vmsnap.SnapshotReader(roots[1], identities=pair.identity)
    with refused("wrong-data-key", "sda", roots[1]):
        read(reader.namespace("disks"), "sda")


@row("work-factor")
def test_a_work_factor_that_takes_minutes_is_refused_at_once(tmp_path: Path) -> None:
    root = write_some(tmp_path / "vm1", passphrase="x").path
    file = root / "enc_metadata"
    content = file.read_bytes()
    assert b" 18\n" in content  # as age's own
    file.write_bytes(content.replace(b" 18\n", b" 30\n"))
    began = time.monotonic()
    with refused("work-factor", r"its scrypt work factor is 2\^30, which could take hours; the limit is 2\^22", root):
        vmsnap.SnapshotReader(root, passphrase="x")
    assert time.monotonic() - began < 5


@row("newer-format")
def test_a_later_version_of_age_or_of_a_wrapped_key_is_told(tmp_path: Path, pair: Pair) -> None:
    root = write_some(tmp_path / "vm1", recipients=pair.recipient).path
    file = root / "enc_metadata"
    file.write_bytes(file.read_bytes().replace(b"org/v1", b"org/v2"))
    with refused("newer-format", "an unknown version of age", root):
        vmsnap.SnapshotReader(root, identities=pair.identity)
    envelope = {"format": "vmsnap-wrapped-key", "version": 2, "provider": "x", "wrapped": b"x"}
    file.write_bytes(b"\xd9\xd9\xf7" + cbor2.dumps(envelope))
    with refused("newer-format", "wrapped in version 2", root):
        vmsnap.SnapshotReader(root, key_provider=Xor())


class Xor:
    """Answers as it is told to; by default it works, and protects nothing."""

    name = "xor"
    timeout_seconds = 10.0

    def __init__(self, wrapped: Any = None, unwrapped: Any = None) -> None:
        self.answers = (wrapped, unwrapped)

    def wrap(self, payload: bytes) -> Any:
        return self._answer(payload, self.answers[0])

    def unwrap(self, wrapped: bytes) -> Any:
        return self._answer(wrapped, self.answers[1])

    @staticmethod
    def _answer(content: bytes, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return bytes(one ^ 1 for one in content) if answer is None else answer(content) if callable(answer) else answer


@row("provider-failed")
def test_a_provider_that_fails_is_told_with_the_cause(tmp_path: Path) -> None:
    error = RuntimeError("the tunnel is down")
    message = 'the key service "xor" failed: RuntimeError: the tunnel is down; check that it is reachable'
    with refused("provider-failed", message, tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", key_provider=Xor(error))
    root = write_some(tmp_path / "vm1", key_provider=Xor()).path
    with refused("provider-failed", message, tmp_path):
        vmsnap.SnapshotReader(root, key_provider=Xor(None, error))
    with pytest.raises(vmsnap.KeyUnavailableError) as caught:
        vmsnap.SnapshotReader(root, key_provider=Xor(None, error))
    assert caught.value.__cause__ is error
    with pytest.raises(SystemExit):
        vmsnap.SnapshotReader(root, key_provider=Xor(None, SystemExit(3)))


@row("provider-failed")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (5, "TypeError: wrap returned int instead of bytes"),
        (None, "wrap returned"),
        ("text", "wrap returned str instead of bytes"),
        (b"", "returned an empty wrapped key"),
        (bytes(100_000), "returned a wrapped key of 100000 bytes; the limit is 65536"),
        (lambda payload: b"wrapped:" + payload, "returned the key unwrapped"),
    ],
)
def test_a_provider_that_wraps_rubbish_is_refused(tmp_path: Path, answer: Any, message: str) -> None:
    with refused("provider-failed", message, tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1", key_provider=Xor((lambda _: None) if answer is None else answer))


@row("provider-rubbish")
@pytest.mark.parametrize("answer", [b"", b"rubbish", cbor2.dumps({"format": "vmsnap-key"}), bytes(1 << 20)])
def test_a_provider_that_unwraps_rubbish_is_refused(tmp_path: Path, answer: bytes) -> None:
    root = write_some(tmp_path / "vm1", key_provider=Xor()).path
    with refused("provider-rubbish", 'the key service "xor" returned bytes that are not a vmsnap key', tmp_path):
        vmsnap.SnapshotReader(root, key_provider=Xor(None, lambda _: answer))


@row("other-provider")
def test_another_provider_than_the_one_it_was_written_with_is_refused(tmp_path: Path) -> None:
    root = write_some(tmp_path / "vm1", key_provider=Xor()).path
    other = Xor()
    other.name = "vault"
    with refused("other-provider", 'wrapped by the key service "xor", but "vault" was passed', tmp_path):
        vmsnap.SnapshotReader(root, key_provider=other)


@row("provider-name")
def test_what_is_no_provider_is_a_type_error(tmp_path: Path) -> None:
    for name in ("wrap", "unwrap", "name"):
        attributes = {key: value for key, value in {"wrap": len, "unwrap": len, "name": "x"}.items() if key != name}
        with pytest.raises(TypeError, match=f"it does not have a method {name}|its attribute {name} must"):
            vmsnap.SnapshotWriter(tmp_path / "vm1", key_provider=type("Provider", (), attributes)())
    for bad in ("", "a\nb", "x" * 256):
        provider = Xor()
        provider.name = bad
        with refused("provider-name", "the name of a key service must have 1 to 255 bytes", tmp_path):
            vmsnap.SnapshotWriter(tmp_path / "vm1", key_provider=provider)


@row("provider-failed")
@pytest.mark.parametrize(("behaviour", "message"), [("slow", "did not answer within 0.5 s"), ("rude", "failed: ")])
def test_a_service_that_is_slow_or_hangs_up_is_told(tmp_path: Path, behaviour: str, message: str) -> None:
    with key_service(tmp_path) as good, key_service(tmp_path, behaviour) as bad:
        root = write_some(tmp_path / "vm1", key_provider=SocketProvider(good)).path
        began = time.monotonic()
        with refused("provider-failed", message, tmp_path):
            vmsnap.SnapshotReader(root, key_provider=SocketProvider(bad, timeout_seconds=0.5))
        with refused("provider-failed", message, tmp_path):
            vmsnap.SnapshotWriter(tmp_path / "vm2", key_provider=SocketProvider(bad, timeout_seconds=0.5))
        assert time.monotonic() - began < 20
        check_opens(root, key_provider=SocketProvider(good))


@row("provider-rubbish", "provider-failed")
def test_a_service_that_answers_with_something_else_is_told(tmp_path: Path) -> None:
    with key_service(tmp_path) as good, key_service(tmp_path, "wrong") as bad:
        root = write_some(tmp_path / "vm1", key_provider=SocketProvider(good)).path
        with refused("provider-rubbish", "that are not a vmsnap key", tmp_path):
            vmsnap.SnapshotReader(root, key_provider=SocketProvider(bad))
    with refused("provider-failed", "failed: (ConnectionRefused|FileNotFound)Error", tmp_path):
        vmsnap.SnapshotReader(root, key_provider=SocketProvider(good))
    (tmp_path / "other").mkdir()
    message = "PermissionError: the service said 'no such key'"
    with key_service(tmp_path / "other") as other, refused("provider-failed", message, root):
        vmsnap.SnapshotReader(root, key_provider=SocketProvider(other))


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    file = tmp_path / "ram.img"
    file.write_bytes(pattern(300_000))
    return file


def told(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode() + done.stderr.decode()


def test_the_default_identity_from_an_empty_home_twice(tmp_path: Path, ram: Path, home: Path) -> None:
    assert "creating the identity" in told(run("dump", ram, tmp_path / "vm1", "--encrypt"))
    assert "identity" not in told(run("dump", ram, tmp_path / "vm2", "--encrypt"))
    for name in ("vm1", "vm2"):
        assert vmsnap.open(tmp_path / name).memory().read(0, 300_000) == ram.read_bytes()
        assert "key wrapped by\tage (X25519)" in told(run("info", tmp_path / name))


def test_keygen_makes_a_file_or_prints_one(tmp_path: Path) -> None:
    printed = run("keygen")
    identity = printed.stdout.decode().splitlines()[-1]
    [recipient] = vmsnap.recipients_of(identity)
    assert printed.stderr.decode() == f"Public key: {recipient}\n"
    file = tmp_path / "id.txt"
    done = run("keygen", "-o", file)
    assert (done.stdout, mode(file)) == (b"", 0o600)
    [recipient] = vmsnap.recipients_of(file)
    assert f"# public key: {recipient}\n" in file.read_text()
    assert run("keygen", "--recipient", file).stdout.decode() == f"{recipient}\n"
    before = tree(tmp_path)
    assert "File exists" in error_of(run("keygen", "-o", file, status=1))
    assert tree(tmp_path) == before


def test_snapshots_are_dumped_for_others_rekeyed_and_converted(tmp_path: Path, ram: Path, pair: Pair) -> None:
    identity = pair.file(tmp_path / "id.txt")
    recipients = tmp_path / "team.txt"
    recipients.write_text(f"# the team\n\n{pair.recipient}\n{Pair.new().recipient}\n")
    passphrase = write_private(tmp_path / "pass", b"hunter2\nsecond line\n")
    vm = [tmp_path / f"vm{number}" for number in range(6)]

    run("put", ram, vm[0], "ram", "--create", "-R", recipients)
    assert "age (X25519, X25519)" in told(run("info", vm[0], "-i", identity))
    run("rekey", vm[0], "-i", identity, "--new-passphrase-file", passphrase)
    assert "age, with a passphrase" in told(run("info", vm[0]))
    assert run("cat", vm[0], "ram", "--passphrase-file", passphrase).stdout == ram.read_bytes()
    assert "there is no terminal to ask on" in error_of(run_without_terminal("ls", vm[0]))
    run("decrypt", vm[0], vm[1], "--passphrase-file", passphrase)
    assert (vm[1] / "ram").read_bytes() == ram.read_bytes()
    assert told(run("verify", vm[1]))
    (vm[1] / "vmsnap_manifest").unlink()
    write(vmsnap.SnapshotWriter.open(vm[1]).add_namespace("a").add_namespace("b"), "small", b"x" * 100)
    run("encrypt", vm[1], vm[2], "-r", pair.recipient)
    listed = run("ls", "-l", vm[2], "-i", identity).stdout.decode().splitlines()
    assert [line.split("\t")[:2] + line.split("\t")[3:4] for line in listed] == [
        ["ram", "300000", "65536"],
        ["a/b/small", "100", "4096"],
    ]
    write(odd := vmsnap.SnapshotWriter(vm[5], recipients=pair.recipient), "odd", b"y" * 1000, 77)
    write(odd, "ram", ram.read_bytes())
    key_file = write_private(tmp_path / "vm.key", vmsnap.generate_key())
    run("encrypt", vm[5], vm[3], "-i", identity, "--new-key-file", key_file)
    assert "odd\t1000\t" in (listing := run("ls", "-l", vm[3], "--key-file", key_file).stdout.decode())
    assert "\t77\t" in listing
    # The copy has a data key of its own.
    shutil.copy(vm[2] / "enc_metadata", vm[3] / "enc_metadata")
    run("cat", vm[3], "ram", "-i", identity, status=3)
    for arguments, status in (
        (["encrypt", vm[1], vm[2], "-r", pair.recipient], 1),
        (["encrypt", vm[1], vm[4], "-r", "age1x"], 1),
        (["encrypt", tmp_path / "absent", vm[4], "-r", pair.recipient], 1),
        (["decrypt", vm[2], vm[4], "--key-file", key_file], 3),
        (["decrypt", vm[3], vm[4], "-i", identity], 3),
        (["rekey", vm[2], "-i", identity], 2),
        (["rekey", vm[1], "-r", pair.recipient], 3),
        (["ls", vm[2], "-i", identity, "--key-file", key_file], 2),
        (["dump", ram, vm[4], "-r", pair.recipient, "--passphrase-file", passphrase], 2),
    ):
        run(*arguments, status=status)
        assert not vm[4].exists()


def run_without_terminal(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vmsnap", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, start_new_session=True)
    assert done.returncode == 1
    return done


def test_a_passphrase_comes_from_a_descriptor_or_the_terminal_without_echo(tmp_path: Path, ram: Path) -> None:
    root = tmp_path / "vm1"
    printed = answer(["put", ram, root, "ram", "--create", "--passphrase"], ["hunter2", "hunter2"])
    assert printed.count("New passphrase:") == 1
    assert "hunter2" not in printed
    assert "hunter2" not in (printed := answer(["cat", root, "ram", "--size", "10"], ["hunter2"]))
    assert printed.startswith(f"Passphrase of {root}: ")
    assert "differ" in answer(["dump", ram, tmp_path / "vm2", "--passphrase"], ["one", "two"])
    assert not (tmp_path / "vm2").exists()
    with open(write_private(tmp_path / "pass", b"hunter2")) as file:
        command = [sys.executable, "-m", "vmsnap", "ls", root, "--passphrase-fd", str(file.fileno())]
        assert subprocess.run(command, pass_fds=[file.fileno()], capture_output=True, check=True).stdout
    for content in (b"", b"\nx", b"x" * 5000):
        path = write_private(tmp_path / "pass", content)
        refused_file = run("ls", root, "--passphrase-file", path, status=1)
        assert "must be a passphrase of 1 to 4096 bytes" in error_of(refused_file)


def answer(arguments: list[Any], answers: list[str]) -> str:
    """Run `vmsnap` on a terminal of its own, and type the answers; returns what it printed."""
    import pty

    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-m", "vmsnap", *map(str, arguments)])
    printed = b""
    try:
        for line in chunks(terminal):
            printed += line
            # Each prompt ends so; what is typed before it is thrown away.
            if answers and printed.endswith(b": "):
                os.write(terminal, answers.pop(0).encode() + b"\n")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return printed.decode(errors="replace")


def chunks(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side was closed
            return
        if not piece:
            return
        yield piece
