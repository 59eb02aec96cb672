"""The public API: credentials as one object, and what shows of a snapshot without a key."""

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.cli
import vmsnap.qemu
from refusals import refused, row
from support import pattern, write

KEY = bytes(range(32))
CREDENTIALS = {"key", "recipients", "identities", "passphrase", "key_provider"}


def functions() -> Iterator[Callable[..., Any]]:
    for module in (vmsnap, vmsnap.qemu):
        for name in module.__all__:
            each = getattr(module, name)
            if callable(each) and not (inspect.isclass(each) and issubclass(each, Exception)):
                yield each
    yield from (vmsnap.SnapshotWriter.open, vmsnap.qemu.save_async, vmsnap.qemu.load_async)


def test_whatever_takes_credentials_takes_them_as_one_object() -> None:
    found = set()
    for each in functions():
        parameters = set(inspect.signature(each).parameters)
        if each not in (vmsnap.Keys, vmsnap.IdentityFile, vmsnap.KeyWrapping) and parameters & CREDENTIALS:
            assert "keys" in parameters, each
            found.add(each)
    assert {vmsnap.create, vmsnap.open, vmsnap.seal, vmsnap.verify, vmsnap.rekey} <= found


def test_the_first_parameter_is_a_location() -> None:
    for each in (vmsnap.create, vmsnap.open, vmsnap.SnapshotWriter, vmsnap.SnapshotReader, vmsnap.SnapshotWriter.open):
        assert next(iter(inspect.signature(each).parameters)) == "location"
    for each in (vmsnap.seal, vmsnap.verify, vmsnap.rekey, vmsnap.inspect, vmsnap.pack):
        assert next(iter(inspect.signature(each).parameters)) == "location"


def test_one_object_opens_what_it_wrote(tmp_path: Path) -> None:
    keys, others = vmsnap.Keys(key=KEY), vmsnap.Keys(passphrase=b"hunter2")
    location = tmp_path / "vm1"
    write(vmsnap.SnapshotWriter(location, keys=keys), "a", b"x")
    write(vmsnap.SnapshotWriter.open(location, keys=keys), "b", b"x")
    vmsnap.seal(location, keys=keys)
    assert vmsnap.verify(location, keys=keys).ok
    vmsnap.rekey(location, keys=keys, new_keys=others)
    assert vmsnap.open(location, keys=others).list_fragments() == ["a", "b"]
    with vmsnap.create(tmp_path / "vm2", keys=others) as snapshot:
        assert snapshot.encrypted


def test_recipients_from_an_iterator_serve_many_snapshots(tmp_path: Path) -> None:
    identity = vmsnap.generate_identity()
    keys = vmsnap.Keys(recipients=iter(vmsnap.recipients_of(identity)))
    opening = vmsnap.Keys(identities=iter([identity]))
    for name in ("vm1", "vm2"):
        vmsnap.create(tmp_path / name, keys=keys).commit()
        assert vmsnap.open(tmp_path / name, keys=opening).encrypted


@row("keys-and-arguments")
def test_keys_and_single_arguments_exclude_each_other(tmp_path: Path) -> None:
    keys, location = vmsnap.Keys(key=KEY), tmp_path / "vm1"
    vmsnap.SnapshotWriter(location, keys=keys)
    calls: list[Callable[[], object]] = [
        lambda: vmsnap.create(tmp_path / "vm2", keys=keys, key=KEY),
        lambda: vmsnap.create(tmp_path / "vm2", True, keys=keys),
        lambda: vmsnap.SnapshotWriter(tmp_path / "vm2", keys=keys, recipients=[]),
        lambda: vmsnap.open(location, keys=keys, identities=[]),
        lambda: vmsnap.open(location, True, keys=keys),
        lambda: vmsnap.rekey(location, keys=keys, new_keys=keys, new_key=KEY),
        lambda: vmsnap.qemu.save(tmp_path / "qmp", tmp_path / "vm2", keys=keys, passphrase="x"),
        lambda: vmsnap.qemu.load(location, ["qemu"], keys=keys, key=KEY),
    ]
    for call in calls:
        with refused("keys-and-arguments", "pass one or the other", tmp_path):
            call()
    with pytest.raises(TypeError, match=r"keys must be vmsnap\.Keys, not dict"):
        vmsnap.open(location, keys={"key": KEY})  # type: ignore[arg-type]


def test_keys_show_no_secret() -> None:
    secret = "hunter2"
    assert repr(vmsnap.Keys()) == "Keys()"
    assert repr(vmsnap.Keys(encrypt=True)) == "Keys(encrypt=True)"
    assert repr(vmsnap.Keys(recipients="age1x")) == "Keys(recipients=['age1x'])"
    keys = vmsnap.Keys(key=secret.encode() * 4, identities=[secret], passphrase=secret)
    assert repr(keys) == "Keys(key=..., identities=..., passphrase=...)"
    assert secret not in f"{keys} {keys!r}"


# Inspection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_snapshot_is_inspected_without_its_key(tmp_path: Path, key: bytes | None) -> None:
    location = tmp_path / "vm1"
    writer = vmsnap.SnapshotWriter(location, key=key)
    write(write(writer, "mem", pattern(100)).add_namespace("cpu"), "clock", b"12")
    found = vmsnap.inspect(str(location))
    assert (found.location, found.path) == (str(location), location)
    assert found.encrypted is (key is not None)
    assert found.key_wrapping == (vmsnap.KeyWrapping("raw-key", None, []) if key else None)
    assert not found.sealed
    assert found.namespaces == ("cpu",)
    assert [each.path for each in found.fragments] == ["mem", "cpu/clock"]
    for each in found.fragments:
        assert each.stored_size == (location / each.path).stat().st_size
        assert each.modified is not None
        assert each.modified.timestamp() == pytest.approx((location / each.path).stat().st_mtime)
        assert each.finished
    vmsnap.seal(location, key=key)
    assert vmsnap.inspect(location).sealed


def test_an_inspection_tells_which_fragments_were_never_finished(tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm1") as snapshot:
        write(snapshot, "whole", b"x")
        with snapshot.raw_fragment("half"):
            found = {each.path: each.finished for each in vmsnap.inspect(snapshot.location).fragments}
    assert found == {"half": False, "whole": True}


def test_handles_tell_their_location_as_a_text_and_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    staged = vmsnap.create("vm1")
    assert (staged.location, staged.path) == (str(tmp_path / "vm1"), tmp_path / "vm1")
    assert Path(staged.writer.location).parent == tmp_path
    staged.commit()
    reader = vmsnap.open("vm1")
    assert (reader.location, reader.path) == (str(tmp_path / "vm1"), tmp_path / "vm1")
    raw = os.fsencode(tmp_path) + b"/\xff"
    assert os.fsencode(vmsnap.SnapshotWriter(raw).location) == raw
    assert os.fsencode(vmsnap.inspect(raw).location) == raw


# The package ---------------------------------------------------------------------------------------------------------


def test_the_build_is_told() -> None:
    build = vmsnap.build_info()
    assert build.version == vmsnap.__version__
    assert set(build.features) <= {"age", "aws-lc", "c-lz4", "object-store"}


def test_the_command_line_does_not_use_the_extension_module() -> None:
    for file in Path(vmsnap.cli.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [f".{node.attr}"]
            assert not [name for name in names if "._vmsnap" in name], file.name


def test_the_package_neither_removes_nor_looks_into_the_directory_of_a_snapshot() -> None:
    """Everything else asks the core: a snapshot is not always a directory."""
    package = Path(vmsnap.__path__[0])
    for file in package.rglob("*.py"):
        assert not re.search(r"rmtree|lexists|_MANIFEST", file.read_text()), file


def test_empty_keys_never_mean_a_plain_snapshot(tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: vmsnap.create(tmp_path / "vm1", keys=vmsnap.Keys()),
        lambda: vmsnap.SnapshotWriter(tmp_path / "vm1", keys=vmsnap.Keys()),
        lambda: vmsnap.open(tmp_path / "vm1", keys=vmsnap.Keys()),
    ]
    for call in calls:
        with pytest.raises(vmsnap.InvalidArgumentError, match="keys= holds no key"):
            call()
    assert list(tmp_path.iterdir()) == []
