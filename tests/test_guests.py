"""The guests and QEMUs that other tests use work as they say."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from guest import ask, qemu_command, running
from qemus import Qemu
from support import MIB
from toy_guest import Toy


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("memory", ["", "memory-backend-memfd,id=mem,size=256M,share=on"])
def test_the_toy_guest_counts(tmp_path: Path, qemu: Qemu, machine: str, memory: str) -> None:
    toy = Toy(tmp_path)
    qmp = tmp_path / "qmp"
    with running(qemu_command(qmp, *toy.options, machine=machine, memory=memory, qemu=qemu), qmp):
        assert toy.ticks(5) == [1, 2, 3, 4, 5]
        version = ask(qmp, "query-version")["qemu"]
        assert (version["major"], version["minor"]) == qemu.number
    toy.close()


def test_a_changed_word_is_told_by_the_toy_guest(tmp_path: Path, qemu: Qemu) -> None:
    """In the memory that it does not rewrite."""
    toy, qmp, ram = Toy(tmp_path), tmp_path / "qmp", tmp_path / "ram"
    memory = f"memory-backend-file,id=mem,size=256M,share=on,mem-path={ram}"
    with running(qemu_command(qmp, *toy.options, memory=memory, qemu=qemu), qmp):
        toy.ticks(2)
        with open(ram, "r+b") as file:
            file.seek(3 * MIB + 4)
            file.write(b"none")
        with pytest.raises(AssertionError, match=r"other memory than it wrote: b'bad [0-9a-f]{8} 00300000'"):
            toy.ticks(1 << 16)
    toy.close()


def test_a_guest_on_huge_pages(
    tmp_path: Path, qemu: Qemu, huge_pages: Callable[[int], AbstractContextManager[None]]
) -> None:
    toy, qmp = Toy(tmp_path), tmp_path / "qmp"
    memory = "memory-backend-memfd,id=mem,size=64M,share=on,hugetlb=on,hugetlbsize=2M,prealloc=on"
    with huge_pages(32), running(qemu_command(qmp, *toy.options, memory=memory, size="64M", qemu=qemu), qmp):
        toy.ticks(5)
    toy.close()
