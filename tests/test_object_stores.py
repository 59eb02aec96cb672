"""Snapshots in object stores: pushed, pulled, opened in place, written straight into; on real servers."""

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from commands import error_of, run
from fault_proxy import FaultProxy
from http_faults import Stall, Status
from object_stores import NO_OBSTORE, S3, Bucket
from remote import RAM, SDA, at, check, environment, files, fill, make, objects
from support import MIB, Place, pattern, read, run_python, write

obstore = pytest.importorskip("obstore", reason=NO_OBSTORE)

NOW = timedelta(0)


@pytest.fixture(params=["plain", "encrypted"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A sealed snapshot on a local disk."""
    return make(tmp_path / "source", vmsnap.generate_key() if request.param == "encrypted" else None)


@pytest.fixture
def small(tmp_path: Path, key: bytes) -> Place:
    """A small encrypted snapshot on a local disk."""
    return make(tmp_path / "small", key, with_memory=False)


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[FaultProxy]:
    """A proxy before a server of S3's protocol."""
    with FaultProxy(s3.endpoint, (S3.access_key, S3.secret_key)) as proxy:
        yield proxy


def put(bucket: Bucket, name: str, content: bytes) -> None:
    """Put an object with another client."""
    obstore.put(bucket.store(), name, content, use_multipart=False)


# Push, pull, open ----------------------------------------------------------------------------------------------------


def test_a_pushed_snapshot_is_opened_in_place(bucket: Bucket, source: Place, tmp_path: Path) -> None:
    location = at(bucket)
    pushed = vmsnap.push(source.location, location, key=source.key)
    assert (pushed.already_there, pushed.resumed_bytes) == (False, 0)
    reader = vmsnap.open(location, key=source.key)
    assert (reader.snapshot_id, reader.seal_digest) == (pushed.snapshot_id, pushed.seal_digest)
    assert reader.seal_digest == source.open().seal_digest
    assert (reader.location, reader.path) == (location.url, None)
    assert reader.encrypted == (source.key is not None)
    check(reader)

    found = vmsnap.inspect(location)
    assert (found.location, found.path, found.sealed, found.encrypted) == (location.url, None, True, reader.encrypted)
    local = {each.path: each.stored_size for each in vmsnap.inspect(source.location).fragments}
    assert {each.path: each.stored_size for each in found.fragments} == local
    assert pushed.sent_bytes == sum(local.values())
    assert vmsnap.verify(location, key=source.key).ok

    again = vmsnap.push(source.location, location, key=source.key)
    assert (again.already_there, again.sent_bytes, again.seal_digest) == (True, 0, pushed.seal_digest)
    seal = vmsnap.pull(location, tmp_path / "copy", key=source.key)
    assert (seal.snapshot_id, seal.seal_digest) == (pushed.snapshot_id, pushed.seal_digest)
    assert files(tmp_path / "copy") == files(source.location)
    assert (tmp_path / "copy/nothing in it").is_dir()


def test_the_objects_are_the_files(bucket: Bucket, source: Place) -> None:
    vmsnap.push(source.location, at(bucket), key=source.key)
    store = bucket.store("vm1")
    stored = {name: bytes(obstore.get(store, name).bytes()) for name in objects(bucket)}
    assert stored == files(source.location)


@pytest.mark.parametrize("bucket", ["s3", "azure"], indirect=True)
def test_a_large_fragment_is_sent_in_parts(bucket: Bucket, tmp_path: Path, key: bytes) -> None:
    content = pattern(20 * MIB, 3)
    with vmsnap.create(tmp_path / "source", key=key, durable=False) as writer:
        write(writer, "large", content, 65536)
    vmsnap.push(tmp_path / "source", at(bucket), key=key)
    with vmsnap.create(at(bucket, "vm2"), key=key) as writer:
        write(writer, "large", content, 65536)
    for path in ("vm1", "vm2"):
        assert read(vmsnap.open(at(bucket, path), key=key), "large") == content
    vmsnap.pull(at(bucket), tmp_path / "copy", key=key)
    assert files(tmp_path / "copy") == files(tmp_path / "source")


def test_an_archive_is_pushed_and_pulled(s3: Bucket, source: Place, tmp_path: Path) -> None:
    archive, copy = tmp_path / "vm1.vmsnap.tar", tmp_path / "copy.vmsnap.tar"
    vmsnap.pack(source.location, archive, key=source.key)
    vmsnap.push(archive, at(s3), key=source.key)
    vmsnap.pull(at(s3), copy, key=source.key)
    assert copy.read_bytes() == archive.read_bytes()
    vmsnap.pull(at(s3), tmp_path / "copy", key=source.key, archive=False)
    assert files(tmp_path / "copy") == files(source.location)


# The address of a server for Google's protocol is in the file of an account, and is not known to be a loopback address.
@pytest.mark.parametrize("bucket", ["s3", "azure"], indirect=True)
def test_the_environment_says_where_the_store_is(bucket: Bucket, small: Place) -> None:
    vmsnap.push(small.location, at(bucket), key=small.key)
    script = "import sys, vmsnap; print(vmsnap.open(sys.argv[1], key=bytes.fromhex(sys.argv[2])).list_fragments())"
    assert small.key
    done = run_python(script, f"{bucket.url}/vm1", small.key.hex(), **environment(bucket))
    assert done.stdout == "['clock', 'empty']\n", done.stderr


def test_progress_is_reported(s3: Bucket, source: Place, tmp_path: Path) -> None:
    total = sum(each.stored_size for each in vmsnap.inspect(source.location).fragments)
    for call in (
        lambda show: vmsnap.push(source.location, at(s3), key=source.key, progress=show),
        lambda show: vmsnap.pull(at(s3), tmp_path / "copy", key=source.key, progress=show),
    ):
        shown: list[tuple[int, int]] = []
        call(lambda done, of, shown=shown: shown.append((done, of)))
        assert shown == sorted(shown)
        assert all(0 <= done <= of and of in (0, total) for done, of in shown)
        assert shown[-1] == (total, total)


def test_an_exception_of_progress_ends_a_pull(s3: Bucket, source: Place, tmp_path: Path) -> None:
    vmsnap.push(source.location, at(s3), key=source.key)

    def fail(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    before = set(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        vmsnap.pull(at(s3), tmp_path / "copy", key=source.key, progress=fail)
    assert set(tmp_path.iterdir()) == before


# Written straight into a store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_snapshot_is_written_straight_into_a_store(bucket: Bucket, encrypted: bool, key: bytes) -> None:
    key_or_none = key if encrypted else None
    staged = vmsnap.create(at(bucket), key=key_or_none)
    with staged as writer:
        assert (staged.location, staged.path, writer.path) == (f"{bucket.url}/vm1", None, None)
        fill(writer)
        with pytest.raises(FileNotFoundError):
            vmsnap.open(at(bucket), key=key_or_none)
    reader = vmsnap.open(at(bucket), key=key_or_none, require_sealed=True, expect_seal_digest=staged.seal_digest)
    check(reader)
    assert vmsnap.verify(at(bucket), key=key_or_none).ok
    assert ".vmsnap-push" not in objects(bucket)
    with pytest.raises(FileExistsError):
        vmsnap.create(at(bucket), key=key_or_none)


def test_an_exception_leaves_nothing_in_the_store(s3: Bucket) -> None:
    def fail() -> None:
        with vmsnap.create(at(s3)) as writer:
            fill(writer)
            fragment = writer.raw_fragment("unfinished")
            fragment.write(pattern(20 * MIB))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert objects(s3) == set()


def test_a_writer_of_a_store_stays_in_its_process(s3: Bucket) -> None:
    with vmsnap.create(at(s3)) as writer:
        with pytest.raises(vmsnap.VmsnapError, match="process"):
            pickle.dumps(writer)
        writer.write_fragment("clock", 12)
    assert vmsnap.open(at(s3)).read_fragment("clock") == 12


def test_a_url_does_not_become_an_archive(s3: Bucket) -> None:
    with pytest.raises(vmsnap.InvalidArgumentError, match="cannot become an archive"):
        vmsnap.create(at(s3), archive=True)


# Keys, removal, cleaning ---------------------------------------------------------------------------------------------


def test_the_key_of_a_snapshot_is_changed(s3: Bucket, small: Place) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    other = vmsnap.generate_key()
    vmsnap.rekey(at(s3), key=small.key, new_key=other)
    check(vmsnap.open(at(s3), key=other), with_memory=False)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.open(at(s3), key=small.key)


def test_a_snapshot_is_removed_and_nothing_else(bucket: Bucket, small: Place) -> None:
    for path in ("vm1", "vm10", "vm1/inner"):
        vmsnap.push(small.location, at(bucket, path), key=small.key)
    with pytest.raises(vmsnap.InvalidArgumentError, match="another snapshot below it"):
        vmsnap.remove(at(bucket))
    vmsnap.remove(at(bucket, "vm1/inner"))
    vmsnap.remove(at(bucket))
    assert objects(bucket) == set()
    check(vmsnap.open(at(bucket, "vm10"), key=small.key), with_memory=False)
    with pytest.raises(FileNotFoundError, match="clean"):
        vmsnap.remove(at(bucket))


def test_something_else_is_not_removed(s3: Bucket) -> None:
    put(s3, "vm1/notes", b"mine")
    with pytest.raises(FileNotFoundError, match="it has no vmsnap_manifest"):
        vmsnap.remove(at(s3))
    assert vmsnap.clean(at(s3), older_than=NOW) == vmsnap.Cleaned([], [])
    assert objects(s3) == {"notes"}


def test_what_a_killed_writer_left_is_cleaned(s3: Bucket, small: Place) -> None:
    vmsnap.push(small.location, at(s3, "fleet/complete"), key=small.key)
    script = """
import os, sys, vmsnap
snapshot = vmsnap.create(sys.argv[1])
snapshot.writer.write_fragment("clock", 12)
print("written", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, f"{s3.url}/fleet/killed"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment(s3)
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == b"written\n"
        with pytest.raises(vmsnap.StateError, match=f"process {child.pid} on .* writes a snapshot there since"):
            vmsnap.push(small.location, at(s3, "fleet/killed"), key=small.key)
        kept = vmsnap.clean(at(s3, "fleet"))
        assert kept == vmsnap.Cleaned([], [f"{s3.url}/fleet/killed"])
        child.kill()
    with pytest.raises(FileNotFoundError):
        vmsnap.open(at(s3, "fleet/killed"))
    cleaned = vmsnap.clean(at(s3, "fleet"), older_than=NOW)
    assert cleaned == vmsnap.Cleaned([f"{s3.url}/fleet/killed"], [])
    assert objects(s3, "fleet/killed") == set()
    check(vmsnap.open(at(s3, "fleet/complete"), key=small.key), with_memory=False)
    with pytest.raises(vmsnap.InvalidArgumentError, match="older_than"):
        vmsnap.clean(at(s3), older_than=timedelta(days=-1))


def test_a_place_is_taken_over(s3: Bucket, small: Place) -> None:
    abandoned = vmsnap.create(at(s3))
    abandoned.writer.write_fragment("old", 1)
    with pytest.raises(vmsnap.StateError, match="take_over"):
        vmsnap.create(at(s3))
    with vmsnap.create(at(s3), take_over=True) as writer:
        fill(writer, with_memory=False)
    with pytest.raises(vmsnap.StateError, match="taken over"):
        abandoned.commit()
    check(vmsnap.open(at(s3)), with_memory=False)
    with pytest.raises(FileExistsError):
        vmsnap.push(small.location, at(s3), key=small.key, take_over=True)


# Processes -----------------------------------------------------------------------------------------------------------


def test_a_reader_is_pickled_with_its_options(s3: Bucket, small: Place) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    reader = vmsnap.open(at(s3), key=small.key)
    assert S3.secret_key not in repr(reader)
    state = pickle.dumps(reader)
    check(pickle.loads(state), with_memory=False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read, (reader.namespace("disks"), "sda")) == SDA


def test_a_store_is_used_after_a_fork(s3: Bucket, small: Place) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    reader = vmsnap.open(at(s3), key=small.key)
    check(reader, with_memory=False)
    script = """
import os, sys, vmsnap
reader = vmsnap.open(sys.argv[1], key=bytes.fromhex(sys.argv[2]))
print(reader.read_fragment("clock"), flush=True)
if not (child := os.fork()):
    print(reader.read_fragment("clock"), vmsnap.open(sys.argv[1], key=bytes.fromhex(sys.argv[2])).list_fragments())
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(reader.namespace("disks").list_fragments())
"""
    assert small.key
    done = run_python(script, f"{s3.url}/vm1", small.key.hex(), **environment(s3))
    assert done.stdout.splitlines() == ["12", "12 ['clock', 'empty']", "['sda']"], done.stderr


@pytest.mark.parametrize("what", ["pull", "push", "open", "read"])
def test_ctrl_c_ends_a_call_that_waits(what: str, s3: Bucket, proxy: FaultProxy, small: Place, tmp_path: Path) -> None:
    if what != "push":
        vmsnap.push(small.location, at(s3), key=small.key)
    assert small.key
    script = """
import sys, vmsnap
what, source, target, key = sys.argv[1:4] + [bytes.fromhex(sys.argv[4])]
url = sys.argv[5]
try:
    if what == "push":
        vmsnap.push(source, url, key=key)
    elif what == "pull":
        vmsnap.pull(url, target, key=key)
    else:
        reader = vmsnap.open(url, key=key)
        reader.namespace("disks").raw_fragment("sda").read()
except KeyboardInterrupt:
    print("interrupted")
"""
    path = {"open": "vmsnap_manifest", "push": "vmsnap_manifest"}.get(what, "disks/sda")
    rule = proxy.rule(Stall(1), path=path, method="GET", times=None)
    if what == "push":
        # There is no manifest yet, so this is the answer to the request for it.
        rule = proxy.rule(Stall(0), kind="create", times=None)
    behind = s3.at(proxy.endpoint)
    command = [sys.executable, "-c", script, what, small.location, tmp_path / "copy", small.key.hex(), f"{s3.url}/vm1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment(behind), text=True
    ) as child:
        while not rule.met:
            assert child.poll() is None, child.communicate()
        child.send_signal(signal.SIGINT)
        out, told = child.communicate(timeout=120)
    assert out == "interrupted\n", told
    assert not (tmp_path / "copy").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["small"]


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named(s3: Bucket, small: Place) -> None:
    location = vmsnap.Location("s3://no-such-bucket/vm1", s3.storage_options)
    for call in (
        lambda: vmsnap.open(location),
        lambda: vmsnap.push(small.location, location, key=small.key),
        lambda: vmsnap.create(location),
        lambda: vmsnap.inspect(location),
        lambda: vmsnap.remove(location),
        lambda: vmsnap.clean(location),
    ):
        with pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket"):
            call()


def test_a_snapshot_that_does_not_exist_is_not_found(bucket: Bucket, tmp_path: Path) -> None:
    for call in (
        lambda: vmsnap.open(at(bucket)),
        lambda: vmsnap.pull(at(bucket), tmp_path / "copy"),
        lambda: vmsnap.verify(at(bucket)),
    ):
        with pytest.raises(FileNotFoundError, match="vm1"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_region_is_told_with_the_right_one(s3: Bucket, proxy: FaultProxy) -> None:
    body = (
        b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; the region "
        b"'us-east-1' is wrong; expecting 'eu-west-3'</Message><Region>eu-west-3</Region></Error>"
    )
    proxy.rule(Status(400, body=body), times=None)
    with pytest.raises(vmsnap.InvalidArgumentError, match="in the region eu-west-3, not in us-east-1; set AWS_REGION"):
        vmsnap.open(at(s3.at(proxy.endpoint)))


def test_without_credentials_nothing_is_waited_for(s3: Bucket) -> None:
    options = {"endpoint": s3.endpoint, "region": S3.region}
    with pytest.raises(PermissionError, match=r"there are no credentials .*aws configure export-credentials"):
        vmsnap.open(vmsnap.Location(f"{s3.url}/vm1", options))


def test_refused_credentials_are_told(s3: Bucket) -> None:
    options = s3.storage_options | {"aws_secret_access_key": "another secret"}
    with pytest.raises(PermissionError, match="refused access") as caught:
        vmsnap.open(vmsnap.Location(f"{s3.url}/vm1", options))
    assert "another secret" not in str(caught.value)


def test_credentials_that_expire_are_told(s3: Bucket, proxy: FaultProxy, small: Place, tmp_path: Path) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    proxy.rule(Status(400, body=body), path="disks/sda", times=None)
    with pytest.raises(PermissionError, match=r"have expired .*; renew them"):
        vmsnap.pull(at(s3.at(proxy.endpoint)), tmp_path / "copy", key=small.key)
    assert [each.name for each in tmp_path.iterdir()] == ["small"]


def test_a_prefix_with_something_else_is_left_alone(s3: Bucket, small: Place) -> None:
    put(s3, "vm1/notes", b"mine")
    with pytest.raises(FileNotFoundError, match="vm1"):
        vmsnap.open(at(s3))
    for call in (lambda: vmsnap.push(small.location, at(s3), key=small.key), lambda: vmsnap.create(at(s3))):
        with pytest.raises(FileExistsError, match='the prefix is not empty: it contains "notes"'):
            call()
    assert objects(s3) == {"notes"}


def test_another_snapshot_is_not_overwritten(s3: Bucket, small: Place, tmp_path: Path) -> None:
    other = make(tmp_path / "other", with_memory=False)
    vmsnap.push(other.location, at(s3))
    before = objects(s3)
    with pytest.raises(FileExistsError):
        vmsnap.push(small.location, at(s3), key=small.key)
    assert objects(s3) == before
    check(vmsnap.open(at(s3)), with_memory=False)


def test_only_a_sealed_and_sound_snapshot_is_pushed(s3: Bucket, small: Place, tmp_path: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "open").write_fragment("clock", 1)
    with pytest.raises(vmsnap.NotSealedError, match="vmsnap seal"):
        vmsnap.push(tmp_path / "open", at(s3))
    small.damage("disks/sda", 5000)
    with pytest.raises(vmsnap.AuthenticationError, match='fragment "sda"'):
        vmsnap.push(small.location, at(s3), key=small.key)
    assert objects(s3) == set()


def test_a_name_that_a_store_cannot_have_is_refused(s3: Bucket, tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm1") as writer:
        writer.write_fragment("new\nline", 1)
    with pytest.raises(vmsnap.InvalidArgumentError, match="control"):
        vmsnap.push(tmp_path / "vm1", at(s3))
    assert objects(s3) == set()


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "replaced": (lambda store: obstore.put(store, "disks/sda", pattern(len(SDA), 9), use_multipart=False), "replaced"),
    "shorter": (lambda store: obstore.put(store, "disks/sda", SDA[:-1], use_multipart=False), "."),
    "gone": (lambda store: obstore.delete(store, "disks/sda"), "removed|missing"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_open", [False, True], ids=["before", "while it is open"])
def test_an_object_that_changed_is_an_error(change: str, is_open: bool, s3: Bucket, source: Place) -> None:
    vmsnap.push(source.location, at(s3), key=source.key)
    alter, text = CHANGES[change]
    disks = vmsnap.open(at(s3), key=source.key).namespace("disks")
    if is_open:
        # Its first block is what was read until now.
        fragment = vmsnap.open(at(s3), key=source.key).raw_fragment("mem")
        fragment.read_at(0, 4096)
        content = bytes(obstore.get(s3.store("vm1"), "mem").bytes())
        obstore.put(s3.store("vm1"), "mem", content[::-1], use_multipart=False)
        with pytest.raises(vmsnap.CorruptSnapshotError, match="replaced"):
            fragment.read_at(3 * MIB, 4096)
    alter(s3.store("vm1"))
    expected = (vmsnap.CorruptSnapshotError, vmsnap.AuthenticationError)
    if source.key is None and change == "replaced":
        # Nothing in a plain snapshot is checked when it is read in place.
        assert read(disks, "sda") == pattern(len(SDA), 9)
    else:
        with pytest.raises(expected, match=text if change != "replaced" else "."):
            read(disks, "sda")
    report = vmsnap.verify(at(s3), key=source.key)
    assert "disks/sda" in {problem.path for problem in report.problems}


def test_a_changed_object_ends_a_pull(s3: Bucket, source: Place, tmp_path: Path) -> None:
    vmsnap.push(source.location, at(s3), key=source.key)
    put(s3, "vm1/disks/sda", pattern(len(SDA), 9))
    before = set(tmp_path.iterdir())
    with pytest.raises((vmsnap.CorruptSnapshotError, vmsnap.AuthenticationError), match='fragment "sda"'):
        vmsnap.pull(at(s3), tmp_path / "copy", key=source.key)
    assert set(tmp_path.iterdir()) == before


def test_a_pull_into_something_is_refused(s3: Bucket, small: Place, tmp_path: Path) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    with pytest.raises(FileExistsError):
        vmsnap.pull(at(s3), small.location, key=small.key)
    with pytest.raises(FileNotFoundError):
        vmsnap.pull(at(s3), tmp_path / "none/copy", key=small.key)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.pull(at(s3), tmp_path / "copy", key=vmsnap.generate_key())
    with pytest.raises(vmsnap.AuthenticationError, match="seal digest"):
        vmsnap.pull(at(s3), tmp_path / "copy", key=small.key, expect_seal_digest=bytes(32))
    assert [each.name for each in tmp_path.iterdir()] == ["small"]


def test_http_to_another_machine_must_be_allowed(s3: Bucket) -> None:
    options = {name: value for name, value in s3.storage_options.items() if name != "aws_allow_http"}
    location = vmsnap.Location(f"{s3.url}/vm1", options | {"aws_endpoint": "http://192.0.2.1:9"})
    with pytest.raises(vmsnap.InvalidArgumentError, match="TLS"):
        vmsnap.open(location)
    # A loopback address never needs it.
    with pytest.raises(FileNotFoundError):
        vmsnap.open(vmsnap.Location(f"{s3.url}/vm1", options))


# The command line ----------------------------------------------------------------------------------------------------


class Commands:
    """The command line with a bucket, a cache of its own, and the key of a snapshot."""

    def __init__(self, bucket: Bucket, cache: Path, key_file: Path) -> None:
        self.url, self.cache, self.key_file = f"{bucket.url}/vm1", cache, key_file
        self.variables = environment(bucket) | {"XDG_CACHE_HOME": str(cache)}

    def __call__(
        self, name: str, *arguments: str | Path, status: int = 0, **more: str
    ) -> subprocess.CompletedProcess[bytes]:
        key = ("--key-file", self.key_file)
        return run(name, *arguments, *key, status=status, env=self.variables | more)

    def keyless(self, *arguments: str | Path, status: int = 0, **more: str) -> subprocess.CompletedProcess[bytes]:
        return run(*arguments, status=status, env=self.variables | more)

    def cached(self, *arguments: str | Path) -> int:
        return int(json.loads(self.keyless("cache", "--json", *arguments).stdout)["blocks"])


@pytest.fixture
def commands(s3: Bucket, tmp_path: Path, key_file: Path) -> Commands:
    return Commands(s3, tmp_path / "cache", key_file)


def test_commands_read_in_place(commands: Commands, tmp_path: Path, key: bytes) -> None:
    source = make(tmp_path / "source", key)
    pushed = commands("push", source.location, commands.url)
    digest = source.open().seal_digest
    assert digest
    assert f"seal digest: {digest.hex()}" in pushed.stderr.decode()
    assert "already there" in commands("push", source.location, commands.url).stderr.decode()

    for name, *arguments in (
        ["ls"],
        ["ls", "-l"],
        ["tree"],
        ["show", "clock"],
        ["cat", "disks/sda"],
        ["peek", "0", "64"],
    ):
        snapshot, *rest = [commands.url, *arguments] if not arguments or arguments[0] != "-l" else [commands.url, "-l"]
        there, here = commands(name, snapshot, *rest), commands(name, source.location, *rest)
        if rest != ["-l"]:
            assert there.stdout.replace(commands.url.encode(), b"@") == here.stdout.replace(
                str(source.location).encode(), b"@"
            )
        assert there.stdout
    told = json.loads(commands("info", commands.url, "--json").stdout)
    assert (told["location"], told["sealed"], told["fragments"]) == (commands.url, True, 5)
    assert "needs the key" in commands.keyless("info", commands.url).stdout.decode()
    assert f"seal digest: {digest.hex()}" in commands("verify", commands.url).stdout.decode()
    commands("restore", commands.url, tmp_path / "ram.img")
    assert (tmp_path / "ram.img").read_bytes() == RAM
    commands("get", commands.url, "disks/sda", tmp_path / "sda")
    assert (tmp_path / "sda").read_bytes() == SDA
    commands("decrypt", commands.url, tmp_path / "plain")
    check(vmsnap.open(tmp_path / "plain"))
    commands("pull", commands.url, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(source.location)


def test_the_map_of_a_remote_snapshot(commands: Commands, tmp_path: Path, key: bytes) -> None:
    pytest.importorskip("PIL", reason="no Pillow beside this Python: pip install 'vmsnap[map]'")
    commands("push", make(tmp_path / "source", key).location, commands.url)
    commands("map", commands.url, "-o", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_commands_keep_what_they_fetched(commands: Commands, tmp_path: Path, key: bytes) -> None:
    commands("push", make(tmp_path / "source", key).location, commands.url)
    assert commands.cached() == 0
    commands("peek", commands.url, "0", "64", "--no-cache")
    assert commands.cached() == 0
    commands("peek", commands.url, "0", "64")
    assert commands.cached() > 0
    assert (commands.cache / "vmsnap").stat().st_mode & 0o777 == 0o700
    for file in (commands.cache / "vmsnap").iterdir():
        assert RAM[4096:8192] not in file.read_bytes()
    commands("peek", commands.url, "0", "64", "--cache", tmp_path / "one")
    commands("peek", commands.url, "0", "64", VMSNAP_CACHE=str(tmp_path / "two"))
    assert commands.cached("--cache", tmp_path / "one") == commands.cached("--cache", tmp_path / "two") > 0
    assert "removed" in commands.keyless("cache", "--clear").stderr.decode()
    assert commands.cached() == 0


def test_a_block_that_is_cached_is_not_fetched_again(
    s3: Bucket, proxy: FaultProxy, small: Place, tmp_path: Path
) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    location = at(s3.at(proxy.endpoint), cache=tmp_path / "cache")
    assert read(vmsnap.open(location, key=small.key).namespace("disks"), "sda") == SDA
    assert proxy.count(path="disks/sda") > 0
    proxy.clear()
    assert read(vmsnap.open(location, key=small.key).namespace("disks"), "sda") == SDA
    assert proxy.count(path="disks/sda") == 0
    assert proxy.count() == 2


def test_opening_takes_one_round_trip(s3: Bucket, proxy: FaultProxy, tmp_path: Path, key: bytes) -> None:
    vmsnap.push(make(tmp_path / "source", key).location, at(s3), key=key)
    behind = at(s3.at(proxy.endpoint))
    # Connections are made, and the files of the program are read.
    vmsnap.open(behind, key=key)
    proxy.clear()
    proxy.latency_seconds = 0.1
    reader = vmsnap.open(behind, key=key)
    assert (proxy.round_trips(), proxy.count()) == (1, 2)
    assert reader.memory().read(0, 4096) == RAM[:4096]
    assert proxy.round_trips() == 2
    assert proxy.count("head") == proxy.count("list") == 0


def test_commands_write_into_a_store(commands: Commands, s3: Bucket, tmp_path: Path, key: bytes) -> None:
    image = tmp_path / "ram.img"
    image.write_bytes(RAM)
    commands("dump", image, commands.url, "--compress", "lz4")
    assert vmsnap.open(at(s3), key=key).memory().read(0, 4096) == RAM[:4096]
    assert b"exists" in commands("dump", image, commands.url, status=1).stderr
    run("encrypt", commands.url, f"{s3.url}/vm2", "--key-file", commands.key_file, "--new-key-file", commands.key_file,
        env=commands.variables)  # fmt: skip
    assert vmsnap.open(at(s3, "vm2"), key=key).memory().read(0, 4096) == RAM[:4096]


def test_commands_change_keys_clean_and_remove(commands: Commands, s3: Bucket, small: Place, tmp_path: Path) -> None:
    commands("push", small.location, commands.url)
    other = tmp_path / "other.key"
    other.write_bytes(vmsnap.generate_key())
    other.chmod(0o600)
    commands("rekey", commands.url, "--new-key-file", other)
    assert b"vmsnap: error" in commands("cat", commands.url, "clock", status=3).stderr
    assert commands.keyless("cat", commands.url, "clock", "--key-file", other).stdout == b"\x0c"

    abandoned = vmsnap.create(at(s3, "abandoned"))
    assert b"kept, in use" in commands.keyless("clean", s3.url + "/abandoned").stderr
    done = commands.keyless("clean", s3.url + "/abandoned", "--older-than", "0s")
    assert done.stdout.decode() == f"removed {s3.url}/abandoned\n"
    with pytest.raises(vmsnap.StateError):
        abandoned.commit()
    assert b"is not a time" in commands.keyless("clean", s3.url + "/x", "--older-than", "week", status=2).stderr

    assert "--yes removes" in error_of(commands.keyless("rm", commands.url, status=1))
    commands.keyless("rm", commands.url, "--yes")
    assert objects(s3) == set()
    assert "No such file" in error_of(commands("ls", commands.url, status=1))


def test_options_of_the_connection(s3: Bucket, small: Place, tmp_path: Path, key_file: Path) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    variables = environment(s3)
    endpoint, region = variables.pop("AWS_ENDPOINT"), variables.pop("AWS_REGION")
    options = ("--storage-option", f"endpoint={endpoint}", "--storage-option", f"region={region}")
    done = run("cat", f"{s3.url}/vm1", "clock", "--key-file", key_file, "--no-cache", *options, env=variables)
    assert done.stdout == b"\x0c"
    del variables["AWS_ALLOW_HTTP"]
    remote = ("--storage-option", "endpoint=http://192.0.2.1:9", "--storage-option", "region=x")
    done = run("cat", f"{s3.url}/vm1", "clock", "--key-file", key_file, *remote, status=1, env=variables)
    assert "--allow-http" in error_of(done)


def test_a_file_object_of_a_remote_fragment(s3: Bucket, small: Place) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    with vmsnap.open(at(s3), key=small.key).namespace("disks").raw_fragment("sda") as fragment:
        buffered = io.BufferedReader(fragment)
        buffered.seek(200_000)
        assert buffered.read(1000) == SDA[200_000:201_000]


def test_two_snapshots_of_one_name_in_two_buckets(s3: Bucket, small: Place, tmp_path: Path) -> None:
    other = s3.server.new_bucket()
    make(tmp_path / "other", with_memory=False)
    with vmsnap.create(at(other)) as writer:
        write(writer, "clock", b"other")
    vmsnap.push(small.location, at(s3), key=small.key)
    assert read(vmsnap.open(at(other)), "clock") == b"other"
    check(vmsnap.open(at(s3), key=small.key), with_memory=False)
