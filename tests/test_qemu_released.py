"""A save or a load that fails closes everything at once, with its keys: not only when Python collects garbage."""

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from guest import need_qemu, qemu_command, running
from vmsnap.migration import MigrationStream

# Of each of four kinds, for saves and for loads.
_FAILURES = 5

# Those that have a key, memory or a file.
_KINDS = (
    vmsnap.SnapshotReader,
    vmsnap.GuestMemory,
    vmsnap.SnapshotWriter,
    vmsnap.StagedSnapshot,
    MigrationStream,
    vmsnap.Keys,
)


@pytest.fixture(scope="module")
def qmp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a guest that is a firmware."""
    need_qemu()
    path = tmp_path_factory.mktemp("guest") / "qmp"
    with running(qemu_command(path, size="16M"), path):
        yield path


@pytest.fixture(scope="module")
def saved(qmp: Path) -> tuple[Path, bytes]:
    """An encrypted snapshot of it, and its key."""
    key = vmsnap.generate_key()
    vmsnap.qemu.save(qmp, qmp.parent / "saved", key=key)
    return qmp.parent / "saved", key


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing collects garbage."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class BrokenError(Exception):
    """An error of the caller."""


def broken(*_: object) -> None:
    raise BrokenError


def kept() -> Counter[str]:
    """Count the open descriptors, and the objects that must not outlive the call that made them."""
    found = Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, _KINDS))
    found["descriptor"] = len(os.listdir("/proc/self/fd"))
    return found


def keeps_nothing(call: Callable[[], object], expected: type[Exception]) -> None:
    def fail() -> None:
        try:
            call()
        except expected:
            return
        pytest.fail("it did not fail")

    fail()
    before = kept()
    for _ in range(_FAILURES):
        fail()
    assert kept() == before


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key": b"short"}, vmsnap.InvalidArgumentError),
        ({"progress": broken}, BrokenError),
        ({"while_paused": broken}, BrokenError),
        ({"live": True, "progress": broken}, BrokenError),
    ],
    ids=["refused", "while it reads", "while it stands still", "while it runs"],
)
def test_a_save_that_fails_keeps_nothing(
    qmp: Path, tmp_path: Path, key: bytes, options: dict[str, Any], expected: type[Exception]
) -> None:
    keeps_nothing(lambda: vmsnap.qemu.save(qmp, tmp_path / "vm1", **{"key": key, **options}), expected)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("changed", "options", "expected"),
    [
        ({"machine": "q35"}, {}, vmsnap.QemuError),
        ({}, {"progress": broken}, BrokenError),
        ({"memory": ""}, {"progress": broken}, BrokenError),
    ],
    ids=["another machine", "while it writes files", "while it sends"],
)
def test_a_load_that_fails_keeps_nothing(
    tmp_path: Path,
    saved: tuple[Path, bytes],
    changed: dict[str, Any],
    options: dict[str, Any],
    expected: type[Exception],
) -> None:
    location, key = saved
    command = qemu_command(tmp_path / "qmp", size="16M", **changed)
    keeps_nothing(lambda: vmsnap.qemu.load(location, command, key=key, **options), expected)


@pytest.mark.usefixtures("uncollected")
def test_a_load_whose_command_ends_keeps_nothing(saved: tuple[Path, bytes]) -> None:
    location, key = saved
    keeps_nothing(lambda: vmsnap.qemu.load(location, ["false"], key=key), vmsnap.QemuError)


@pytest.mark.usefixtures("uncollected")
def test_an_error_that_is_kept_keeps_no_snapshot_open(saved: tuple[Path, bytes]) -> None:
    """`asyncio.run` keeps the error of its task, until garbage is collected."""
    location, key = saved
    before = kept()
    with pytest.raises(vmsnap.QemuError) as caught:
        asyncio.run(vmsnap.qemu.load_async(location, ["false"], key=key))
    after = kept()
    assert "ended with status 1" in str(caught.value)
    for each in ("SnapshotReader", "GuestMemory", "descriptor"):
        assert after[each] == before[each]
