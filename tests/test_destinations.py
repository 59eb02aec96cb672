"""Where memory goes and comes from: nothing is written beside it or before it was checked, and no page is a signal."""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import vmsnap
from refusals import refused, row
from support import let_others_in, pattern, run_python_well, tree
from vmsnap import GuestRegion

PAGE = mmap.PAGESIZE
MIB = 1 << 20
PATTERN = bytes(2 * PAGE) + b"\7" * PAGE + bytes(PAGE)


@pytest.fixture
def memory(tmp_path: Path) -> vmsnap.GuestMemory:
    """One region of four pages, the third of which is not zero."""
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, PATTERN)])
    return vmsnap.open(tmp_path / "vm1").memory()


@contextmanager
def memfd(flags: int = 0) -> Iterator[int]:
    descriptor = os.memfd_create("guest", flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_file_open_for_appending_gets_the_memory_at_its_place(memory: vmsnap.GuestMemory, tmp_path: Path) -> None:
    with open(tmp_path / "new", "ab") as file:
        memory.restore([file])
    assert (tmp_path / "new").read_bytes() == PATTERN
    (tmp_path / "old").write_bytes(b"x" * 5 * PAGE)
    with open(tmp_path / "old", "r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
        memory.restore([GuestRegion(0, file, offset=PAGE)])
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND, "the caller's descriptor stays as it was"
    assert (tmp_path / "old").read_bytes() == b"x" * PAGE + PATTERN
    with memfd() as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        memory.restore([descriptor])
        assert os.pread(descriptor, 5 * PAGE, 0) == PATTERN


def test_a_file_open_for_direct_io_is_written_all_the_same(memory: vmsnap.GuestMemory, tmp_path: Path) -> None:
    with open(tmp_path / "ram", "w+b") as file:
        file.write(b"x" * 4 * PAGE)
        file.flush()
        try:
            direct = os.open(tmp_path / "ram", os.O_RDWR | os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no direct I/O")
        memory.restore([direct])
        os.close(direct)
    assert (tmp_path / "ram").read_bytes() == PATTERN


@pytest.mark.skipif(os.getuid() == 0 and not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_one_that_cannot_be_opened_anew_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give up being root")
    tmp_path.chmod(0o711)
    let_others_in(tmp_path)
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, PATTERN)])
    (tmp_path / "old").write_bytes(b"x" * 4 * PAGE)
    (tmp_path / "old").chmod(0o600)
    program = """
import os, sys, vmsnap
memory = vmsnap.open(sys.argv[1]).memory()
descriptor = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
os.setresuid(65534, 65534, 65534)
try:
    memory.restore([descriptor])
except vmsnap.InvalidArgumentError as error:
    print(error)
"""
    said = run_python_well(program, tmp_path / "vm1", tmp_path / "old")
    assert "open with O_APPEND" in said
    assert "open it without" in said
    assert (tmp_path / "old").read_bytes() == b"x" * 4 * PAGE


@row("destinations", "offset")
def test_a_part_of_a_file_has_the_size_of_the_region(memory: vmsnap.GuestMemory, tmp_path: Path) -> None:
    two = tmp_path / "two.img"
    two.write_bytes(b"A" * 2 * PAGE + b"B" * 2 * PAGE)
    for size in (2 * PAGE, 0, 5 * PAGE):
        with refused("destinations", f"has {size} bytes, but the region has {4 * PAGE}", tmp_path):
            memory.restore([GuestRegion(0, two, size=size)])
    for size in (-5, 1 << 70):
        with refused("offset", "size", tmp_path):
            memory.restore([GuestRegion(0, two, size=size)])
    with pytest.raises(TypeError):
        memory.restore([GuestRegion(0, two, size="x")])  # type: ignore[arg-type]
    for offset in (-1, 1 << 63, (1 << 64) - PAGE):
        with pytest.raises(vmsnap.InvalidArgumentError):
            memory.restore([GuestRegion(0, two, offset=offset)])
    assert two.read_bytes() == b"A" * 2 * PAGE + b"B" * 2 * PAGE


def test_a_part_of_a_buffer_is_counted_from_its_beginning(memory: vmsnap.GuestMemory, tmp_path: Path) -> None:
    buffer = bytearray(b"x" * 8 * PAGE)
    for offset, size in ((-4 * PAGE, None), (0, -4 * PAGE), (5 * PAGE, 4 * PAGE), (0, 1 << 70), (0, None)):
        with pytest.raises(vmsnap.InvalidArgumentError):
            memory.restore([GuestRegion(0, buffer, offset=offset, size=size)])
    assert buffer == b"x" * 8 * PAGE
    memory.restore([GuestRegion(0, buffer, offset=4 * PAGE)])
    assert buffer == b"x" * 4 * PAGE + PATTERN


def test_two_mappings_of_one_file_are_one_destination(tmp_path: Path) -> None:
    regions = [GuestRegion(0, PATTERN), GuestRegion(1 << 20, PATTERN)]
    vmsnap.SnapshotWriter(tmp_path / "vm2").write_memory(regions)
    both = vmsnap.open(tmp_path / "vm2").memory()
    with memfd() as descriptor:
        os.pwrite(descriptor, b"x" * 8 * PAGE, 0)
        one, other, third = (mmap.mmap(descriptor, 4 * PAGE, offset=at) for at in (0, 0, 4 * PAGE))
        with_file = [GuestRegion(1 << 20, descriptor), GuestRegion(1 << 20, descriptor, PAGE)]
        for pair in ([one, other], [one, with_file[0]], [other, with_file[1]]):
            with pytest.raises(vmsnap.InvalidArgumentError, match="regions 0 and 1 overlap"):
                both.restore(pair)
        assert os.pread(descriptor, 8 * PAGE, 0) == b"x" * 8 * PAGE
        both.restore([other, third])
        assert os.pread(descriptor, 8 * PAGE, 0) == PATTERN * 2


def test_a_destination_on_a_full_file_system_is_an_error_and_no_signal(
    memory: vmsnap.GuestMemory, small_disk: Path
) -> None:
    with open(small_disk / "ram", "w+b") as file:
        file.truncate(4 * PAGE)
        mapping = mmap.mmap(file.fileno(), 4 * PAGE)
        with (small_disk / "full").open("wb", buffering=0) as full:
            while os.statvfs(small_disk).f_bavail:
                full.write(b"x" * PAGE)
        with pytest.raises(OSError, match=f"guest-physical address {2 * PAGE:#x} cannot be written") as caught:
            memory.restore([mapping])
        assert caught.value.errno == errno.ENOSPC


def protect(mapping: mmap.mmap, offset: int, length: int, protection: int) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + offset
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), protection) == 0


def test_a_destination_that_is_not_to_be_written_to_is_an_error_and_no_signal(memory: vmsnap.GuestMemory) -> None:
    mapping = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    protect(mapping, 2 * PAGE, PAGE, mmap.PROT_READ)
    with pytest.raises(OSError, match=f"guest-physical address {2 * PAGE:#x} cannot be written") as caught:
        memory.restore([mapping])
    assert caught.value.errno == errno.EFAULT


def test_a_destination_whose_file_was_cut_is_an_error_and_no_signal(memory: vmsnap.GuestMemory) -> None:
    with memfd() as descriptor:
        os.truncate(descriptor, 4 * PAGE)
        mapping = mmap.mmap(descriptor, 4 * PAGE)
        os.truncate(descriptor, PAGE)
        with pytest.raises(OSError, match="guest-physical address") as caught:
            memory.restore([mapping])
        assert caught.value.errno == errno.EFAULT


def cut_mapping(descriptor: int, length: int, rest: int) -> mmap.mmap:
    """Map a file that is truncated afterwards: touching the missing pages raises SIGBUS."""
    os.truncate(descriptor, length)
    mapping = mmap.mmap(descriptor, length)
    mapping[:PAGE] = b"\7" * PAGE
    os.truncate(descriptor, rest)
    return mapping


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_source_whose_file_was_cut_is_an_error_and_no_signal(tmp_path: Path, key: bytes, encrypt: bool) -> None:
    with memfd() as descriptor:
        mapping = cut_mapping(descriptor, MIB, PAGE)
        before = tree(tmp_path)
        with (
            pytest.raises(OSError, match=f"guest-physical address {0x10000 + PAGE:#x} cannot be read") as caught,
            vmsnap.create(tmp_path / "vm1", key=key if encrypt else None) as snap,
        ):
            snap.write_memory([GuestRegion(0x10000, mapping)])
        assert caught.value.errno == errno.EFAULT
        assert tree(tmp_path) == before
        with vmsnap.create(tmp_path / "vm2", key=key if encrypt else None) as snap:
            report = snap.write_memory([GuestRegion(0x10000, mapping)], on_error="zero")
        assert report.unreadable == [range(0x10000 + PAGE, 0x10000 + MIB)]
        assert vmsnap.open(tmp_path / "vm2", key=key if encrypt else None).memory()[0x10000:0x12000] == (
            b"\7" * PAGE + bytes(PAGE)
        )


def test_pages_of_a_source_that_are_not_to_be_read_are_told(tmp_path: Path) -> None:
    mapping = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping[:] = b"\7" * 4 * PAGE
    protect(mapping, PAGE, PAGE, 0)
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    with pytest.raises(OSError, match=f"guest-physical address {PAGE:#x} cannot be read"):
        writer.write_memory([GuestRegion(0, mapping)])
    assert writer.write_memory([GuestRegion(0, mapping)], on_error="zero").unreadable == [range(PAGE, 2 * PAGE)]
    assert vmsnap.open(tmp_path / "vm1").memory()[0 : 3 * PAGE] == b"\7" * PAGE + bytes(PAGE) + b"\7" * PAGE


@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("length", [8, 3 * PAGE, 40 * MIB])
def test_a_fragment_of_a_buffer_whose_file_was_cut_is_an_error_and_no_signal(
    tmp_path: Path, key: bytes, encrypt: bool, length: int
) -> None:
    with memfd() as descriptor:
        mapping = cut_mapping(descriptor, 64 * MIB, PAGE)
        view = memoryview(mapping)[PAGE : PAGE + length]
        place = tmp_path / "vm1"
        writer = vmsnap.SnapshotWriter(place, key=key if encrypt else None)
        fragment = writer.raw_fragment("x")
        with pytest.raises(OSError, match="Bad address") as caught:
            fragment.write(view)
        assert caught.value.errno == errno.EFAULT
        fragment.discard()
        with writer.raw_fragment("y", chunk_size_bytes=65536) as fragment:
            fragment.write(b"y" * length)
        with vmsnap.open(place, key=key if encrypt else None).raw_fragment("y") as reader:
            with pytest.raises(OSError, match="Bad address") as caught:
                reader.readinto(view)
            assert caught.value.errno == errno.EFAULT
            assert reader.read(4) == b"yyyy", "the reader goes on working, from where it was"


def test_values_and_keys_of_a_mapping_whose_file_was_cut_are_errors_and_no_signals(tmp_path: Path) -> None:
    with memfd() as descriptor:
        mapping = cut_mapping(descriptor, MIB, PAGE)
        writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
        for value in (mapping, memoryview(mapping), {"deep": [memoryview(mapping)[8192:]]}):
            with pytest.raises(OSError, match="Bad address"):
                writer.write_fragment("v", value)
        with pytest.raises(OSError, match="Bad address"):
            vmsnap.SnapshotWriter(tmp_path / "vm2", key=memoryview(mapping)[8192:8224])
        assert sorted(os.listdir(tmp_path / "vm1")) == []
        writer.write_fragment("v", memoryview(mapping)[:PAGE])
        assert vmsnap.open(tmp_path / "vm1").read_fragment("v") == b"\7" * PAGE


def test_the_address_of_a_destination_that_cannot_be_written_is_that_of_its_page(tmp_path: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, pattern(MIB))])
    mapping = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    protect(mapping, 16 * PAGE, PAGE, mmap.PROT_READ)
    with pytest.raises(OSError, match=f"guest-physical address {16 * PAGE:#x} cannot be written"):
        vmsnap.open(tmp_path / "vm1").memory().restore([mapping])


def huge_memfd(size: int) -> int:
    try:
        descriptor = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        os.truncate(descriptor, size)
    except OSError as error:
        pytest.skip(f"there are no huge pages: {error}")
    return descriptor


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have so many huge pages of 2 MiB, of which none is used."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    try:
        before = setting.read_text()
        setting.write_text(str(count))
    except OSError as error:
        pytest.skip(f"huge pages cannot be set aside: {error}")
    try:
        if int(setting.read_text()) < count:
            pytest.skip("no memory for huge pages")
        yield
    finally:
        setting.write_text(before)


def test_memory_in_huge_pages_is_stored_and_restored(tmp_path: Path) -> None:
    with huge_pages(6):
        pattern = bytearray(6 * MIB)
        for page in range(0, 1536, 5):
            pattern[page * PAGE : (page + 1) * PAGE] = bytes([page % 250 + 1]) * PAGE
        pattern[2 * MIB : 4 * MIB] = bytes(2 * MIB)
        writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
        source = huge_memfd(6 * MIB)
        with mmap.mmap(source, 6 * MIB) as mapping:
            mapping[:] = pattern
        assert writer.write_memory([GuestRegion(0, source)]).data_bytes == 4096 * sum(
            any(pattern[at : at + PAGE]) for at in range(0, len(pattern), PAGE)
        )
        os.close(source)
        memory = vmsnap.open(tmp_path / "vm1").memory()
        target = huge_memfd(6 * MIB)
        with mmap.mmap(target, 6 * MIB) as mapping:
            mapping[:] = b"x" * 6 * MIB
            memory.restore([target])
            assert os.fstat(target).st_blocks * 512 < 6 * MIB, "zeros do not have pages"
            assert mapping[:] == pattern
        os.close(target)


def test_a_part_of_a_file_of_huge_pages_is_restored_to_and_the_rest_stays(
    memory: vmsnap.GuestMemory, tmp_path: Path
) -> None:
    with huge_pages(2):
        target = huge_memfd(4 * MIB)
        with mmap.mmap(target, 4 * MIB) as mapping:
            mapping[:] = b"x" * 4 * MIB
            memory.restore([GuestRegion(0, target, offset=2 * MIB - PAGE)])
            assert mapping[: 2 * MIB - PAGE] == b"x" * (2 * MIB - PAGE)
            assert mapping[2 * MIB - PAGE : 2 * MIB + 3 * PAGE] == PATTERN
            assert mapping[2 * MIB + 3 * PAGE :] == b"x" * (2 * MIB - 3 * PAGE)
        os.close(target)


def test_a_file_of_huge_pages_that_is_too_short_is_refused_as_it_was(memory: vmsnap.GuestMemory) -> None:
    with huge_pages(1):
        target = huge_memfd(0)
        with pytest.raises(vmsnap.InvalidArgumentError, match="whole pages of 2097152 bytes"):
            memory.restore([target])
        os.truncate(target, 2 * MIB)
        with pytest.raises(vmsnap.InvalidArgumentError, match="has 2097152 bytes"):
            memory.restore([target])
        memory.restore([GuestRegion(0, target, offset=0)])
        with mmap.mmap(target, 2 * MIB) as mapping:
            assert mapping[: 4 * PAGE] == PATTERN
        os.close(target)


def test_huge_pages_that_there_are_none_of_are_an_error_and_no_signal(tmp_path: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, b"\7" * 4 * MIB)])
    memory = vmsnap.open(tmp_path / "vm1").memory()
    with huge_pages(1):
        target = huge_memfd(4 * MIB)
        with pytest.raises(OSError, match="cannot be written"):
            memory.restore([target])
        os.close(target)


def test_thousands_of_regions_of_one_file_take_one_descriptor(tmp_path: Path) -> None:
    count = 3000
    regions = [GuestRegion(number * 2 * PAGE, b"\7" * PAGE) for number in range(count)]
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory(regions)
    memory = vmsnap.open(tmp_path / "vm1").memory()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        with open(tmp_path / "ram", "w+b") as file:
            memory.restore([GuestRegion(number * 2 * PAGE, file, offset=number * 2 * PAGE) for number in range(count)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (tmp_path / "ram").read_bytes() + bytes(PAGE) == (b"\7" * PAGE + bytes(PAGE)) * count


def test_anonymous_memory_gets_huge_pages_where_it_is_asked_for_and_is_full(tmp_path: Path) -> None:
    content = pattern(9 * MIB)
    full = content + bytes(2 * MIB) + content[:PAGE] + bytes(2 * MIB)
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, full)])
    memory = vmsnap.open(tmp_path / "vm1").memory()
    sizes = []
    for huge_pages in (False, True):
        with mmap.mmap(-1, len(full), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
            memory.restore([mapping], huge_pages=huge_pages)
            assert mapping[:] == full
            flags = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")]
            sizes.append(sum("hg" in line.split() for line in flags))
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system has no transparent huge pages")
    assert sizes[0] < sizes[1]
