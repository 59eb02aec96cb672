"""Locations of snapshots: paths, URLs, and `vmsnap.Location`."""

import os
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path, PurePosixPath

import pytest
import vmsnap
from commands import error_of, run
from remote import make
from vmsnap.location import is_url

URL = "s3://bucket/vm1"


def test_a_location_does_not_show_its_secrets() -> None:
    location = vmsnap.Location(URL, {"secret_access_key": "hidden", "region": "eu-west-1"}, "/cache", allow_http=True)
    assert "hidden" not in repr(location)
    assert repr(location) == (
        "Location('s3://bucket/vm1', storage_options={'secret_access_key': ..., 'region': ...}, cache='/cache', "
        "allow_http=True)"
    )
    assert str(location) == f"{location}" == URL
    with pytest.raises(vmsnap.VmsnapError) as caught:
        vmsnap.open(vmsnap.Location(URL, {"secret_access_key": "hidden", "no_such_option": "hidden"}))
    assert "no_such_option" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_location_is_a_value() -> None:
    options = {"region": "eu-west-1"}
    location = vmsnap.Location(URL, options, connections=3)
    options["region"] = "another"
    assert location == vmsnap.Location(URL, {"region": "eu-west-1"}, connections=3) != vmsnap.Location(URL)
    assert hash(location) == hash(pickle.loads(pickle.dumps(location)))
    assert pickle.loads(pickle.dumps(location)) == location
    with pytest.raises(FrozenInstanceError):
        location.url = "s3://bucket/vm2"  # type: ignore[misc]


def test_options_of_a_location_have_types() -> None:
    with pytest.raises(TypeError, match="must be a str, not PosixPath"):
        vmsnap.Location(Path("vm1"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="storage options must be str: 'token' is not") as caught:
        vmsnap.Location(URL, {"token": b"hidden"})  # type: ignore[dict-item]
    assert "hidden" not in str(caught.value)
    with pytest.raises(vmsnap.InvalidArgumentError, match="connections"):
        vmsnap.open(vmsnap.Location(URL, {"skip_signature": "true", "region": "x"}, connections=0))
    with pytest.raises(vmsnap.InvalidArgumentError, match="connections cannot be"):
        vmsnap.open(vmsnap.Location(URL, connections=1 << 80))


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "memory", "S3"])
def test_a_url_in_a_path_object_is_refused(scheme: str) -> None:
    for path in (Path(f"{scheme}://bucket/vm1"), PurePosixPath(f"{scheme}:/bucket/vm1")):
        with pytest.raises(vmsnap.InvalidArgumentError, match="pass the URL as a str"):
            vmsnap.open(path)
    with pytest.raises(vmsnap.InvalidArgumentError, match="pass the URL as a str"):
        vmsnap.create(Path(f"{scheme}://bucket/vm1"))


@pytest.mark.parametrize("name", ["a:b", "backup:/vm1", "s3", "vm1:2024-01-01T00:00", "s3:bucket", "x://y"])
@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
def test_local_names_with_colons_stay_local(
    name: str, kind: Callable[[str], str | bytes | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    make(Path(name), with_memory=False)
    reader = vmsnap.open(kind(name))
    assert reader.path == Path(reader.location) == tmp_path / name
    assert not is_url(name)


def test_bytes_name_a_local_file_even_if_they_look_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:/bucket").mkdir(parents=True)
    with vmsnap.create(b"s3://bucket/vm1") as writer:
        writer.write_fragment("clock", 1)
    assert vmsnap.open(b"s3://bucket/vm1").path == tmp_path / "s3:/bucket/vm1"


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    make(tmp_path / "vm 1", with_memory=False)
    reader = vmsnap.open(f"file://{tmp_path}/vm%201")
    assert reader.path == tmp_path / "vm 1"
    assert vmsnap.open(vmsnap.Location(str(tmp_path / "vm 1"), {"region": "x"})).path == tmp_path / "vm 1"
    assert run("cat", f"file://{tmp_path}/vm%201", "clock").stdout == b"\x0c"
    with pytest.raises(vmsnap.InvalidArgumentError, match="names a host"):
        vmsnap.open("file://host/vm1")


BAD_URLS = {
    "s3://bucket": "prefix",
    "s3:///vm1": "bucket",
    "s3://key:secret@bucket/vm1": "user",
    "s3://bucket/vm1?versionId=3": "query",
    "https://bucket.s3.amazonaws.com/vm1": "s3://",
    "s3a://bucket/vm1": "s3://",
}


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(vmsnap.InvalidArgumentError, match=BAD_URLS[url]) as caught:
        vmsnap.open(url)
    assert "secret" not in str(caught.value)


def test_what_needs_files_refuses_a_url(tmp_path: Path) -> None:
    for call in (
        lambda: vmsnap.SnapshotWriter(URL),
        lambda: vmsnap.SnapshotWriter.open(URL),
        lambda: vmsnap.seal(URL),
        lambda: vmsnap.pack(URL, tmp_path / "vm1.vmsnap.tar"),
        lambda: vmsnap.pack(tmp_path, URL),
        lambda: vmsnap.unpack(URL, tmp_path / "vm1"),
        lambda: vmsnap.push(URL, "s3://bucket/vm2"),
    ):
        with pytest.raises(vmsnap.InvalidArgumentError, match=r"object store: .* needs a snapshot at a local path"):
            call()
    with pytest.raises(vmsnap.InvalidArgumentError, match=r"is a local path: a push goes to an object store"):
        vmsnap.push(tmp_path, str(tmp_path / "vm1"))
    with pytest.raises(vmsnap.InvalidArgumentError, match="is a local path: a pull comes from an object store"):
        vmsnap.pull(str(tmp_path), tmp_path / "vm1")


def test_a_secret_on_the_command_line_is_refused() -> None:
    for name in ("aws_secret_access_key", "token", "account_key", "sas_token", "client_secret", "access_key"):
        done = run("ls", URL, "--storage-option", f"{name}=hidden", status=2)
        assert b"other users can see the command line" in done.stderr
        assert b"hidden" not in done.stderr
    done = run("ls", URL, "--storage-option", "region", status=2)
    assert b"NAME=VALUE" in done.stderr


def test_a_command_that_needs_a_url_refuses_a_path() -> None:
    assert b"is not a URL such as s3://bucket/vm1" in run("push", "vm1", "vm2", status=2).stderr
    assert b"is not a URL such as s3://bucket/vm1" in run("pull", "file:///vm1", "vm2", status=2).stderr


# Removal -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vm1", "vm1.vmsnap.tar"])
def test_a_local_snapshot_is_removed(name: str, tmp_path: Path, key: bytes) -> None:
    make(tmp_path / name, key, with_memory=False)
    make(tmp_path / "other", with_memory=False)
    vmsnap.remove(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == ["other"]
    with pytest.raises(FileNotFoundError):
        vmsnap.remove(tmp_path / name)


def test_only_a_snapshot_is_removed(tmp_path: Path) -> None:
    directory = tmp_path / "photos"
    directory.mkdir()
    (directory / "picture").write_bytes(b"x")
    with pytest.raises(vmsnap.InvalidArgumentError, match="may not be a snapshot"):
        vmsnap.remove(directory)
    with pytest.raises(vmsnap.CorruptSnapshotError):
        vmsnap.remove(directory / "picture")
    make(tmp_path / "vm1", with_memory=False)
    (tmp_path / "vm1/link").symlink_to("clock")
    with pytest.raises(vmsnap.CorruptSnapshotError, match="link"):
        vmsnap.remove(tmp_path / "vm1")
    assert (directory / "picture").exists()
    assert (tmp_path / "vm1/clock").exists()


def test_rm_asks(tmp_path: Path) -> None:
    make(tmp_path / "vm1", with_memory=False)
    done = run("rm", tmp_path / "vm1", status=1)
    assert "there is no terminal to ask on: --yes removes" in error_of(done)
    assert "3 fragments with" in error_of(done)
    run("rm", tmp_path / "vm1", "--yes")
    assert not (tmp_path / "vm1").exists()
    assert "No such file or directory" in error_of(run("rm", tmp_path / "vm1", "--yes", status=1))


# The cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_is_found_by_option_variable_and_default(tmp_path: Path) -> None:
    home, named = tmp_path / "home", tmp_path / "named"

    def directory(*options: str | Path, **variables: str) -> str:
        lines = run("cache", *options, env=variables).stdout.decode().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["directory", "blocks", "size", "limit"]
        return lines[0].split("\t")[1]

    assert directory(XDG_CACHE_HOME=str(home)) == str(home / "vmsnap")
    assert directory(XDG_CACHE_HOME="relative", HOME=str(home)) == str(home / ".cache/vmsnap")
    assert directory(XDG_CACHE_HOME=str(home), VMSNAP_CACHE=str(named)) == str(named)
    assert directory("--cache", tmp_path / "x", VMSNAP_CACHE=str(named)) == str(tmp_path / "x")
    assert not home.exists()


def test_a_cache_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = run("cache", "--cache", tmp_path, status=1)
    assert "other users may write to it" in error_of(done)
