"""Errors of snapshots in object stores, and of their URLs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsnap
from fault_proxy import FaultProxy
from http_faults import Status
from object_stores import S3, Bucket
from refusals import refused, row
from remote import at, make
from support import Place, pattern


@pytest.fixture
def small(folder: Path, key: bytes) -> Place:
    """A small snapshot on a local disk."""
    return make(folder / "vm1", key, with_memory=False)


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[FaultProxy]:
    """A proxy before a server of S3's protocol."""
    with FaultProxy(s3.endpoint, (S3.access_key, S3.secret_key)) as proxy:
        yield proxy


def files_of(bucket: Bucket) -> Path:
    """Return the directory that is a bucket."""
    return bucket.server.directory / "buckets" / bucket.name


@row("url-as-path", "url-malformed")
def test_a_url_that_cannot_be_one(folder: Path) -> None:
    with refused("url-as-path", "pass the URL as a str", folder):
        vmsnap.open(Path("s3://bucket/vm1"))
    for url in (
        "s3://bucket",
        "s3://user:secret@bucket/vm1",
        "gs://bucket/vm1?x=1",
        "az://c/../vm1",
        "https://host/vm1",
    ):
        with refused("url-malformed", "URL|scheme", folder):
            vmsnap.create(url)


@row("url-for-files")
def test_what_needs_files_takes_no_url(folder: Path) -> None:
    for call in (
        lambda: vmsnap.SnapshotWriter("s3://bucket/vm1"),
        lambda: vmsnap.seal("s3://bucket/vm1"),
        lambda: vmsnap.pack("s3://bucket/vm1", folder / "vm1.vmsnap.tar"),
        lambda: vmsnap.unpack("s3://bucket/vm1.vmsnap.tar", folder / "vm1"),
        lambda: vmsnap.push("s3://bucket/vm1", "s3://bucket/vm2"),
    ):
        with refused("url-for-files", "needs a snapshot at a local path", folder):
            call()


@row("store-option", "store-without-tls")
def test_options_that_are_not_right(s3: Bucket, folder: Path) -> None:
    for options in ({"no_such_option": "x"}, {"endpoint": "localhost"}, {"bucket": "another"}):
        with refused("store-option", "option|endpoint", folder):
            vmsnap.open(vmsnap.Location("s3://bucket/vm1", options))
    for connections in (0, 257):
        with refused("store-option", "connections", folder):
            vmsnap.open(vmsnap.Location("s3://bucket/vm1", s3.storage_options, connections=connections))
    with refused("store-without-tls", "has no TLS.*allow_http", folder):
        vmsnap.open(vmsnap.Location("s3://bucket/vm1", {"endpoint": "http://192.0.2.1:9"}))


@row("store-credentials")
def test_credentials_that_are_missing_refused_or_expired(
    s3: Bucket, proxy: FaultProxy, small: Place, folder: Path
) -> None:
    options = {"endpoint": s3.endpoint, "region": S3.region}
    with refused("store-credentials", "no credentials.*AWS_ACCESS_KEY_ID.*export-credentials", folder):
        vmsnap.open(vmsnap.Location(f"{s3.url}/vm1", options))
    options = s3.storage_options | {"aws_secret_access_key": "another"}
    with refused("store-credentials", "refused access.*AWS_ACCESS_KEY_ID", folder):
        vmsnap.push(small.location, vmsnap.Location(f"{s3.url}/vm1", options), key=small.key)
    proxy.rule(Status(400, body=b"<Error><Code>ExpiredToken</Code></Error>"), times=None)
    with refused("store-credentials", "have expired.*renew them", folder):
        vmsnap.create(at(s3.at(proxy.endpoint)))


@row("store-bucket", "store-region")
def test_a_bucket_that_is_elsewhere(s3: Bucket, proxy: FaultProxy, small: Place, folder: Path) -> None:
    location = vmsnap.Location("s3://no-such-bucket/vm1", s3.storage_options)
    for call in (lambda: vmsnap.open(location), lambda: vmsnap.push(small.location, location, key=small.key)):
        with refused("store-bucket", "there is no bucket no-such-bucket", folder):
            call()
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"
    proxy.rule(Status(400, body=body), times=None)
    with refused("store-region", "in the region eu-west-3, not in us-east-1; set AWS_REGION=eu-west-3", folder):
        vmsnap.open(at(s3.at(proxy.endpoint)))


@row("store-absent", "store-occupied", "store-claimed")
def test_a_place_with_nothing_something_or_somebody(s3: Bucket, small: Place, folder: Path) -> None:
    with refused("store-absent", "vm1", folder):
        vmsnap.open(at(s3))
    with vmsnap.create(at(s3, "begun")):
        with refused("store-absent", "begun", folder):
            vmsnap.open(at(s3, "begun"))
        with refused("store-claimed", "writes a snapshot there since .* take_over", folder):
            vmsnap.push(small.location, at(s3, "begun"), key=small.key)
    (files_of(s3) / "vm2").mkdir()
    (files_of(s3) / "vm2/notes").write_bytes(b"mine")
    for path in ("begun", "vm2"):
        with refused("store-occupied", "exists|not empty", folder):
            vmsnap.push(small.location, at(s3, path), key=small.key)
        with refused("store-occupied", "exists|not empty", folder):
            vmsnap.create(at(s3, path))


@row("store-changed")
def test_an_object_that_changes(s3: Bucket, folder: Path) -> None:
    content = pattern(100_000)
    with vmsnap.create(folder / "vm1") as writer:
        for name in ("shorter", "gone"):
            with writer.raw_fragment(name) as fragment:
                fragment.write(content)
    vmsnap.push(folder / "vm1", at(s3))
    reader = vmsnap.open(at(s3))
    with vmsnap.create(folder / "short") as writer, writer.raw_fragment("shorter") as fragment:
        fragment.write(content[:-1])
    vmsnap.push(folder / "short", at(s3, "short"))
    (files_of(s3) / "short/shorter").rename(files_of(s3) / "vm1/shorter")
    (files_of(s3) / "vm1/gone").unlink()
    with refused("store-changed", "shorter of .*99999 bytes|99999", folder):
        reader.raw_fragment("shorter").read()
    with refused("store-changed", "missing|removed", folder):
        reader.raw_fragment("gone").read()


@row("store-silent")
def test_a_store_that_fails_again_and_again(s3: Bucket, proxy: FaultProxy, folder: Path) -> None:
    proxy.rule(Status(503, body=b"<Error><Code>SlowDown</Code></Error>"), times=None)
    with refused("store-silent", "the server failed .503 SlowDown.*try again later", folder):
        vmsnap.open(at(s3.at(proxy.endpoint)))


@row("store-name")
def test_a_name_that_no_store_has(s3: Bucket, folder: Path) -> None:
    with vmsnap.create(folder / "vm1") as writer:
        writer.write_fragment("new\nline", 1)
    with refused("store-name", "control", folder):
        vmsnap.push(folder / "vm1", at(s3))


@row("cache-of-others", "remove-other")
def test_directories_of_others(s3: Bucket, small: Place, folder: Path, tmp_path: Path) -> None:
    vmsnap.push(small.location, at(s3), key=small.key)
    vmsnap.push(small.location, at(s3, "vm1/inner"), key=small.key)
    with refused("remove-other", "another snapshot below it", folder):
        vmsnap.remove(at(s3))
    (folder / "photos").mkdir()
    with refused("remove-other", "may not be a snapshot", folder):
        vmsnap.remove(folder / "photos")
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with refused("cache-of-others", "0700", folder):
        vmsnap.open(at(s3, cache=cache), key=small.key).read_fragment("clock")
