"""Complete or absent: creating, committing, sealing, verifying, cleaning."""

import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import floe
import pytest
import vmsnap
from click.testing import CliRunner
from commands import error_of
from commands import run as run_command
from independent import vmsnap_reader, vmsnap_snapshot
from refusals import refused, row
from vmsnap.cli.group import group

KEY = bytes(range(32))
BOTH = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])


def fill(writer: vmsnap.SnapshotWriter) -> None:
    writer.write_fragment("clock", {"now": 12})
    ram = writer.add_namespace("ram")
    with ram.raw_fragment("one", chunk_size_bytes=64) as fragment:
        fragment.write(bytes(200))
    with ram.raw_fragment("two", chunk_size_bytes=64) as fragment:
        fragment.write(bytes(range(200)))


def create(path: Path, key: bytes | None) -> bytes:
    staged = vmsnap.create(path, key=key, durable=False)
    with staged as snap:
        fill(snap)
    assert staged.seal_digest is not None
    return staged.seal_digest


def kinds(path: Path, key: bytes | None, **options: Any) -> list[tuple[str, str]]:
    report = vmsnap.verify(path, key=key, **options)
    assert not report.ok
    return [(problem.path, problem.kind) for problem in report.problems]


@BOTH
def test_nothing_is_there_until_the_end_and_then_all_of_it(tmp_path: Path, key: bytes | None) -> None:
    path = tmp_path / "vm1"
    staged = vmsnap.create(path, key=key)
    with staged as snap:
        fill(snap)
        assert not path.exists()
        assert staged.seal_digest is None
    reader = vmsnap.open(path, require_sealed=True, expect_seal_digest=staged.seal_digest, key=key)
    assert (reader.snapshot_id, reader.seal_digest) == (staged.snapshot_id, staged.seal_digest)
    assert reader.read_fragment("clock") == {"now": 12}
    assert os.listdir(tmp_path) == ["vm1"]
    report = vmsnap.verify(path, key=key)
    assert report.ok, report
    assert report.fragments == {"clock": "ok", "ram/one": "ok", "ram/two": "ok"}
    assert report.seal_digest == staged.seal_digest
    assert pickle.loads(pickle.dumps(reader)).namespace("ram").list_fragments() == ["one", "two"]


@BOTH
def test_an_exception_leaves_nothing(tmp_path: Path, key: bytes | None) -> None:
    with contextlib.suppress(RuntimeError), vmsnap.create(tmp_path / "vm1", key=key) as snap:
        fill(snap)
        raise RuntimeError("in the middle")
    assert os.listdir(tmp_path) == []


def test_a_commit_that_fails_at_the_end_of_the_block_leaves_nothing(tmp_path: Path) -> None:
    def forget(path: Path) -> None:
        with vmsnap.create(path) as snap:
            snap.raw_fragment("half").write(b"half")

    with pytest.raises(vmsnap.StateError, match="never finished"):
        forget(tmp_path / "vm1")
    assert os.listdir(tmp_path) == []


def test_it_stays_in_its_process(tmp_path: Path) -> None:
    staged = vmsnap.create(tmp_path / "vm1")
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot leave the process"):
            attempt(staged)
    child = os.fork()
    if child == 0:
        try:
            staged.commit()
        except vmsnap.StateError:
            del staged
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    fill(staged.writer)
    staged.commit()
    staged.discard()
    assert vmsnap.verify(tmp_path / "vm1").ok


def _write(writer: vmsnap.SnapshotWriter, number: int) -> None:
    with writer.raw_fragment(f"worker{number}") as fragment:
        fragment.write(bytes([number]) * 300_000)


@BOTH
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_write_one_snapshot(tmp_path: Path, key: bytes | None, method: str) -> None:
    with vmsnap.create(tmp_path / "vm1", key=key) as snap:
        with multiprocessing.get_context(method).Pool(2) as pool:
            pool.starmap(_write, [(snap, number) for number in range(4)])
        _write(snap, 4)
    report = vmsnap.verify(tmp_path / "vm1", key=key)
    assert report.ok
    assert list(report.fragments) == [f"worker{number}" for number in range(5)], report


_HALF = """
import pickle, sys
writer = pickle.loads(sys.stdin.buffer.read())
fragment = writer.raw_fragment("half", chunk_size_bytes=4096)
fragment.write(bytes(1 << 20))
print("open", flush=True)
__import__("signal").pause()
"""


@BOTH
def test_commit_waits_for_nobody_and_knows_who_was_killed(tmp_path: Path, key: bytes | None) -> None:
    staged = vmsnap.create(tmp_path / "vm1", key=key)
    child = subprocess.Popen([sys.executable, "-c", _HALF], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(pickle.dumps(staged.writer))
    child.stdin.close()
    assert child.stdout.readline() == b"open\n"
    with pytest.raises(vmsnap.StateError, match="still being written"):
        staged.commit()
    child.kill()
    child.wait()
    child.stdout.close()
    with pytest.raises(vmsnap.StateError, match="never finished"):
        staged.commit()
    staged.discard()
    assert os.listdir(tmp_path) == []


def _damage(name: str) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        (path / "ram/one").rename(path / "x")
        (path / "ram/two").rename(path / "ram/one")
        (path / "x").rename(path / "ram/two")

    def link(path: Path) -> None:
        (path / "clock").rename(path.parent / "elsewhere")
        (path / "clock").symlink_to(path.parent / "elsewhere")

    def fifo(path: Path) -> None:
        (path / "clock").unlink()
        os.mkfifo(path / "clock")

    def append(path: Path) -> None:
        with open(path / "clock", "ab") as file:
            file.write(b"x")

    def giant(path: Path) -> None:
        os.truncate(path / "clock", 1 << 42)

    actions: dict[str, Callable[[Path], None]] = {
        "delete": lambda path: (path / "clock").unlink(),
        "add": lambda path: (path / "more").write_bytes(b""),
        "add a folder": lambda path: (path / "more").mkdir(),
        "rename": lambda path: (path / "clock").rename(path / "ram/clock") and None,
        "delete a folder": lambda path: shutil.rmtree(path / "ram"),
        "truncate": lambda path: os.truncate(path / "ram/one", 150),
        "append": append,
        "giant": giant,
        "swap": swap,
        "link": link,
        "fifo": fifo,
        "not UTF-8": lambda path: open(os.fsencode(path) + b"/\xff", "wb").close(),
        "reserved": lambda path: (path / ".vmsnap-0123456789abcdef").write_bytes(b""),
        "no manifest": lambda path: (path / "vmsnap_manifest").unlink(),
        "bad manifest": lambda path: (path / "vmsnap_manifest").write_bytes(b"\xa0"),
    }
    return actions[name]


@BOTH
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("delete", [("clock", "missing")]),
        ("add", [("more", "extra")]),
        ("add a folder", [("more", "extra")]),
        ("rename", [("clock", "missing"), ("ram/clock", "extra")]),
        ("delete a folder", [("ram", "missing"), ("ram/one", "missing"), ("ram/two", "missing")]),
        ("truncate", [("ram/one", "truncated")]),
        ("append", [("clock", "wrong size")]),
        ("giant", [("clock", "wrong size")]),
        ("swap", [("ram/one", "swapped"), ("ram/two", "swapped")]),
        ("link", [("clock", "link")]),
        ("fifo", [("clock", "special file")]),
        ("not UTF-8", [("\ufffd", "not UTF-8")]),
        ("reserved", [(".vmsnap-0123456789abcdef", "extra")]),
    ],
)
def test_verify_names_what_is_wrong(
    tmp_path: Path, key: bytes | None, name: str, expected: list[tuple[str, str]]
) -> None:
    path = tmp_path / "vm1"
    create(path, key)
    _damage(name)(path)
    assert kinds(path, key) == expected


def test_verify_tells_everything_at_once(tmp_path: Path) -> None:
    path = tmp_path / "vm1"
    create(path, None)
    for name in ("delete", "swap", "add", "not UTF-8"):
        _damage(name)(path)
    found = kinds(path, None)
    assert found == [
        ("clock", "missing"),
        ("more", "extra"),
        ("ram/one", "swapped"),
        ("ram/two", "swapped"),
        ("\ufffd", "not UTF-8"),
    ]


def test_a_bad_or_missing_manifest(tmp_path: Path) -> None:
    for number, (name, key, kind) in enumerate(
        [
            ("no manifest", None, "not sealed"),
            ("no manifest", KEY, "missing"),
            ("bad manifest", None, "bad manifest"),
            ("bad manifest", KEY, "not authentic"),
        ]
    ):
        path = tmp_path / str(number)
        create(path, key)
        _damage(name)(path)
        assert kinds(path, key) == [("vmsnap_manifest", kind)]
        error = {"not sealed": vmsnap.NotSealedError, "not authentic": vmsnap.AuthenticationError}.get(
            kind, vmsnap.CorruptSnapshotError
        )
        with pytest.raises(error):
            vmsnap.open(path, key=key, require_sealed=True)


def test_without_the_key_it_says_what_it_could_not_check(tmp_path: Path) -> None:
    path = tmp_path / "vm1"
    create(path, KEY)
    report = vmsnap.verify(path)
    assert not report.ok
    assert not report.problems
    assert "without the key" in report.not_checked[0]
    (path / "clock").write_bytes(b"plain")
    (path / "link").symlink_to("clock")
    assert kinds(path, None) == [("clock", "truncated"), ("link", "link")]
    assert ("enc_metadata", "not authentic") in kinds(path, bytes(32))


@BOTH
def test_every_changed_byte_and_every_truncation_is_found(tmp_path: Path, key: bytes | None) -> None:
    path = tmp_path / "vm1"
    create(path, key)
    files = [file for file in path.rglob("*") if file.is_file()]
    tried = 0
    for file in files:
        whole = file.read_bytes()
        # A plain manifest may be made to say another time or generator; a pinned digest tells.
        digest = vmsnap.open(path, key=key).seal_digest
        for offset in range(len(whole)):
            for content in (
                whole[:offset] + bytes([whole[offset] ^ 1 << offset % 8]) + whole[offset + 1 :],
                whole[:offset],
            ):
                file.write_bytes(content)
                report = vmsnap.verify(path, key=key, expect_seal_digest=digest)
                assert not report.ok, (file, offset, len(content))
                assert {problem.path for problem in report.problems} & {
                    file.relative_to(path).as_posix(),
                    "vmsnap_manifest",
                }
                tried += 1
        file.write_bytes(whole)
    assert tried > 1000
    assert vmsnap.verify(path, key=key).ok


@BOTH
def test_a_part_of_another_snapshot_is_found(tmp_path: Path, key: bytes | None) -> None:
    create(tmp_path / "vm1", key)
    staged = vmsnap.create(tmp_path / "vm2", key=key)
    with staged as snap:
        fill(snap)
        snap.write_fragment("more", 1)
    for name in ("vmsnap_manifest", "clock", "enc_metadata"):
        if name == "enc_metadata" and key is None:
            continue
        if name == "clock" and key is None:
            continue  # the same bytes
        path = tmp_path / "mixed"
        shutil.copytree(tmp_path / "vm1", path)
        shutil.copy(tmp_path / "vm2" / name, path / name)
        assert not vmsnap.verify(path, key=key).ok, name
        shutil.rmtree(path)
    with pytest.raises(vmsnap.AuthenticationError, match="not the expected one"):
        vmsnap.open(tmp_path / "vm1", key=key, expect_seal_digest=staged.seal_digest)
    assert staged.seal_digest is not None
    vmsnap.open(tmp_path / "vm2", key=key, expect_seal_digest=staged.seal_digest.hex())


def test_an_older_fragment_of_the_same_name_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "vm1"
    writer = vmsnap.SnapshotWriter(path, key=KEY)
    writer.write_fragment("clock", 1)
    shutil.copy(path / "clock", tmp_path / "old")
    (path / "clock").unlink()
    writer.write_fragment("clock", 2)
    vmsnap.seal(path, key=KEY)
    shutil.copy(tmp_path / "old", path / "clock")
    assert kinds(path, KEY) == [("clock", "changed")]
    with pytest.raises(vmsnap.CorruptSnapshotError, match="changed or swapped"):
        vmsnap.open(path, key=KEY).read_fragment("clock")


def test_cleaning_leaves_what_a_living_process_holds(tmp_path: Path) -> None:
    code = "import signal, sys, vmsnap\nstaged = vmsnap.create(sys.argv[1])\nprint('ready', flush=True)\nsignal.pause()"
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "vm1"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert [len(vmsnap.clean(tmp_path).held), len(os.listdir(tmp_path))] == [1, 1]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    cleaned = vmsnap.clean(tmp_path)
    assert (len(cleaned.removed), cleaned.held, os.listdir(tmp_path)) == (1, [], [])


def test_cleaning_at_the_same_time_disturbs_nobody(tmp_path: Path) -> None:
    ended = threading.Event()

    def clean() -> int:
        removed = 0
        while not ended.is_set():
            removed += len(vmsnap.clean(tmp_path).removed)
        return removed

    with ThreadPoolExecutor(3) as pool:
        cleaning = [pool.submit(clean) for _ in range(3)]
        try:
            for number in range(150):
                with vmsnap.create(tmp_path / f"vm{number}", durable=False) as snap:
                    snap.write_fragment("clock", 1)
        finally:
            ended.set()
        assert [each.result() for each in cleaning] == [0, 0, 0]


def test_key_metadata_that_is_a_folder_is_a_problem(tmp_path: Path) -> None:
    create(tmp_path / "vm1", None)
    (tmp_path / "vm1/enc_metadata").mkdir()
    report = vmsnap.verify(tmp_path / "vm1")
    assert ("enc_metadata", "unreadable") in [(each.path, each.kind) for each in report.problems]


def test_cleaning_goes_on_after_what_cannot_be_removed(tmp_path: Path) -> None:
    deep, other = tmp_path / ".vmsnap-0000000000000000", tmp_path / ".vmsnap-0000000000000001"
    os.makedirs(deep.joinpath(*["a"] * 100))
    other.mkdir()
    program = f"""
import os, resource, vmsnap
free = os.dup(0)
os.close(free)
# Enough for a directory that is empty, and one too few for a directory in it.
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, free + 3))
vmsnap.clean({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "OSError" in done.stderr
    assert deep.name in done.stderr
    assert os.listdir(tmp_path) == [deep.name]
    assert vmsnap.clean(tmp_path).removed == [deep]


def write_until(writer: vmsnap.SnapshotWriter, end: float) -> None:
    number = 0
    while time.monotonic() < end:
        number += 1
        with contextlib.suppress(vmsnap.VmsnapError, OSError):
            writer.write_fragment(f"{os.getpid()}-{number}", 1)


def test_giving_up_while_others_write_leaves_nothing(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    for number in range(10):
        with pytest.raises(KeyError), vmsnap.create(tmp_path / f"vm{number}", durable=False) as snap:  # noqa: PT012
            writing = [forked.Process(target=write_until, args=(snap, time.monotonic() + 0.1)) for _ in range(2)]
            for each in writing:
                each.start()
            time.sleep(0.05)
            raise KeyError("mine")
        for each in writing:
            each.join()
        assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_does_not_hide_the_cause(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as raised, vmsnap.create(tmp_path / "vm1") as snap:  # noqa: PT012
        os.rename(snap.path, tmp_path / "elsewhere")
        raise KeyError("mine")
    assert "cannot remove the staged directory" in raised.value.__notes__[0]


def test_a_name_that_cleaning_removes_is_no_name_of_a_snapshot(tmp_path: Path) -> None:
    with pytest.raises(vmsnap.InvalidArgumentError, match="clean"):
        vmsnap.create(tmp_path / ".vmsnap-0123456789abcdef")


def test_two_hundred_levels_and_a_hundred_thousand_fragments(tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm1", durable=False) as snap:
        for number in range(100_000):
            with snap.raw_fragment(f"f{number}"):
                pass
        for level in range(200):
            snap = snap.add_namespace(f"level{level}")
        snap.write_fragment("deep", 1)
    report = vmsnap.verify(tmp_path / "vm1")
    assert report.ok
    assert len(report.fragments) == 100_001
    shutil.rmtree(tmp_path / "vm1")  # pytest keeps folders


def test_verify_holds_little_in_memory(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    with writer.raw_fragment("mem") as fragment:
        fragment.write(b"x")
    os.truncate(tmp_path / "vm1" / "mem", 1 << 30)
    script = f"""
import re, vmsnap

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = most()
vmsnap.seal({writer.location!r}, durable=False)
assert vmsnap.verify({writer.location!r}).ok
print(most() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 32 << 10


@BOTH
def test_what_changes_while_it_is_read_is_an_error_or_as_it_was(tmp_path: Path, key: bytes | None) -> None:
    path = tmp_path / "vm1"
    content = b"1" * 300_000
    for place, byte in ((path, b"1"), (tmp_path / "other", b"2")):
        with vmsnap.create(place, key=key, durable=False) as snap, snap.raw_fragment("mem") as fragment:
            fragment.write(byte * len(content))
    reader = vmsnap.open(path, key=key)
    opened = reader.raw_fragment("mem")
    original = (path / "mem").read_bytes()
    other = (tmp_path / "other" / "mem").read_bytes()
    allowed = (vmsnap.CorruptSnapshotError, vmsnap.AuthenticationError, OSError)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            (path / "mem").write_bytes(other)
            os.truncate(path / "mem", 1000)
            (path / "mem").unlink()
            (path / "mem").mkdir()
            (path / "mem").rmdir()
            os.symlink(tmp_path / "other" / "mem", path / "mem")
            (path / "mem").unlink()
            (path / "mem").write_bytes(original)

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        problems = set()
        try:
            for _ in range(300):
                for get in (lambda: opened, lambda: reader.raw_fragment("mem")):
                    with contextlib.suppress(*allowed):
                        read = get().read_at(0, len(content))
                        # Plain content is checked by verify alone.
                        assert read == content if key else set(read) <= set(b"\x0012")
                problems |= {problem.kind for problem in vmsnap.verify(path, key=key).problems}
        finally:
            ended.set()
        changing.result()
    assert problems
    assert vmsnap.verify(path, key=key).ok
    os.rename(path, tmp_path / "gone")
    os.rename(tmp_path / "other", path)
    # Where each has a data key of its own, that one does not open the other's manifest.
    with pytest.raises(vmsnap.AuthenticationError if key else vmsnap.CorruptSnapshotError, match=r"manifest|replaced"):
        pickle.loads(pickle.dumps(reader)).list_fragments()


def test_a_giant_manifest_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "vm1"
    create(path, None)
    os.truncate(path / "vmsnap_manifest", 1 << 30)
    with pytest.raises(vmsnap.CorruptSnapshotError, match="the limit is"):
        vmsnap.open(path)


def test_the_digest_of_a_plain_fragment_is_that_of_b3sum(tmp_path: Path) -> None:
    """The known answer of BLAKE3's own vectors for no input, and the manifest that any CBOR reader reads."""
    import cbor2

    with vmsnap.create(tmp_path / "vm1") as snap, snap.raw_fragment("empty"):
        pass
    manifest = cbor2.loads((tmp_path / "vm1/vmsnap_manifest").read_bytes())
    assert manifest["fragments"] == {
        "empty": {
            "size": 0,
            "stored_size": 0,
            "blake3": bytes.fromhex("af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        }
    }
    assert list(manifest) == [
        "format",
        "version",
        "snapshot_id",
        "created",
        "generator",
        "encrypted",
        "requires",
        "namespaces",
        "fragments",
    ]


@BOTH
def test_the_independent_reader_holds_a_sealed_snapshot_against_its_manifest(tmp_path: Path, key: bytes | None) -> None:
    path = tmp_path / "vm1"
    create(path, key)
    reader = vmsnap_reader.open_snapshot(path, key)
    assert reader.sealed
    assert reader.fragments() == ["clock", "ram/one", "ram/two"]
    assert reader.read("ram/two") == bytes(range(200))
    (path / "more").write_bytes(b"")
    for name, damage in (("more", None), ("ram/one", "truncate"), ("ram/two", "swap")):
        if damage is not None:
            _damage(damage)(path)
        with pytest.raises(vmsnap_reader.FormatError):
            reader.read(name)
    if key is not None:
        (path / "vmsnap_manifest").unlink()
        with pytest.raises(vmsnap_reader.FormatError, match="not complete"):
            vmsnap_reader.open_snapshot(path, key)


@row(
    "still-being-written",
    "appeared",
    "not-staged-here",
    "other-seal",
    "seal-digest",
    "not-listed",
    "not-as-listed",
    "manifest-malformed",
    "manifest-damaged",
    "incomplete",
    "not-sealed",
)
@BOTH
def test_each_refusal_by_its_row(tmp_path: Path, key: bytes | None) -> None:
    path = tmp_path / "vm1"
    staged = vmsnap.create(path, key=key)
    fill(staged.writer)
    fragment = staged.writer.raw_fragment("open")
    with refused("still-being-written", "still being written", tmp_path):
        staged.commit()
    fragment.discard()
    path.mkdir()
    with refused("appeared", "vm1", tmp_path):
        staged.commit()
    staged.writer.write_fragment("later", 1)  # as if the attempt had not been made
    path.rmdir()
    staged.commit()
    with refused("not-staged-here", "it was committed", tmp_path):
        staged.commit()
    with refused("other-seal", "not the expected one", tmp_path):
        vmsnap.open(path, key=key, expect_seal_digest=bytes(32))
    for digest in (b"short", "0g", "00"):
        with refused("seal-digest", "seal digest", tmp_path):
            vmsnap.open(path, key=key, expect_seal_digest=digest)
    reader = vmsnap.open(path, key=key)
    (path / "more").write_bytes(b"")
    with refused("not-listed", 'has no fragment "more"', tmp_path):
        reader.raw_fragment("more")
    with refused("not-listed", "has no namespace", tmp_path):
        reader.namespace("rooms")
    _damage("append")(path)
    with refused("not-as-listed", "but the manifest says", tmp_path):
        reader.raw_fragment("clock")
    _damage("delete")(path)
    with refused("not-as-listed", "is missing", tmp_path):
        reader.raw_fragment("clock")
    _damage("bad manifest")(path)
    if key is None:
        with refused("manifest-malformed", "vmsnap_manifest of .*vm1", tmp_path):
            vmsnap.open(path)
    else:
        (path / "vmsnap_manifest").write_bytes(bytes(200))
        with refused("manifest-damaged", "vmsnap_manifest of .*vm1", tmp_path):
            vmsnap.open(path, key=key)
        _damage("no manifest")(path)
        with refused("incomplete", "not complete", tmp_path):
            vmsnap.open(path, key=key)
    vmsnap.SnapshotWriter(tmp_path / "in place", key=key)
    with refused("not-sealed", "not sealed", tmp_path):
        vmsnap.open(tmp_path / "in place", key=key, require_sealed=True)


@row("newer-format")
@pytest.mark.parametrize("name", ["version", "requires"])
def test_a_manifest_of_a_newer_version_is_refused(tmp_path: Path, name: str) -> None:
    import cbor2

    path = tmp_path / "vm1"
    create(path, None)
    fields = cbor2.loads((path / "vmsnap_manifest").read_bytes())
    fields[name] = {"version": 2, "requires": ["zstd"]}[name]
    (path / "vmsnap_manifest").write_bytes(cbor2.dumps(fields))
    with refused("newer-format", "install a newer one", path):
        vmsnap.open(path)


@row("never-finished")
def test_an_unfinished_fragment_by_its_row(tmp_path: Path) -> None:
    staged = vmsnap.create(tmp_path / "vm1")
    staged.writer.raw_fragment("half").write(b"half")
    with refused("never-finished", '"half" was never finished, so the snapshot is not complete', tmp_path):
        staged.commit()


def test_a_hand_made_encrypted_manifest_is_read(tmp_path: Path) -> None:
    """The format's page and vmsnap agree: a manifest that cbor2 and the tests' own FLOE wrote opens."""
    import cbor2

    path = tmp_path / "vm1"
    writer = vmsnap.SnapshotWriter(path, key=KEY)
    writer.write_fragment("clock", 12)
    payload = vmsnap_snapshot.unwrap_key_file((path / "enc_metadata").read_bytes(), KEY)
    stored = (path / "clock").read_bytes()
    entry = {"size": 1, "stored_size": len(stored), "chunk_size": 4096, "floe_header_tag": stored[42:74]}
    manifest = {
        "format": "vmsnap-manifest",
        "version": 1,
        "snapshot_id": payload["snapshot_id"],
        "created": "2026-11-24T08:00:00Z",
        "generator": "by hand",
        "encrypted": True,
        "requires": [],
        "namespaces": [],
        "fragments": {"clock": entry},
    }
    sealed = floe.seal(payload["data_key"], b"vmsnap/1/manifest", cbor2.dumps(manifest), 1 << 16)
    (path / "vmsnap_manifest").write_bytes(sealed)
    assert vmsnap.open(path, key=KEY, require_sealed=True).read_fragment("clock") == 12
    assert vmsnap.verify(path, key=KEY).ok


def test_the_command_line_verifies_seals_and_cleans(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(group, arguments)
        return result.exit_code, result.output

    path = tmp_path / "vm1"
    fill(vmsnap.SnapshotWriter(path))
    status, output = run("verify", str(path))
    assert status == 1
    assert "not sealed" in output
    status, digest = run("seal", str(path))
    assert status == 0
    assert len(digest.strip()) == 64
    assert "is already sealed" in error_of(run_command("seal", path, status=1))
    status, output = run("verify", str(path), "--expect-seal-digest", digest.strip())
    assert status == 0
    assert "ok: 3 fragments" in output
    assert digest.strip() in output
    assert run("verify", str(path), "--expect-seal-digest", "00" * 32)[0] == 1
    _damage("swap")(path)
    status, output = run("verify", str(path), "--json")
    assert status == 1
    assert json.loads(output)["fragments"]["ram/one"] == "swapped"
    left = tmp_path / ".vmsnap-0123456789abcdef"
    left.mkdir()
    assert "sealed\tyes\n" in run("info", str(tmp_path / "vm1"))[1]
    assert run("clean", str(tmp_path)) == (0, f"removed {left}\n")
    assert not left.exists()


@BOTH
def test_a_fragment_given_up_after_it_was_closed_is_not_missed(tmp_path: Path, key: bytes | None) -> None:
    with vmsnap.create(tmp_path / "vm1", key=key) as snap:
        with contextlib.suppress(RuntimeError), snap.raw_fragment("half") as fragment:
            fragment.close()
            raise RuntimeError
        snap.write_fragment("whole", 1)
    assert vmsnap.open(tmp_path / "vm1", key=key).list_fragments() == ["whole"]


@BOTH
def test_paths_of_thousands_of_bytes_are_sealed_and_read(tmp_path: Path, key: bytes | None) -> None:
    name = "n" * 255
    with vmsnap.create(tmp_path / "vm1", key=key, durable=False) as snap:
        for _ in range(40):
            snap = snap.add_namespace(name)
        snap.write_fragment("deep", 1)
    reader = vmsnap.open(tmp_path / "vm1", key=key, require_sealed=True)
    assert vmsnap.verify(tmp_path / "vm1", key=key).ok
    for _ in range(40):
        reader = reader.namespace(name)
    assert reader.read_fragment("deep") == 1
