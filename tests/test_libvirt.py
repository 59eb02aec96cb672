"""Guests that libvirt saved: its own files, and files made by its rules."""

import hashlib
import os
import random
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run
from guest import need_qemu, qemu_command, running
from migration_files import COOKIE, NUMBERS, XML, header, migrate, saved_image
from refusals import refused, row
from support import MIB
from toy_guest import Toy
from virsh import NAME, TWO_NODES, session
from vmsnap.exchange.domain import Domain
from vmsnap.exchange.libvirt import SaveImage
from vmsnap.exchange.source import opened

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The migration stream of a guest that was saved without its firmware having begun."""
    need_qemu()
    folder = tmp_path_factory.mktemp("qemu")
    with running(qemu_command(folder / "qmp", "-S", machine="pc", memory="", size="16M"), folder / "qmp"):
        return migrate(folder / "qmp", folder / "stream").read_bytes()


def memory_of(location: Path, key: bytes | None = None) -> str:
    memory = vmsnap.open(location, key=key).memory()
    digest = hashlib.sha256()
    for region in memory.regions:
        digest.update(struct.pack("<2Q", region.start, region.stop))
        digest.update(memory.read(region.start, len(region)))
    return digest.hexdigest()


def content(location: Path, name: str, key: bytes | None = None) -> bytes:
    with vmsnap.open(location, key=key).raw_fragment(name) as fragment:
        return fragment.read()


# Files made by the rules of libvirt -------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", NUMBERS)
def test_each_compression_gives_the_same_guest(folder: Path, tmp_path: Path, stream: bytes, compression: str) -> None:
    if compression != "raw" and shutil.which(compression) is None:
        pytest.skip(f"there is no {compression}: apt install bzip2 lzop xz-utils zstd")
    (tmp_path / "plain").write_bytes(stream)
    (tmp_path / "saved").write_bytes(saved_image(stream, compression=compression))
    plain = vmsnap.import_file(tmp_path / "plain", folder / "plain")
    report = vmsnap.import_file(tmp_path / "saved", folder / "saved")
    assert (plain.format, plain.compression) == ("qemu", None)
    assert (report.format, report.compression) == ("libvirt", None if compression == "raw" else compression)
    assert report.device_state_bytes == plain.device_state_bytes
    assert memory_of(folder / "saved") == memory_of(folder / "plain")
    for name in ("device_state", "mem"):
        with (
            vmsnap.open(folder / "saved").raw_fragment(name) as one,
            vmsnap.open(folder / "plain").raw_fragment(name) as two,
        ):
            assert one.read() == two.read()
    assert vmsnap.verify(folder / "saved").ok


@pytest.mark.parametrize(("running", "cookie", "order"), [(True, COOKIE, "<"), (False, b"", ">")])
def test_what_libvirt_stores_is_given_back(
    folder: Path, tmp_path: Path, stream: bytes, running: bool, cookie: bytes, order: str
) -> None:
    image = saved_image(stream, running=running, cookie=cookie, order=order)
    (tmp_path / "saved").write_bytes(image)
    report = vmsnap.import_file(tmp_path / "saved", folder / "vm", key=KEY, compress="lz4")
    assert report.machine.state == ("running" if running else "paused")
    assert (report.machine.target, report.machine.qemu_version) == ("x86_64", "")
    back = tmp_path / "back"
    told = vmsnap.export_file(folder / "vm", back, "libvirt", key=KEY)
    assert told.written_bytes == back.stat().st_size
    assert stat.S_IMODE(back.stat().st_mode) == 0o600
    front = saved_image(b"", running=running, cookie=cookie)
    with back.open("rb") as file:
        assert file.read(len(front)) == front
    vmsnap.import_file(back, folder / "again")
    assert memory_of(folder / "again") == memory_of(folder / "vm", KEY)
    assert content(folder / "again", "device_state") == content(folder / "vm", "device_state", KEY)


def test_an_image_of_version_1_is_not_compressed(folder: Path, tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "saved").write_bytes(header(version=1, size=len(XML) + 1, compression=3) + XML + b"\0" + stream)
    assert vmsnap.import_file(tmp_path / "saved", folder / "vm").compression is None


DAMAGED = {
    "is incomplete: virsh save did not finish it": header(magic=b"LibvirtQemudPart"),
    "is truncated: it ends within the header": header()[:50],
    "is truncated: it ends within the XML": header(size=100) + XML[:50],
    "in version 0, which is unknown": header(version=0, size=9),
    "in version 3, which is unknown": header(version=3, size=9, order=">"),
    "sparse format of libvirt": header(size=9, compression=6),
    "has compression 7 of libvirt, which is unknown": header(size=9, compression=7),
    "its header has 0 bytes of XML": header(),
    "its header has 4294967295 bytes of XML": header(size=0xFFFFFFFF),
    "with a cookie at 10": header(size=9, cookie_offset=10) + bytes(9),
    "its XML does not end in a NUL": header(size=9) + b"<domain/>",
    "its XML is empty": header(size=9) + bytes(9),
    "its cookie does not end in a NUL": header(size=12, cookie_offset=10) + b"<domain/>\0xx",
    "is not well-formed": header(size=21) + b"<domain type='kvm'>x\0",
    "the XML does not describe a domain": header(size=9) + b"<other/>\0",
    "has a document type": header(size=200) + b'<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>'.ljust(200, b"\0"),
    "does not describe a domain of QEMU": header(size=50) + b"<domain type='xen'/>".ljust(50, b"\0"),
    "stream": header(size=50) + b"<domain type='kvm'/>".ljust(50, b"\0"),
}


@pytest.mark.parametrize("message", DAMAGED)
@row("import-damaged")
def test_a_damaged_image_is_refused(folder: Path, tmp_path: Path, message: str) -> None:
    (tmp_path / "saved").write_bytes(DAMAGED[message])
    with refused("import-damaged", f"{tmp_path / 'saved'}.*{message}", folder):
        vmsnap.import_file(tmp_path / "saved", folder / "vm")


@row("import-damaged")
def test_an_image_that_ends_anywhere_is_refused(folder: Path, tmp_path: Path, stream: bytes) -> None:
    image = saved_image(stream, padding=100)
    for size in (1, 16, 91, 92, 93, 300, len(image) // 2, len(image) - 1):
        (tmp_path / "saved").write_bytes(image[:size])
        if size > 16:
            with refused("import-damaged", "saved", folder):
                vmsnap.import_file(tmp_path / "saved", folder / "vm")


def test_a_changed_image_gives_an_image_or_an_error_of_its_own() -> None:
    whole, number = saved_image(b"", padding=20), random.Random(25)
    with tempfile.TemporaryFile() as file:
        for _ in range(3000):
            changed = bytearray(whole)
            for _ in range(number.randint(1, 4)):
                # The numbers of the header are changed as often as all the rest.
                at = number.randrange(number.choice([40, len(whole)]))
                changed[at] = number.choice([0, 1, 0x7F, 0xFF, number.randrange(256)])
            file.seek(0)
            file.truncate()
            file.write(changed[: number.choice([len(whole), number.randrange(len(whole))])])
            file.flush()
            file.seek(0)
            with suppress(vmsnap.UnsupportedFormatError), opened(file) as source:
                image = SaveImage.read(source)
                assert len(image.header()) > len(image.xml) + len(image.cookie)
                Domain.parse(image.xml, "image")


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
@row("import-damaged")
def test_a_program_that_fails_is_quoted(folder: Path, tmp_path: Path, stream: bytes, compression: str) -> None:
    if shutil.which(compression) is None:
        pytest.skip(f"there is no {compression}: apt install bzip2 lzop xz-utils zstd")
    image = saved_image(stream, compression=compression)
    (tmp_path / "saved").write_bytes(image[:-20])
    with refused("import-damaged", f"cannot be decompressed: {compression} failed with status 1: .+", folder):
        vmsnap.import_file(tmp_path / "saved", folder / "vm")


@row("import-program")
def test_a_program_that_is_missing_is_named(
    folder: Path, tmp_path: Path, stream: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").write_bytes(saved_image(stream, compression="gzip"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("import-program", "is compressed by gzip, and there is no program gzip: install it", folder):
        vmsnap.import_file(tmp_path / "saved", folder / "vm")


@row("export-no-xml")
def test_a_guest_of_qemu_needs_an_xml_for_libvirt(folder: Path, tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "stream").write_bytes(stream)
    vmsnap.import_file(tmp_path / "stream", folder / "vm")
    with refused("export-no-xml", "not imported from libvirt; pass the output of virsh dumpxml", folder):
        vmsnap.export_file(folder / "vm", folder / "saved", "libvirt")
    line = error_of(run("export", folder / "vm", folder / "saved", "--format", "libvirt", status=1))
    assert "--xml FILE" in line
    (tmp_path / "xml").write_bytes(XML)
    run("export", folder / "vm", tmp_path / "saved", "--format", "libvirt", "--xml", tmp_path / "xml")
    front = saved_image(b"", xml=XML.rstrip(b"\n"), cookie=b"")
    assert (tmp_path / "saved").read_bytes().startswith(front)
    vmsnap.import_file(tmp_path / "saved", folder / "again")
    assert memory_of(folder / "again") == memory_of(folder / "vm")


@row("import-damaged")
def test_an_xml_that_is_not_one_is_refused(folder: Path, tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "stream").write_bytes(stream)
    (tmp_path / "xml").write_bytes(b"vm1")
    vmsnap.import_file(tmp_path / "stream", folder / "vm")
    with refused("import-damaged", f"{tmp_path / 'xml'}: the XML of the domain is not well-formed", folder):
        vmsnap.export_file(folder / "vm", folder / "saved", "libvirt", xml=tmp_path / "xml")


# libvirt itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "cpu", "compression"),
    [("pc", "", "raw"), ("q35", TWO_NODES, "gzip")],
    ids=["pc", "q35, two nodes, a DIMM"],
)
def test_a_guest_of_libvirt_goes_on_after_import_and_export(
    folder: Path, machine: str, cpu: str, compression: str
) -> None:
    with session() as libvirt, libvirt.daemon(save_image_format=compression):
        toy = Toy(libvirt.folder)
        libvirt.start(toy, machine=machine, cpu=cpu, dimm=128 if cpu else 0)
        toy.ticks(3)
        saved = libvirt.folder / "saved"
        libvirt.virsh("save", NAME, saved)
        report = vmsnap.import_file(saved, folder / "vm", key=KEY, compress="lz4")
        assert report.compression == (None if compression == "raw" else compression)
        assert report.machine.machine_type.startswith(f"pc-{'q35' if machine == 'q35' else 'i440fx'}-")
        nodes = [("ram-node0", 0, 24 * MIB), ("ram-node1", 24 * MIB, 40 * MIB), ("memdimm0", 4096 * MIB, 128 * MIB)]
        expected = nodes if cpu else [("pc.ram", 0, 64 * MIB)]
        assert [(each.stream_name, each.guest_base, each.size) for each in report.machine.ram] == expected
        os.unlink(saved)

        exported = libvirt.folder / "exported"
        vmsnap.export_file(folder / "vm", exported, "libvirt", key=KEY)
        libvirt.give(exported)
        # The guest finds its memory as it was, or says so.
        libvirt.virsh("restore", exported)
        toy.ticks(3)

        # It is saved again while it is paused, and comes back paused.
        libvirt.virsh("save", NAME, saved, "--paused")
        assert vmsnap.import_file(saved, folder / "paused").machine.state == "paused"
        os.unlink(exported)
        vmsnap.export_file(folder / "paused", exported, "libvirt")
        libvirt.give(exported)
        libvirt.virsh("restore", exported)
        assert libvirt.virsh("domstate", NAME) == "paused"
        libvirt.virsh("resume", NAME)
        toy.ticks(3)
        toy.close()


def test_the_page_on_import_says_what_works(no_identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks one by one, with a domain of the name that they use."""
    page = (Path(__file__).resolve().parents[1] / "docs/import.md").read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    identity = vmsnap.generate_identity()
    known = {"recipients": vmsnap.recipients_of(identity), "identities": identity}
    with session() as libvirt, libvirt.daemon():
        toy = Toy(libvirt.folder)
        libvirt.start(toy, name="vm1")
        toy.ticks(3)
        libvirt.shim()
        (libvirt.folder / "ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
        (libvirt.folder / "ssh").chmod(0o755)
        monkeypatch.chdir(libvirt.folder)
        monkeypatch.setenv("PATH", f"{libvirt.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        for number, (language, block) in enumerate(blocks):
            if language == "python":
                shutil.rmtree("vm1")
                exec(block, known)
            else:
                subprocess.run(["bash", "-ec", block], check=True, stdout=subprocess.DEVNULL)
            if number == 0:
                toy.ticks(3)
                # The next block imports a file of QEMU, as this snapshot gives it.
                vmsnap.export_file("vm1", "stream", "qemu")
                subprocess.run(["zstd", "-q", "stream", "-o", "vm1.qemu.zst"], check=True)
                shutil.rmtree("vm1")
                os.unlink("vm1-again.save")
        assert [each.name for each in sorted(libvirt.folder.glob("vm1*"))] == [
            "vm1",
            "vm1-again.save",
            "vm1.qemu",
            "vm1.qemu.zst",
            "vm1.save",
        ]
        toy.close()
