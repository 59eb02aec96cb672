"""The servers of object_stores.py do what vmsnap needs of a store, which another client shows: obstore.

fake-gcs-server does less than the storage it stands for. Tests name that, and fail once it does more.
"""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from object_stores import NO_OBSTORE, Bucket
from support import MIB, pattern

obstore = pytest.importorskip("obstore", reason=NO_OBSTORE)
exceptions = pytest.importorskip("obstore.exceptions")

COMPLETE = pytest.mark.parametrize("bucket", ["s3", "azure"], indirect=True)
RETRY_NEVER = {"max_retries": 0}


def put(store: Any, name: str, content: bytes, **options: Any) -> Any:
    """Put an object by one request, and return its version: the ETag, and the generation where there is one."""
    told = obstore.put(store, name, content, use_multipart=False, **options)
    return {key: value for key, value in told.items() if value is not None}


def get(store: Any, name: str, **options: Any) -> bytes:
    return bytes(obstore.get(store, name, options=options).bytes())


def listed(store: Any) -> dict[str, int]:
    return {each["path"]: each["size"] for each in obstore.list(store).collect()}


# Objects -------------------------------------------------------------------------------------------------------------


def test_a_bucket_of_a_test_is_empty_and_its_own(bucket: Bucket) -> None:
    assert listed(bucket.store()) == {}
    put(bucket.store(), "mine", b"x")
    assert listed(bucket.server.new_bucket().store()) == {}


def test_an_object_is_what_was_put(bucket: Bucket) -> None:
    store = bucket.store("prefix/vm1")
    for name, content in {"empty": b"", "one": b"1", "large": pattern(3 * MIB)}.items():
        put(store, name, content)
        assert get(store, name) == content
        assert obstore.head(store, name)["size"] == len(content)
    put(store, "one", b"another")
    assert get(store, "one") == b"another"


def test_ranges_are_answered_with_the_size_of_the_object(bucket: Bucket) -> None:
    store, content = bucket.store("vm1"), pattern(100_000)
    put(store, "mem", content)
    for start, end in [(0, 1), (0, 100_000), (99_999, 100_000), (12_345, 54_321)]:
        got = obstore.get(store, "mem", options={"range": (start, end)})
        # Both are of Content-Range.
        assert (got.range, got.meta["size"]) == ((start, end), 100_000)
        assert bytes(got.bytes()) == content[start:end]
    got = obstore.get(store, "mem", options={"range": (99_990, 200_000)})
    assert got.range == (99_990, 100_000)


def test_an_object_that_is_not_there_is_not_found(bucket: Bucket) -> None:
    store = bucket.store("vm1")
    for asked in (obstore.get, obstore.head):
        with pytest.raises(FileNotFoundError):
            asked(store, "vmsnap_manifest")


def test_metadata_is_kept(bucket: Bucket) -> None:
    store = bucket.store("vm1")
    put(store, "mem", b"x", attributes={"vmsnapproof": "00ff" * 16})
    assert obstore.get(store, "mem", options={"head": True}).attributes["vmsnapproof"] == "00ff" * 16
    assert obstore.get(store, "mem").attributes["vmsnapproof"] == "00ff" * 16


NAMES = ["mem", "devices/vcpu/vcpu0", "żółć ☃ 𝄞", "a b+c%20d=&?#", "-dash", "~'()!*;:@$,[]", "a" * 200, ".vmsnap-push"]


def test_names_are_listed_as_they_were_put(bucket: Bucket) -> None:
    store = bucket.store("prefix/vm1")
    for number, name in enumerate(NAMES):
        put(store, name, bytes(number))
    put(bucket.store(), "prefix/vm10", b"a neighbour")
    assert listed(store) == {name: number for number, name in enumerate(NAMES)}
    for number, name in enumerate(NAMES):
        assert get(store, name) == bytes(number)


def test_more_objects_are_listed_than_fit_in_one_answer(s3: Bucket) -> None:
    store = s3.store("vm1")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: put(store, f"{number:04}", b""), range(1005)))
    assert sorted(listed(store)) == [f"{number:04}" for number in range(1005)]


def test_objects_are_deleted(bucket: Bucket) -> None:
    store = bucket.store("vm1")
    for name in ("one", "two", "three"):
        put(store, name, b"x")
    obstore.delete(store, ["one", "two"])
    assert listed(store) == {"three": 1}


# Conditions ----------------------------------------------------------------------------------------------------------


def test_an_object_is_created_once(bucket: Bucket) -> None:
    store = bucket.store("vm1")
    put(store, "vmsnap_manifest", b"first", mode="create")
    with pytest.raises(exceptions.AlreadyExistsError):
        put(store, "vmsnap_manifest", b"second", mode="create")
    assert get(store, "vmsnap_manifest") == b"first"


def test_of_creates_at_the_same_time_one_wins(bucket: Bucket) -> None:
    store = bucket.store("vm1", retry_config=RETRY_NEVER)

    def create(number: int) -> bool:
        try:
            put(store, "vmsnap_manifest", b"%d" % number, mode="create")
        except (exceptions.AlreadyExistsError, exceptions.GenericError):
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert get(store, "vmsnap_manifest") == b"%d" % won.index(True)


def test_an_object_is_replaced_if_it_is_the_known_one(bucket: Bucket) -> None:
    store = bucket.store("vm1")
    version = put(store, "enc_metadata", b"first")
    put(store, "enc_metadata", b"second", mode=version)
    with pytest.raises(exceptions.PreconditionError):
        put(store, "enc_metadata", b"third", mode=version)
    assert get(store, "enc_metadata") == b"second"


@COMPLETE
def test_a_range_is_read_if_the_object_is_the_known_one(bucket: Bucket) -> None:
    store = bucket.store("vm1")
    etag = put(store, "mem", b"0123456789")["e_tag"]
    assert get(store, "mem", range=(2, 5), if_match=etag) == b"234"
    put(store, "mem", b"9876543210")
    with pytest.raises(exceptions.PreconditionError):
        get(store, "mem", range=(2, 5), if_match=etag)


def test_fake_gcs_server_knows_no_conditional_reads(gcs: Bucket) -> None:
    store = gcs.store("vm1")
    etag = put(store, "mem", b"0123456789")["e_tag"]
    put(store, "mem", b"9876543210")
    assert get(store, "mem", range=(2, 5), if_match=etag) == b"765"


# Parts ---------------------------------------------------------------------------------------------------------------


@COMPLETE
def test_an_object_is_put_in_parts(bucket: Bucket) -> None:
    store, content = bucket.store("vm1"), pattern(17 * MIB)
    attributes = {"vmsnapproof": "00ff" * 16}
    obstore.put(store, "mem", content, use_multipart=True, chunk_size=8 * MIB, attributes=attributes)
    assert get(store, "mem") == content
    assert obstore.get(store, "mem", options={"head": True}).attributes["vmsnapproof"] == "00ff" * 16
    assert listed(store) == {"mem": 17 * MIB}


def test_fake_gcs_server_knows_no_parts(gcs: Bucket) -> None:
    store = gcs.store("vm1", retry_config=RETRY_NEVER)
    with pytest.raises(exceptions.GenericError):
        obstore.put(store, "mem", bytes(17 * MIB), use_multipart=True, chunk_size=8 * MIB)
    assert listed(store) == {}


# The servers ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
import object_stores
with object_stores.running(getattr(object_stores, sys.argv[2]), pathlib.Path(sys.argv[3])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "ends"])
@pytest.mark.parametrize("kind", ["S3", "Azure", "Gcs"])
def test_a_server_ends_with_the_process_that_started_it(
    kind: str, end: signal.Signals | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # Skips where there is no such server.
    request.getfixturevalue(f"{kind.lower()}_server")
    command = [sys.executable, "-c", HOLD, str(Path(__file__).parent), kind, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin
        assert holder.stdout
        server = os.pidfd_open(int(holder.stdout.readline()))
        if end is None:
            holder.stdin.close()
        else:
            holder.send_signal(end)
        assert select.select([server], [], [], 60)[0], "it still runs"
        os.close(server)
