"""The proxy of fault_proxy.py passes on all that a client and a store say, and each of its faults meets the client."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.client import HTTPConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

import pytest
from fault_proxy import FaultProxy
from http_faults import (
    AnswerHeaders,
    Call,
    CutBody,
    Kill,
    LostAnswer,
    RequestHeaders,
    Reset,
    Stall,
    Status,
    unconditional,
    whole_body,
)
from object_stores import NO_OBSTORE, S3, Bucket
from support import MIB, pattern

obstore = pytest.importorskip("obstore", reason=NO_OBSTORE)
exceptions = pytest.importorskip("obstore.exceptions")

ONCE = {"max_retries": 0}
CONTENT = pattern(100_000)


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[FaultProxy]:
    """A proxy before a server of S3's protocol."""
    with FaultProxy(s3.endpoint, (S3.access_key, S3.secret_key)) as proxy:
        yield proxy


@pytest.fixture
def behind(s3: Bucket, proxy: FaultProxy) -> Bucket:
    """The bucket as it is seen through the proxy. It has one object, `vm1/mem`."""
    put(s3.store("vm1"), "mem", CONTENT)
    return s3.at(proxy.endpoint)


def put(store: Any, name: str, content: bytes, **options: Any) -> str:
    etag: str = obstore.put(store, name, content, use_multipart=False, **options)["e_tag"]
    return etag


def get(store: Any, name: str, **options: Any) -> bytes:
    return bytes(obstore.get(store, name, options=options).bytes())


def test_each_protocol_passes_through(bucket: Bucket) -> None:
    with FaultProxy(bucket.endpoint) as proxy:
        store = bucket.at(proxy.endpoint).store("vm1")
        put(store, "żółć ☃/a b+c%20d=&?#", CONTENT, mode="create")
        assert get(store, "żółć ☃/a b+c%20d=&?#") == CONTENT
        assert get(store, "żółć ☃/a b+c%20d=&?#", range=(5, 70_005)) == CONTENT[5:70_005]
        assert [each["size"] for each in obstore.list(store).collect()] == [100_000]
        assert obstore.head(store, "żółć ☃/a b+c%20d=&?#")["size"] == 100_000
        obstore.delete(store, "żółć ☃/a b+c%20d=&?#")
        with pytest.raises(FileNotFoundError):
            get(store, "żółć ☃/a b+c%20d=&?#")
        assert [each.kind for each in proxy.requests] == ["create", "get", "range", "list", "head", "delete", "get"]
        answers = [(each.status, each.answered_bytes) for each in proxy.requests[1:3]]
        assert answers == [(200, 100_000), (206, 70_000)]


@pytest.mark.parametrize("bucket", ["s3", "azure"], indirect=True)
def test_parts_are_counted(bucket: Bucket) -> None:
    with FaultProxy(bucket.endpoint) as proxy:
        store = bucket.at(proxy.endpoint).store("vm1")
        obstore.put(store, "mem", pattern(17 * MIB), use_multipart=True, chunk_size=8 * MIB)
        assert get(store, "mem") == pattern(17 * MIB)
        assert (proxy.count("part"), proxy.count("complete"), proxy.count(path="vm1/mem$")) == (
            3,
            1,
            len(proxy.requests),
        )


def test_a_latency_is_added_to_each_request(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.latency_seconds = 0.02
    store = behind.store("vm1")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: get(store, "mem"), range(2)))
    assert get(store, "mem") == CONTENT
    assert all(each.ended is not None and each.ended - each.began >= 0.02 for each in proxy.requests)


def test_requests_at_the_same_time_are_one_round_trip(behind: Bucket, proxy: FaultProxy) -> None:
    store = behind.store("vm1")
    both = threading.Barrier(2)
    proxy.rule(Call(both.wait), times=2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: get(store, "mem"), range(2)))
    assert proxy.round_trips() == 1
    get(store, "mem")
    get(store, "mem")
    assert (proxy.round_trips(), len(proxy.requests)) == (3, 4)


def test_a_bandwidth_is_that_of_all_connections(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.bytes_per_second = 1e6
    store = behind.store("vm1")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: get(store, "mem"), range(2)))
    ends = [each.ended for each in proxy.requests if each.ended is not None]
    assert max(ends) - min(each.began for each in proxy.requests) >= 0.2


@pytest.mark.parametrize("status", [500, 503, 409])
def test_an_error_instead_of_an_answer(behind: Bucket, proxy: FaultProxy, status: int) -> None:
    rule = proxy.rule(Status(status, {"Retry-After": "1"}, b"<Error><Code>Broken</Code></Error>"), method="PUT", nth=2)
    store = behind.store("vm1", retry_config=ONCE)
    put(store, "one", b"1")
    with pytest.raises(exceptions.BaseError, match=f"{status}.*Broken|already exists"):
        put(store, "two", b"2")
    put(store, "three", b"3")
    assert (rule.matched, rule.met) == (3, 1)
    assert sorted(each["path"] for each in obstore.list(store).collect()) == ["mem", "one", "three"]


def test_an_error_on_head_has_no_body(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(Status(412, body=b"<Error/>"), method="HEAD")
    store = behind.store("vm1", retry_config=ONCE)
    with pytest.raises(exceptions.BaseError, match="412"):
        obstore.head(store, "mem")
    assert obstore.head(store, "mem")["size"] == 100_000


def test_an_error_after_the_work_was_done(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(Status(500, works=True), kind="create")
    store = behind.store("vm1", retry_config=ONCE)
    with pytest.raises(exceptions.GenericError):
        put(store, "claim", b"mine", mode="create")
    assert get(store, "claim") == b"mine"


def test_a_retried_create_finds_its_own_object(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(Status(500, works=True), kind="create")
    with pytest.raises(exceptions.AlreadyExistsError):
        put(behind.store("vm1"), "claim", b"mine", mode="create")
    assert [each.status for each in proxy.requests] == [500, 412]


@pytest.mark.parametrize(("fault", "exists"), [(Reset(), False), (LostAnswer(), True)], ids=["before", "after"])
def test_a_connection_is_reset(behind: Bucket, proxy: FaultProxy, s3: Bucket, fault: Any, exists: bool) -> None:
    proxy.rule(fault, kind="put", path="/vm1/one$")
    with pytest.raises(exceptions.GenericError):
        put(behind.store("vm1", retry_config=ONCE), "one", b"1")
    there = [each["path"] for each in obstore.list(s3.store("vm1")).collect()]
    assert there == (["mem", "one"] if exists else ["mem"])
    assert proxy.requests[0].status is None


def request(proxy: FaultProxy, bucket: Bucket, **headers: str) -> Any:
    """Ask for the object by a signed URL, and return the answer of the standard library's client."""
    connection = HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=60)
    signed = obstore.sign(bucket.store("vm1"), "GET", "mem", timedelta(hours=1))
    address = urlsplit(signed)
    connection.request("GET", f"{address.path}?{address.query}", headers=headers)
    return connection.getresponse()


def test_a_body_is_cut_short(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(CutBody(70_000))
    answer = request(proxy, behind)
    with pytest.raises(IncompleteRead) as raised:
        answer.read()
    assert raised.value.partial == CONTENT[:70_000]
    assert proxy.requests[0].answered_bytes == 70_000


def test_a_body_stalls_until_the_client_gives_up(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(Stall(70_000))
    answer = request(proxy, behind)
    assert answer.read(70_000) == CONTENT[:70_000]
    answer.fp.raw._sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        answer.read(1)
    answer.close()
    # The next connection is not held up by it.
    assert get(behind.store("vm1"), "mem") == CONTENT


def test_a_server_that_ignores_ranges(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(whole_body())
    with pytest.raises(exceptions.BaseError, match=r"[Rr]ange"):
        get(behind.store("vm1", retry_config=ONCE), "mem", range=(5, 10))
    [seen] = proxy.requests
    assert (seen.status, seen.kind) == (200, "range")


def test_a_server_without_conditional_requests(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(unconditional(), times=None)
    store = behind.store("vm1")
    etag = put(store, "claim", b"first", mode="create")
    put(store, "claim", b"second", mode="create")
    put(store, "claim", b"third", mode={"e_tag": etag})
    assert get(store, "claim", if_match=etag, range=(0, 5)) == b"third"


def test_headers_of_a_request_are_replaced(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(RequestHeaders({"Range": "bytes=0-4"}))
    with pytest.raises(exceptions.BaseError, match=r"[Rr]ange"):
        get(behind.store("vm1", retry_config=ONCE), "mem", range=(5, 10))


def test_headers_of_an_answer_are_replaced(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(AnswerHeaders({"Content-Range": "bytes 0-4/100000", "ETag": None}))
    with pytest.raises(exceptions.BaseError, match=r"[Rr]ange|ETag"):
        get(behind.store("vm1", retry_config=ONCE), "mem", range=(5, 10))


def test_an_answer_of_200_with_an_error_in_its_body(behind: Bucket, proxy: FaultProxy) -> None:
    proxy.rule(Status(200, body=b"<Error><Code>InternalError</Code></Error>"), kind="complete")
    with pytest.raises(exceptions.BaseError):
        obstore.put(behind.store("vm1", retry_config=ONCE), "big", bytes(9 * MIB), use_multipart=True)
    with pytest.raises(FileNotFoundError):
        get(behind.store("vm1"), "big")


CLIENT = """
import json, sys
import obstore, obstore.store
url, options = sys.argv[1], json.loads(sys.argv[2])
store = obstore.store.from_url(url, config=options, client_options={"allow_http": True})
sys.stdin.readline()
for number in range(5):
    obstore.put(store, str(number), b"x", use_multipart=False)
"""


def test_a_client_is_killed_before_a_request(behind: Bucket, proxy: FaultProxy, s3: Bucket) -> None:
    options = {key: value for key, value in behind.storage_options.items() if key != "aws_allow_http"}
    command = [sys.executable, "-c", CLIENT, f"{behind.url}/vm2", json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as client:
        proxy.rule(Kill(client.pid), kind="put", nth=3)
        client.communicate("go\n")
    assert client.returncode == -9
    assert [each["path"] for each in obstore.list(s3.store("vm2")).collect()] == ["0", "1"]


def test_a_server_that_is_gone(s3: Bucket, proxy: FaultProxy) -> None:
    with FaultProxy("http://127.0.0.1:1") as nowhere, pytest.raises(exceptions.GenericError):
        get(s3.at(nowhere.endpoint).store("vm1", retry_config=ONCE), "mem")


def test_rules_and_requests_are_forgotten(behind: Bucket, proxy: FaultProxy) -> None:
    store = behind.store("vm1")
    proxy.rule(Status(404), times=None)
    with pytest.raises(FileNotFoundError):
        get(store, "mem")
    proxy.clear()
    assert get(store, "mem") == CONTENT
    assert proxy.count() == 1
