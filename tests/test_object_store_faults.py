"""A push or a create that is killed before any of its requests, and two writers at one place."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import vmsnap
from fault_proxy import FaultProxy
from http_faults import Call, CutBody, Kill, LostAnswer, Reset, Status, unconditional, whole_body
from object_stores import NO_OBSTORE, S3, Bucket
from remote import at, check, environment, fill, make, objects
from support import MIB, Place, pattern, write

pytest.importorskip("obstore", reason=NO_OBSTORE)

NOW = timedelta(0)

PUSH = """
import sys, vmsnap
vmsnap.push(sys.argv[1], sys.argv[2], threads=1)
"""
CREATE = """
import sys, vmsnap
sys.path.insert(0, sys.argv[1])
from remote import fill
with vmsnap.create(sys.argv[2], threads=1) as writer:
    fill(writer, with_memory=False)
"""


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[FaultProxy]:
    """A proxy before a server of S3's protocol."""
    with FaultProxy(s3.endpoint, (S3.access_key, S3.secret_key)) as proxy:
        yield proxy


@pytest.fixture
def source(tmp_path: Path) -> Place:
    """A snapshot on a local disk: one fragment has several parts, and the others are small."""
    with vmsnap.create(tmp_path / "source", durable=False) as writer:
        fill(writer, with_memory=False)
        write(writer, "large", pattern(17 * MIB, 7))
    return Place(tmp_path / "source", None)


def killed_before(
    number: int, proxy: FaultProxy, bucket: Bucket, script: str, first: Path, path: str
) -> tuple[bool, bool]:
    """Run a script that writes to `path`, and kill it before a request. Returns whether it was, and had a manifest."""
    proxy.clear()
    child: subprocess.Popen[bytes] | None = None

    def pid() -> int:
        assert child is not None
        return child.pid

    rule = proxy.rule(Kill(pid), nth=number)
    command = [sys.executable, "-c", script, str(first), f"{bucket.url}/{path}"]
    child = subprocess.Popen(command, env=os.environ | environment(bucket.at(proxy.endpoint)))
    status = child.wait()
    assert (status != 0) == bool(rule.met)
    return status != 0, "vmsnap_manifest" in objects(bucket, path)


@pytest.mark.parametrize("remedy", ["resume", "clean"])
def test_a_push_that_is_killed_resumes_or_is_cleaned(remedy: str, s3: Bucket, proxy: FaultProxy, source: Place) -> None:
    digest = source.open().seal_digest
    for number in range(1, 100):
        path = f"vm{number}"
        was_killed, is_complete = killed_before(number, proxy, s3, PUSH, source.location, path)
        if is_complete:
            assert vmsnap.open(at(s3, path)).seal_digest == digest
        else:
            assert was_killed
            with pytest.raises(FileNotFoundError):
                vmsnap.open(at(s3, path))
        if remedy == "clean":
            vmsnap.clean(at(s3, path), older_than=NOW)
            assert objects(s3, path) == ({*map(str, FILES), "vmsnap_manifest"} if is_complete else set())
        else:
            pushed = vmsnap.push(source.location, at(s3, path))
            assert pushed.seal_digest == digest
            assert pushed.already_there == is_complete
            assert objects(s3, path) == {*map(str, FILES), "vmsnap_manifest"}
            assert vmsnap.verify(at(s3, path)).ok
        if not was_killed:
            # Manifest, claim, list, three fragments, three parts with two requests around them, claim, manifest, claim.
            assert number > 10
            return
    raise AssertionError("it was killed each time")


FILES = ("clock", "disks/sda", "empty", "large")


def test_a_push_that_is_resumed_sends_only_the_rest(s3: Bucket, proxy: FaultProxy, source: Place) -> None:
    total = sum(each.stored_size for each in vmsnap.inspect(source.location).fragments)
    proxy.rule(Status(403, body=b"<Error><Code>AccessDenied</Code></Error>"), path="vmsnap_manifest", kind="create")
    with pytest.raises(PermissionError, match="what was sent stays, and the next push of this snapshot resumes"):
        vmsnap.push(source.location, at(s3.at(proxy.endpoint)))
    assert objects(s3) == {".vmsnap-push", *FILES}
    pushed = vmsnap.push(source.location, at(s3))
    assert (pushed.sent_bytes, pushed.resumed_bytes) == (0, total)


def test_a_create_that_is_killed_is_no_snapshot(s3: Bucket, proxy: FaultProxy) -> None:
    tests = Path(__file__).parent
    for number in range(1, 100):
        path = f"vm{number}"
        was_killed, is_complete = killed_before(number, proxy, s3, CREATE, tests, path)
        if is_complete:
            check(vmsnap.open(at(s3, path)), with_memory=False)
        else:
            with pytest.raises(FileNotFoundError):
                vmsnap.open(at(s3, path))
            vmsnap.clean(at(s3, path), older_than=NOW)
            assert objects(s3, path) == set()
        if not was_killed:
            assert number > 5
            return
    raise AssertionError("it was killed each time")


# Two writers ---------------------------------------------------------------------------------------------------------


class Meanwhile(Call):
    """Something that a test does before a request is forwarded. The test looks at its error, or at its result."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.result: object = None

        def call() -> None:
            try:
                self.result = work()
            except vmsnap.VmsnapError as error:
                self.result = error

        super().__init__(call)


def test_of_two_pushes_at_once_one_wins(s3: Bucket, proxy: FaultProxy, source: Place, tmp_path: Path) -> None:
    other = make(tmp_path / "other", with_memory=False)
    second = Meanwhile(lambda: vmsnap.push(other.location, at(s3)))
    proxy.rule(second, kind="put", path="disks/sda")
    vmsnap.push(source.location, at(s3.at(proxy.endpoint)))
    assert isinstance(second.result, vmsnap.StateError)
    assert "pushes another snapshot there since" in str(second.result)
    assert vmsnap.open(at(s3)).seal_digest == source.open().seal_digest
    assert vmsnap.verify(at(s3)).ok


def test_two_pushes_of_one_snapshot_both_succeed(s3: Bucket, proxy: FaultProxy, source: Place) -> None:
    second = Meanwhile(lambda: vmsnap.push(source.location, at(s3)))
    proxy.rule(second, kind="put", path="disks/sda")
    first = vmsnap.push(source.location, at(s3.at(proxy.endpoint)))
    assert isinstance(second.result, vmsnap.Pushed)
    assert first.seal_digest == second.result.seal_digest
    assert objects(s3) == {*FILES, "vmsnap_manifest"}
    assert vmsnap.verify(at(s3)).ok


def test_a_push_whose_place_was_taken_over_fails(s3: Bucket, proxy: FaultProxy, source: Place, tmp_path: Path) -> None:
    other = make(tmp_path / "other", with_memory=False)
    second = Meanwhile(lambda: vmsnap.push(other.location, at(s3), take_over=True))
    # Everything is sent, and only the last objects are missing.
    proxy.rule(second, kind="get", path="vmsnap-push")
    with pytest.raises((vmsnap.StateError, FileExistsError)):
        vmsnap.push(source.location, at(s3.at(proxy.endpoint)))
    assert isinstance(second.result, vmsnap.Pushed)
    assert vmsnap.open(at(s3)).seal_digest == other.open().seal_digest


# Faults of the store -------------------------------------------------------------------------------------------------

FAULTS = {
    "a lost answer to the claim": (LostAnswer(), "create", "vmsnap-push"),
    "a lost answer to the manifest": (LostAnswer(), "create", "vmsnap_manifest"),
    "a conflict": (Status(409, body=b"<Error><Code>ConditionalRequestConflict</Code></Error>"), "create", "manifest"),
    "a failure of the server": (Status(503), "part", None),
    "a reset": (Reset(), "put", None),
    "a lost answer to a part": (LostAnswer(), "part", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_goes_on_after_a_fault(fault: str, s3: Bucket, proxy: FaultProxy, source: Place) -> None:
    what, kind, path = FAULTS[fault]
    rule = proxy.rule(what, kind=kind, path=path)
    pushed = vmsnap.push(source.location, at(s3.at(proxy.endpoint)))
    assert rule.met == 1
    assert not pushed.already_there
    assert objects(s3) == {*FILES, "vmsnap_manifest"}
    assert vmsnap.verify(at(s3)).ok


def test_a_store_without_conditions_is_found_out(s3: Bucket, proxy: FaultProxy, source: Place, tmp_path: Path) -> None:
    other = make(tmp_path / "other", with_memory=False)
    vmsnap.push(other.location, at(s3))
    proxy.rule(unconditional(), times=None)
    with pytest.raises(FileExistsError):
        vmsnap.push(source.location, at(s3.at(proxy.endpoint)))
    assert vmsnap.open(at(s3)).seal_digest == other.open().seal_digest


def test_a_body_that_breaks_off_is_continued(s3: Bucket, proxy: FaultProxy, source: Place, tmp_path: Path) -> None:
    vmsnap.push(source.location, at(s3))
    rule = proxy.rule(CutBody(1 << 16), path="large", nth=2, times=2)
    vmsnap.pull(at(s3.at(proxy.endpoint)), tmp_path / "copy")
    assert rule.met
    assert (tmp_path / "copy/large").read_bytes() == pattern(17 * MIB, 7)


def test_a_server_that_ignores_ranges_is_refused(s3: Bucket, proxy: FaultProxy, source: Place, tmp_path: Path) -> None:
    vmsnap.push(source.location, at(s3))
    proxy.rule(whole_body(), path="large", times=None)
    cache = tmp_path / "cache"
    behind = at(s3.at(proxy.endpoint), cache=cache)
    with pytest.raises(vmsnap.CorruptSnapshotError, match="ignores ranges"):
        vmsnap.open(behind).raw_fragment("large").read()
    with pytest.raises(vmsnap.CorruptSnapshotError, match="ignores ranges"):
        vmsnap.pull(behind, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    # A wrong answer is never kept.
    assert vmsnap.open(at(s3, cache=cache)).raw_fragment("large").read() == pattern(17 * MIB, 7)
