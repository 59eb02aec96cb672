"""Images that are not raw: the command line tells them by how they begin, and stores them only where it is told to."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run
from support import pattern
from vmsnap.exchange.foreign import FORMATS, HEAD_BYTES, recognize

RAM = pattern(1 << 16, seed=9)


def number(magic: int, form: str = "<I") -> bytes:
    return struct.pack(form, magic)


# The first bytes of a file of each format, from its specification, and the name that the command line uses.
BEGINNINGS = {
    "LiME": (number(0x4C694D45) + number(1), "a LiME image"),
    "AVML": (number(0x4C4D5641) + number(2), "an AVML image"),
    "ELF core": (b"\x7fELF\x02\x01\x01" + bytes(9) + number(4, "<H"), "an ELF file"),
    "virsh save": (b"LibvirtQemudSave" + number(2), "saved by libvirt"),
    "virsh save, unfinished": (b"LibvirtQemudPart" + number(2), "saved by libvirt"),
    "virsh save of Xen": (b"libvirt-xml\n \0 \r" + number(2), "saved by libvirt"),
    "QEMU": (number(0x5145564D, ">I") + number(3, ">I"), "a migration stream of QEMU"),
    "xl save": (b"Xen saved domain, xl format\n \0 \r", "saved by Xen"),
    "libxl": (number(0x4C6962786C466D74, ">Q"), "saved by Xen"),
    "flattened kdump": (b"makedumpfile\0\0\0\0" + number(1, ">Q"), "a flattened dump of makedumpfile"),
    "kdump": (b"KDUMP   " + number(6), "a compressed dump of makedumpfile"),
    "diskdump": (b"DISKDUMP", "a compressed dump of makedumpfile"),
    "LKCD": (number(0xA8190173618F23ED, "<Q"), "an LKCD dump"),
    "LKCD of s390": (number(0xA8190173618F23ED, ">Q"), "an LKCD dump"),
    "LKCD, live": (number(0xA8190173618F23CD, "<Q"), "an LKCD dump"),
    "Windows, 32 bits": (b"PAGEDUMP", "a crash dump of Windows"),
    "Windows, 64 bits": (b"PAGEDU64", "a crash dump of Windows"),
    "minidump": (b"MDMP\x93\xa7", "a minidump"),
    "hiberfil.sys": (b"HIBR", "a hibernation file"),
    "hiberfil.sys of XP": (b"hibr", "a hibernation file"),
    "hiberfil.sys, woken": (b"wake", "a hibernation file"),
    "swsusp": (bytes(4086) + b"S1SUSPEND\0", "a hibernation image of Linux"),
    "VMware": (number(0xBED2BED2), "of VMware"),
    "VMware, old": (number(0xBED0BED0), "of VMware"),
    "VMware, partial": (number(0xBED3BED3), "of VMware"),
    "VMware, restored": (number(0xBAD1BAD1), "of VMware"),
    "VirtualBox": (b"\x7fVirtualBox SavedState V2.0\n\0\0\0", "a saved state of VirtualBox"),
    "qcow2": (number(0x514649FB, ">I") + number(3, ">I"), "a qcow2 image"),
    "QED": (b"QED\0", "a QED image"),
    "VMDK": (b"KDMV", "a VMDK image"),
    "VMDK descriptor": (b"# Disk DescriptorFile\nversion=1\n", "a VMDK image"),
    "VHDX": (b"vhdxfile", "a VHDX image"),
    "VHD": (b"conectix", "a VHD image"),
    "VDI": (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + number(0xBEDA107F), "a VDI image"),
    "EWF": (b"EVF\x09\x0d\x0a\xff\0", "an EWF"),
    "gzip": (gzip.compress(RAM), "compressed by gzip"),
    "zstd": (number(0xFD2FB528), "compressed by zstd"),
    "zstd, skippable": (number(0x184D2A50), "compressed by zstd"),
    "xz": (lzma.compress(RAM), "compressed by xz"),
    "bzip2": (bz2.compress(RAM), "compressed by bzip2"),
    "lz4": (number(0x184D2204), "compressed by lz4"),
    "lz4, legacy": (number(0x184C2102), "compressed by lz4"),
    "lzop": (b"\x89LZO\0\x0d\x0a\x1a\x0a", "compressed by lzop"),
    "snappy": (b"\xff\x06\x00\x00sNaPpY", "compressed by snappy"),
    "vmsnap": (b"pax_global_header".ljust(512, b"\0") + b"512 comment=vmsnap archive 1 ", "a snapshot in one file"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\x00", "a rar archive"),
    "age": (b"age-encryption.org/v1\n", "encrypted by age"),
    "age, armored": (b"-----BEGIN AGE ENCRYPTED FILE-----\n", "encrypted by age"),
}


def zipped() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("ram", RAM)
        return file.getvalue()


def tarred(form: int) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            archive.addfile(tarfile.TarInfo("ram"))
        return file.getvalue()


BEGINNINGS["zip"] = (zipped(), "a zip archive")
BEGINNINGS["tar of GNU"] = (tarred(tarfile.GNU_FORMAT), "a tar archive")
BEGINNINGS["tar of POSIX"] = (tarred(tarfile.PAX_FORMAT), "a tar archive")

# Bytes that raw memory may begin with.
RAW = {
    "noise": RAM,
    "zeros": bytes(1 << 16),
    "interrupt vectors": number(0xF000FF53) * 256,
    "code": b"\xfa\x31\xc0\x8e\xd8" + RAM,
    "a page that has a signature within": bytes(8) + b"\x7fELF" + RAM,
    "text": b"BZh is not enough, nor is Xen alone\n" * 200,
}


def test_each_format_is_told_and_none_is_left_out() -> None:
    found = {}
    for name, (head, told) in BEGINNINGS.items():
        foreign = recognize(head[:HEAD_BYTES])
        assert foreign, name
        assert told in foreign.name
        found[name] = foreign
    assert set(found.values()) == set(FORMATS)


@pytest.mark.parametrize("kind", RAW)
def test_what_may_be_memory_is_stored(tmp_path: Path, kind: str) -> None:
    (tmp_path / "ram").write_bytes(RAW[kind])
    run("dump", tmp_path / "ram", tmp_path / "vm")


@pytest.mark.parametrize("kind", ["LiME", "ELF core", "tar of GNU", "VDI"])
def test_a_foreign_image_is_stored_only_as_raw(tmp_path: Path, kind: str) -> None:
    head, told = BEGINNINGS[kind]
    image = tmp_path / "image"
    image.write_bytes(head + RAM)
    for command in (["dump", image], ["dump", image, "--range", "1000-2000@0"]):
        line = error_of(run(*command, tmp_path / "vm", status=1))
        assert line.startswith(f"vmsnap: error: {image} is ")
        assert told in line
        assert line.endswith("; --format raw stores it as it is")
        assert [each.name for each in tmp_path.iterdir()] == ["image"]
    run("dump", image, tmp_path / "vm1", "--format", "raw")
    assert vmsnap.open(tmp_path / "vm1").memory().read(0, len(head) + len(RAM)) == head + RAM


def test_the_segments_of_a_core_dump_are_stored_by_range(tmp_path: Path) -> None:
    # A header of 64 bytes and one LOAD segment at 0x1000 of the file, as readelf -lW shows it.
    segment = struct.pack("<IIQQQQQQ", 1, 6, 0x1000, 0, 0x100000, len(RAM), len(RAM), 0x1000)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0) + segment
    (tmp_path / "core").write_bytes(head.ljust(0x1000, b"\0") + RAM)
    if shutil.which("readelf"):
        listed = subprocess.run(["readelf", "-lW", str(tmp_path / "core")], capture_output=True, text=True, check=True)
        assert "LOAD           0x001000" in listed.stdout
    span = f"1000-{0x1000 + len(RAM):x}@100000"
    run("dump", tmp_path / "core", tmp_path / "vm", "--range", span, "--format", "raw")
    assert vmsnap.open(tmp_path / "vm").memory().read(0x100000, len(RAM)) == RAM


def test_a_fragment_of_a_snapshot_is_not_raw(tmp_path: Path, key: bytes) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "plain")
    writer.write_memory([vmsnap.GuestRegion(0x1000, RAM)])
    with writer.raw_fragment("ram") as fragment:
        fragment.write(RAM)
    inner = vmsnap.SnapshotWriter(tmp_path / "encrypted", key=key).add_namespace("ns")
    inner.write_memory([vmsnap.GuestRegion(0, RAM)])
    for path in ("plain/mem", "encrypted/ns/mem", "encrypted/ns/mem_metadata"):
        line = error_of(run("dump", tmp_path / path, tmp_path / "vm", status=1))
        assert "is a fragment of a snapshot" in line
        assert "vmsnap restore" in line
        assert not (tmp_path / "vm").exists()
    # A plain fragment that is not guest memory is a raw image itself.
    run("dump", tmp_path / "plain/ram", tmp_path / "vm")
    assert vmsnap.open(tmp_path / "vm").memory().read(0, len(RAM)) == RAM


def test_a_format_is_for_a_file(tmp_path: Path) -> None:
    done = run("dump", os.getpid(), tmp_path / "vm", "--format", "raw", status=2)
    assert b"--format applies to files, but SOURCE is a process" in done.stderr


def test_the_library_does_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x7fELF" + RAM)
    vmsnap.SnapshotWriter(tmp_path / "vm").write_memory([vmsnap.GuestRegion(0, tmp_path / "image")])
