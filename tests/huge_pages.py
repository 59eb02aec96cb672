"""Huge pages of 2 MiB, which this system keeps for programs that ask for them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

SIZE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@contextmanager
def reserved(count: int) -> Iterator[None]:
    """Have a number of free huge pages; skips the test where there are too few. The system's number is put back.

    One test at a time, of all that run on this system, because the number is that of the whole system.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(open(_POOL / "nr_hugepages"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = _number("nr_hugepages")
            missing = count - _free()
            if missing > 0:
                (_POOL / "nr_hugepages").write_text(f"{before + missing}\n")
        except OSError as error:
            pytest.skip(f"there are no huge pages, and none can be reserved: {error}")
        try:
            if _free() < count:
                pytest.skip(f"there are no huge pages: {_free()} of {count} could be reserved")
            _try(count)
            yield
        finally:
            if missing > 0:
                (_POOL / "nr_hugepages").write_text(f"{before}\n")


def _try(count: int) -> None:
    """Use them, because a control group may forbid that: a guest would end by SIGBUS."""
    file = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.posix_fallocate(file, 0, count * SIZE)
    except OSError as error:
        pytest.skip(f"there are no huge pages that this process may use: {error}")
    finally:
        os.close(file)


def _number(name: str) -> int:
    return int((_POOL / name).read_text())


def _free() -> int:
    return _number("free_hugepages") - _number("resv_hugepages")
