"""The page on object stores: its blocks run against a server, and its tables are true."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from commands import run
from fault_proxy import FaultProxy
from object_stores import NO_OBSTORE, S3, Bucket
from pages import blocks, python, shell, text_of
from remote import at, environment, make, objects
from support import MIB, pattern

pytest.importorskip("obstore", reason=NO_OBSTORE)

PAGE = "docs/object-stores.md"


@pytest.fixture
def store(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket that the environment leads to; the cache is in a directory of the test."""
    for name, value in (environment(s3) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return s3


def of(bucket: Bucket, block: str) -> str:
    """Return a block with the name of the bucket that there is."""
    assert "s3://bucket/" in block
    return block.replace("s3://bucket/", f"{bucket.url}/")


def test_the_day_of_a_fleet(store: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, use, change = blocks(PAGE, "sh")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    identity = tmp_path / "settings/vmsnap/identity.txt"
    identity.parent.mkdir(parents=True)
    run("keygen", "-o", identity)
    recipient = run("keygen", "--recipient", identity).stdout.decode()
    for name in ("team.txt", "new-team.txt"):
        (tmp_path / name).write_text(recipient)
    ram = pattern(3 * MIB)
    (tmp_path / "ram.img").write_bytes(ram)
    make(tmp_path / "vm2", with_memory=False)
    shell(of(store, create), tmp_path)
    assert objects(store, "fleet/vm1") == {"enc_metadata", "mem", "mem_metadata", "vmsnap_manifest"}

    another = tmp_path / "another host"
    another.mkdir()
    shown = shell(of(store, use), another).stdout
    assert "mem_metadata" in shown
    assert f"\n00001000  {ram[4096:4104].hex(' ')}" in shown
    assert (another / "ram.img").read_bytes() == ram
    assert vmsnap.open(another / "vm2").seal_digest == vmsnap.open(tmp_path / "vm2").seal_digest

    abandoned = vmsnap.create(at(store, "fleet/abandoned"))
    printed = shell(of(store, change), tmp_path).stdout
    assert "\nok: 2 fragments checked, " in printed
    assert objects(store, "fleet/vm1") == set()
    # It is younger than two days.
    assert objects(store, "fleet/abandoned") == {".vmsnap-push"}
    abandoned.discard()


def test_the_python_of_the_page(store: Bucket, tmp_path: Path) -> None:
    identity = vmsnap.generate_identity()
    given = f"identities = {identity!r}\nrecipients = {vmsnap.recipients_of(identity)!r}\n"
    [block] = blocks(PAGE, "python")
    assert python(given + of(store, block), tmp_path) == f"12 {store.url}/fleet/vm3 None\n"
    assert vmsnap.open(tmp_path / "vm3", identities=identity).read_fragment("clock") == 12


def test_the_rules_of_the_page() -> None:
    lifecycle, policy = (json.loads(block) for block in blocks(PAGE, "json"))
    assert lifecycle["Rules"][0]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    actions = [each for statement in policy["Statement"] for each in [statement["Action"]]]
    assert actions == [["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"], "s3:ListBucket"]


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint, (S3.access_key, S3.secret_key)) as proxy:
        yield proxy


def test_the_requests_are_as_many_as_the_page_says(s3: Bucket, proxy: FaultProxy, tmp_path: Path, key: bytes) -> None:
    with vmsnap.create(tmp_path / "source", key=key) as writer:
        with writer.raw_fragment("large", chunk_size_bytes=65536) as fragment:
            fragment.write(pattern(17 * MIB))
        writer.write_fragment("clock", 12)
    behind = at(s3.at(proxy.endpoint))

    def counted(call: Any) -> dict[str, int]:
        proxy.clear()
        call()
        kinds = [request.kind for request in proxy.requests]
        return {kind: kinds.count(kind) for kind in kinds}

    reads = {"get", "range"}
    pushed = counted(lambda: vmsnap.push(tmp_path / "source", behind, key=key))
    # The claim is looked at before the manifest is written.
    assert pushed.pop("get") <= 3
    assert pushed == {"create": 2, "list": 1, "initiate": 1, "part": 3, "complete": 1, "put": 2, "delete": 1}
    opened = counted(lambda: vmsnap.open(behind, key=key))
    assert sum(opened.values()) == 2
    assert set(opened) <= reads
    pulled = counted(lambda: vmsnap.pull(behind, tmp_path / "copy", key=key))
    assert sum(pulled.values()) == 2 + 9 + 1
    assert set(pulled) <= reads
    verified = counted(lambda: vmsnap.verify(behind, key=key))
    assert verified.pop("list") == 1
    assert sum(verified.values()) == 2 + 9 + 1
    rekeyed = counted(lambda: vmsnap.rekey(behind, key=key, new_key=key))
    assert rekeyed.pop("put") == 1
    assert sum(rekeyed.values()) == 2
    assert counted(lambda: vmsnap.remove(behind))["list"] == 1
    assert not objects(s3)


def test_the_versions_are_those_of_the_tests() -> None:
    source = (Path(__file__).parent / "object_stores.py").read_text()
    tested = text_of(PAGE).rstrip().splitlines()[-1]
    assert tested == "Tested: versitygw 1.8.0, Azurite 3.35.0 and fake-gcs-server 1.56.1."
    assert '"v1.8.0"' in source
    assert '"v1.56.1"' in source
    packages = json.loads((Path(__file__).parent / "programs/azurite/package.json").read_text())
    assert packages["dependencies"]["azurite"] == "3.35.0"
