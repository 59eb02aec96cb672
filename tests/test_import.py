"""Importing and exporting migration files of QEMU: guests that go on, and files that are not such files."""

import gzip
import json
import os
import pty
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import ask, ended, need_qemu, qemu_command, running
from migration_files import migrate, resume
from qemus import Qemu, found
from refusals import refused, row
from support import MIB, run_python, write
from toy_guest import Toy
from vmsnap.exchange.domain import Domain
from vmsnap.exchange.layout import UNKNOWN_BASE, place
from vmsnap.migration import SentBlock

GIB = 1 << 30
KEY = bytes(range(32))
BACKEND = "memory-backend-ram,id=mem,size=64M"
NODES = [
    *("-object", "memory-backend-ram,id=ram-node0,size=24M", "-object", "memory-backend-ram,id=ram-node1,size=40M"),
    *("-numa", "node,memdev=ram-node0", "-numa", "node,memdev=ram-node1"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a guest whose firmware has not begun."""
    need_qemu()
    folder = tmp_path_factory.mktemp("qemu")
    with running(qemu_command(folder / "qmp", "-S", memory="", size="16M"), folder / "qmp"):
        return migrate(folder / "qmp", folder / "file")


def content(location: Path, name: str, key: bytes | None = None) -> bytes:
    with vmsnap.open(location, key=key).raw_fragment(name) as fragment:
        return fragment.read()


# Guests that go on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "memory", "options", "parts"),
    [
        ("pc", "", [], [("pc.ram", 0, 64 * MIB)]),
        ("q35", BACKEND, [], [("mem", 0, 64 * MIB)]),
        ("q35", "", NODES, [("ram-node0", 0, 24 * MIB), ("ram-node1", 24 * MIB, 40 * MIB)]),
    ],
    ids=["plain", "backend", "two nodes"],
)
def test_a_guest_goes_on_after_import_and_export(
    folder: Path,
    tmp_path: Path,
    qmp: Path,
    qemu: Qemu,
    machine: str,
    memory: str,
    options: list[str],
    parts: list[tuple[str, int, int]],
) -> None:
    toy = Toy(tmp_path)
    command = qemu_command(qmp, *options, *toy.options, machine=machine, memory=memory, size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        migrate(qmp, tmp_path / "file")
    report = vmsnap.import_file(tmp_path / "file", folder / "vm", key=KEY, compress="lz4")
    assert [(each.stream_name, each.guest_base, each.size) for each in report.machine.ram] == parts
    assert (report.machine.qemu_version, report.machine.target, report.machine.devices) == ("", "", None)
    vmsnap.export_file(folder / "vm", tmp_path / "exported", "qemu", key=KEY)

    # The guest finds its memory as it was, or says so.
    with running([*command, "-incoming", f"exec:cat '{tmp_path / 'exported'}'"], qmp):
        toy.ticks(3)

    # What was exported is the same guest.
    vmsnap.import_file(tmp_path / "exported", folder / "again")
    one, other = vmsnap.open(folder / "vm", key=KEY).memory(), vmsnap.open(folder / "again").memory()
    assert one.regions == other.regions
    assert all(one.read(each.start, len(each)) == other.read(each.start, len(each)) for each in one.regions)
    assert content(folder / "again", "device_state") == content(folder / "vm", "device_state", KEY)
    toy.close()


def test_an_imported_guest_loads(folder: Path, tmp_path: Path, qmp: Path, qemu: Qemu) -> None:
    toy = Toy(tmp_path)
    command = qemu_command(qmp, *toy.options, memory="", size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        migrate(qmp, tmp_path / "file")
    vmsnap.import_file(tmp_path / "file", folder / "vm")
    with ended(vmsnap.qemu.load(folder / "vm", command).process):
        toy.ticks(3)
        assert ask(qmp, "query-status")["status"] == "running"
    toy.close()


def test_a_guest_that_was_saved_live_is_exported(folder: Path, tmp_path: Path, qmp: Path, qemu: Qemu) -> None:
    toy = Toy(tmp_path)
    command = qemu_command(qmp, *toy.options, machine="q35", memory="", size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm", key=KEY, live=True, then="quit")
    vmsnap.export_file(folder / "vm", tmp_path / "exported", "qemu", key=KEY)
    with running([*command, "-incoming", f"exec:cat '{tmp_path / 'exported'}'"], qmp):
        resume(qmp)
        # More than the console holds of what the guest said before.
        toy.ticks(100)
    toy.close()


def test_a_guest_whose_memory_was_read_from_a_file_is_exported(
    folder: Path, tmp_path: Path, qmp: Path, qemu: Qemu
) -> None:
    """QEMU left its memory out of the stream, with x-ignore-shared. An exported stream is complete without that."""
    toy = Toy(tmp_path)
    memory = f"memory-backend-file,id=mem,size=64M,share=on,mem-path={tmp_path / 'ram'}"
    command = qemu_command(qmp, *toy.options, memory=memory, size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, folder / "vm", then="quit")
    assert report.way == "files"
    vmsnap.export_file(folder / "vm", tmp_path / "exported", "qemu")
    with running([*command, "-incoming", f"exec:cat '{tmp_path / 'exported'}'"], qmp):
        resume(qmp)
        toy.ticks(100)
    toy.close()


def test_a_guest_goes_through_pipes(folder: Path, tmp_path: Path, file: Path) -> None:
    script = 'gzip -c "$1" | "$2" -m vmsnap import - "$3" --encrypt --key-file "$4" --compress lz4 --json'
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    arguments = [file, sys.executable, folder / "vm.vmsnap.tar", tmp_path / "key"]
    done = subprocess.run(["sh", "-c", script, "sh", *map(str, arguments)], capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert (told["format"], told["compression"], told["logical_bytes"]) == ("qemu", "gzip", 16 * MIB)
    assert vmsnap.verify(folder / "vm.vmsnap.tar", key=KEY).ok
    exported = run("export", folder / "vm.vmsnap.tar", "-", "--format", "qemu", "--key-file", tmp_path / "key").stdout
    (tmp_path / "back").write_bytes(exported)
    vmsnap.import_file(tmp_path / "back", folder / "again")
    assert content(folder / "again", "mem_metadata") != b""
    assert vmsnap.open(folder / "again").memory().read(0, 16 * MIB) == vmsnap.open(
        folder / "vm.vmsnap.tar", key=KEY
    ).memory().read(0, 16 * MIB)


def test_an_open_file_is_read_from_its_position_on(folder: Path, tmp_path: Path, file: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000) + file.read_bytes())
    with (tmp_path / "file").open("rb", buffering=0) as opened:
        opened.seek(5000)
        assert vmsnap.import_file(opened, folder / "vm").memory.logical_bytes == 16 * MIB
    # An open file to export to is written from its position on, too.
    with (tmp_path / "back").open("wb", buffering=0) as target:
        target.write(bytes(100))
        report = vmsnap.export_file(folder / "vm", target, "qemu")
    assert (tmp_path / "back").stat().st_size == 100 + report.written_bytes


def test_progress_ends_at_the_total(folder: Path, tmp_path: Path, file: Path) -> None:
    seen: list[tuple[int, int]] = []

    def show(done: int, total: int) -> None:
        seen.append((done, total))

    vmsnap.import_file(file, folder / "vm", progress=show)
    assert seen[-1] == (32 * MIB, 32 * MIB)
    assert seen == sorted(seen)
    seen.clear()
    vmsnap.export_file(
        folder / "vm", tmp_path / "back", "qemu", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]


def test_the_package_of_qmp_is_not_needed(folder: Path, file: Path) -> None:
    script = """
        import sys
        sys.modules["qemu"] = None
        import vmsnap
        vmsnap.import_file(sys.argv[1], sys.argv[2])
        vmsnap.export_file(sys.argv[2], sys.argv[2] + ".qemu", "qemu")
        print("done")
    """
    assert run_python("\n".join(line.strip() for line in script.splitlines()), file, folder / "vm").stdout == "done\n"


# The place of memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("mib", [2048, 2815, 2816, 3583, 3584, 5120])
def test_the_hole_below_4_gib_is_where_qemu_has_it(qmp: Path, machine: str, mib: int) -> None:
    need_qemu()
    with running(qemu_command(qmp, "-S", machine=machine, memory="", size=f"{mib}M"), qmp):
        kind = ask(qmp, "qom-get", path="/machine", property="type").removesuffix("-machine")
        windows = [
            [
                ask(qmp, "qom-get", path=f"/machine/unattached/ram-{name}-4g[0]", property=each)
                for each in ("addr", "size")
            ]
            for name in (["below", "above"] if mib >= (2816 if machine == "q35" else 3584) else ["below"])
        ]
    parts = place(kind, [("pc.ram", mib * MIB), ("pc.bios", 0)], None)
    assert [[each.guest_base, each.size] for each in parts] == windows


def test_nodes_lie_in_the_order_of_the_domain() -> None:
    xml = b"<domain type='kvm'><cpu><numa><cell id='1'/><cell id='0'/></numa></cpu></domain>"
    blocks = [("ram-node0", 2 * GIB), ("ram-node1", 2 * GIB)]
    assert [tuple(each) for each in place("pc-q35-9.0", blocks, Domain.parse(xml, "x"))] == [
        ("ram-node1", 0, 0, 2 * GIB, True),
        ("ram-node0", 4 * GIB, 0, 2 * GIB, True),
    ]
    assert [each.block for each in place("pc-q35-9.0", blocks, None)] == ["ram-node0", "ram-node1"]


def test_dimms_lie_where_the_domain_has_them() -> None:
    blocks = [("memdimm0", GIB), ("pc.ram", 5 * GIB), ("memdimm1", GIB), ("memdimm2", GIB)]

    def placed(*addresses: str) -> dict[str, int]:
        dimms = "".join(f"<memory><address type='dimm' {each}/></memory>" for each in addresses)
        domain = Domain.parse(f"<domain type='kvm'><devices>{dimms}</devices></domain>".encode(), "x")
        parts = place("pc-q35-9.0", blocks, domain)
        assert [each.guest_base for each in parts] == sorted({each.guest_base for each in parts})
        return {each.block: each.guest_base >> 30 for each in parts if each.mapped and each.block != "pc.ram"}

    assert placed("slot='1' base='0x200000000'", "slot='0' base='0x240000000'") == {"memdimm1": 8, "memdimm0": 9}
    # Addresses that are in other memory, are not those of pages, or are not addresses.
    assert placed("slot='0' base='0x40000000'", "slot='1' base='0x100000000'", "slot='2' base='0x1c0000000'") == {
        "memdimm2": 7
    }
    assert placed("slot='0' base='0x200000001'", "slot='1' base='0xffffffffffffffff'", "slot='2' base='high'") == {}
    assert placed("slot='0' base='0x200000000'", "slot='1' base='0x200001000'") == {"memdimm0": 8}


def test_memory_whose_address_the_file_does_not_tell_has_regions_of_its_own() -> None:
    argument = "<qemu:commandline xmlns:qemu='q'><qemu:arg value='pc,max-ram-below-4g=1G'/></qemu:commandline>"
    moved = f"<domain type='kvm'>{argument}</domain>".encode()
    for kind, blocks, domain in (
        ("virt-9.0", [("mach-virt.ram", GIB)], None),
        ("", [("pc.ram", GIB)], None),
        ("pc-i440fx-1.7", [("pc.ram", GIB)], None),
        ("pc-q35-9.0", [("pc.ram", 1 << 40)], None),
        ("pc-q35-9.0", [("pc.ram", GIB)], Domain.parse(moved, "x")),
        ("pc-q35-9.0", [("one", GIB), ("two", GIB)], None),
    ):
        parts = place(kind, blocks, domain)
        assert [(each.block, each.offset, each.size, each.mapped) for each in parts] == [
            (name, 0, size, False) for name, size in blocks
        ]
        assert [each.guest_base for each in parts] == [UNKNOWN_BASE + number * GIB for number in range(len(blocks))]
    # Of a machine whose memory is known, a DIMM is such a region.
    parts = place("pc-q35-9.0", [("memdimm0", GIB), ("pc.ram", GIB)], None)
    assert [(each.block, each.guest_base, each.mapped) for each in parts] == [
        ("pc.ram", 0, True),
        ("memdimm0", UNKNOWN_BASE, False),
    ]


def test_a_guest_of_another_machine_is_imported_and_exported(folder: Path, tmp_path: Path, file: Path) -> None:
    whole = file.read_bytes()
    assert whole.count(b"pc-i440fx-") == 1
    (tmp_path / "file").write_bytes(whole.replace(b"pc-i440fx-", b"xy-i440fx-"))
    done = run("import", tmp_path / "file", folder / "vm")
    assert b"warning: the file does not tell where the guest sees its memory" in done.stderr
    [region] = vmsnap.open(folder / "vm").memory().regions
    assert (region.start, len(region)) == (UNKNOWN_BASE, 16 * MIB)
    run("export", folder / "vm", tmp_path / "back", "--format", "qemu")
    report = vmsnap.import_file(tmp_path / "back", folder / "again")
    assert not report.machine.ram[0].mapped
    assert content(folder / "again", "mem") == content(folder / "vm", "mem")


# Files that cannot be imported ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begins", "message"),
    [
        (b"", "is empty"),
        (b"EMiL" + bytes(100), "is a LiME image: import a file of virsh save"),
        (b"\x7fELF" + bytes(100), "is an ELF file"),
        (bytes(5000), "begins like no file that vmsnap can import"),
        (b"x", "begins like no file"),
    ],
)
@row("import-foreign")
def test_a_foreign_file_is_refused(folder: Path, tmp_path: Path, begins: bytes, message: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(begins)
    with refused("import-foreign", f"{path} {message}", folder):
        vmsnap.import_file(path, folder / "vm")
    line = error_of(run("import", path, folder / "vm", status=4))
    assert message in line
    assert list(folder.iterdir()) == []


@row("import-foreign", "import-not-a-file")
def test_a_snapshot_is_not_imported(folder: Path, tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm") as writer:
        write(writer, "a", b"x")
    vmsnap.pack(tmp_path / "vm", tmp_path / "vm.vmsnap.tar")
    with refused("import-not-a-file", f"{tmp_path / 'vm'} is a directory", folder):
        vmsnap.import_file(tmp_path / "vm", folder / "vm")
    with refused("import-foreign", "is a snapshot in one file", folder):
        vmsnap.import_file(tmp_path / "vm.vmsnap.tar", folder / "vm")
    with refused("import-not-a-file", "/dev/null is a character device", folder):
        vmsnap.import_file("/dev/null", folder / "vm")


def test_a_terminal_is_refused(folder: Path, file: Path) -> None:
    vmsnap.import_file(file, folder / "vm")
    ours, theirs = pty.openpty()
    for arguments in (["import", "-", folder / "new"], ["export", folder / "vm", "-", "--format", "qemu"]):
        command = [sys.executable, "-m", "vmsnap", *map(str, arguments)]
        done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2
        assert "is a terminal: redirect it" in done.stderr
    os.close(ours)
    os.close(theirs)


@row("import-damaged")
def test_a_file_that_ends_anywhere_is_refused(folder: Path, tmp_path: Path, file: Path) -> None:
    whole = file.read_bytes()
    path = tmp_path / "file"
    for size in (4, 8, 20, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with refused("import-damaged", f"{path}: ", folder):
            vmsnap.import_file(path, folder / "vm")
        path.write_bytes(gzip.compress(whole[:size]))
        with refused("import-damaged", f"{path}: ", folder):
            vmsnap.import_file(path, folder / "vm", key=KEY)


@row("import-damaged")
def test_a_compressed_file_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for inner, message in ((b"", "truncated"), (b"hello" * 1000, "not a stream of QEMU")):
        path.write_bytes(gzip.compress(inner))
        with refused("import-damaged", f"{path}: .*{message}", folder):
            vmsnap.import_file(path, folder / "vm")
    path.write_bytes(b"\x1f\x8b\x08" + bytes(1000))
    with refused("import-damaged", f"{path} cannot be decompressed: gzip failed", folder):
        vmsnap.import_file(path, folder / "vm")


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("10.0", "mapped_ram", 'capability "mapped-ram" was on; switch it off'),
        ("system", "compress", "capability compress; switch it off"),
    ],
)
@row("import-damaged")
def test_a_file_of_another_form_is_refused_by_name(
    folder: Path, tmp_path: Path, qmp: Path, name: str, capability: str, message: str
) -> None:
    qemu = found(name)
    if capability == "compress" and qemu.number >= (9, 1):
        pytest.skip(f"{qemu} has no capability compress any more")
    with running(qemu_command(qmp, "-S", memory="", size="16M", qemu=qemu), qmp):
        migrate(qmp, tmp_path / "file", **{capability: True})
    with refused("import-damaged", message, folder):
        vmsnap.import_file(tmp_path / "file", folder / "vm")


@row("import-without-memory")
def test_a_file_without_memory_is_refused(folder: Path, tmp_path: Path, qmp: Path) -> None:
    need_qemu()
    memory = f"memory-backend-file,id=mem,size=16M,share=on,mem-path={tmp_path / 'ram'}"
    with running(qemu_command(qmp, "-S", memory=memory, size="16M"), qmp):
        migrate(qmp, tmp_path / "file", x_ignore_shared=True)
    with refused("import-without-memory", "does not contain the memory 'mem'.*vmsnap qemu save", folder):
        vmsnap.import_file(tmp_path / "file", folder / "vm")


def test_memory_of_which_a_file_has_no_page_is_zero(folder: Path, tmp_path: Path, file: Path) -> None:
    """If nothing was left out with x-ignore-shared. QEMU loads the file that is exported."""
    vmsnap.import_file(file, folder / "vm")
    without = [SentBlock("pc.ram", "pc.ram", replaced=True)]
    with (tmp_path / "empty").open("wb") as output:
        vmsnap.open(folder / "vm").send_migration(output.fileno(), without)
    report = vmsnap.import_file(tmp_path / "empty", folder / "empty")
    assert (report.memory.logical_bytes, report.memory.data_bytes) == (16 * MIB, 0)
    vmsnap.export_file(folder / "empty", tmp_path / "back", "qemu")
    assert vmsnap.import_file(tmp_path / "back", folder / "again").memory.data_bytes == 0
    qmp = tmp_path / "qmp"
    incoming = ["-incoming", f"exec:cat {tmp_path / 'back'}"]
    with running(qemu_command(qmp, "-S", *incoming, memory="", size="16M"), qmp):
        resume(qmp)
        assert ask(qmp, "query-migrate")["status"] == "completed"


def test_an_import_from_a_silent_pipe_is_interrupted(folder: Path, file: Path) -> None:
    command = [sys.executable, "-m", "vmsnap", "import", "-", str(folder / "vm")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(file.read_bytes()[: 1 << 20])
        process.stdin.flush()
        # The snapshot is begun when the file was recognized.
        while not list(folder.iterdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert list(folder.iterdir()) == []


@row("root-exists")
def test_a_snapshot_that_exists_stays(folder: Path, file: Path) -> None:
    (folder / "vm").mkdir()
    with refused("root-exists", "vm", folder):
        vmsnap.import_file(file, folder / "vm")


# Exports that cannot be -------------------------------------------------------------------------------------------


@row("export-exists", "export-format", "export-no-guest", "parent-missing")
def test_an_export_that_cannot_be_leaves_nothing(folder: Path, tmp_path: Path, file: Path) -> None:
    vm = tmp_path / "vm"
    vmsnap.import_file(file, vm)
    (folder / "there").write_bytes(b"kept")
    os.symlink("nowhere", folder / "link")
    for name in ("there", "link"):
        with refused("export-exists", "exists already, and nothing is overwritten", folder):
            vmsnap.export_file(vm, folder / name, "qemu")
    with refused("export-format", 'format must be "libvirt" or "qemu"', folder):
        vmsnap.export_file(vm, folder / "new", "elf")  # type: ignore[arg-type]
    with refused("export-format", "xml is only for the format", folder):
        vmsnap.export_file(vm, folder / "new", "qemu", xml=folder / "there")
    with refused("parent-missing", "missing", folder):
        vmsnap.export_file(vm, folder / "missing/new", "qemu")
    with vmsnap.create(tmp_path / "other") as writer:
        write(writer, "a", b"x")
    with refused("export-no-guest", "does not contain a QEMU guest", folder):
        vmsnap.export_file(tmp_path / "other", folder / "new", "qemu")
    line = error_of(run("export", vm, vm / "new", "--format", "qemu", status=1))
    assert "is in the snapshot" in line


@row("export-lacks-memory")
def test_an_export_that_would_lack_memory_leaves_nothing(folder: Path, tmp_path: Path, file: Path) -> None:
    vmsnap.import_file(file, tmp_path / "vm")
    known = vmsnap.open(tmp_path / "vm").read_fragment("machine")
    more = known["ram"][0] | {"backend": "nv", "guest_base": GIB}
    with vmsnap.create(tmp_path / "changed") as writer:
        writer.write_fragment("machine", known | {"ram": [*known["ram"], more]})
        write(writer, "device_state", content(tmp_path / "vm", "device_state"))
    with refused("export-lacks-memory", "its device state lacks the guest memory 'nv'", folder):
        vmsnap.export_file(tmp_path / "changed", folder / "new", "qemu")


def test_an_export_to_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, file: Path) -> None:
    vmsnap.import_file(file, tmp_path / "vm")
    script = """
        import resource, signal, sys, vmsnap
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            vmsnap.export_file(sys.argv[1], sys.argv[2], "qemu")
        except OSError as error:
            print(error.errno)
    """
    lines = [line[8:] for line in script.splitlines()]
    assert run_python("\n".join(lines), tmp_path / "vm", folder / "new").stdout == "27\n"
    assert list(folder.iterdir()) == []


def test_the_reader_of_an_export_may_end(folder: Path, file: Path) -> None:
    vmsnap.import_file(file, folder / "vm")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vmsnap", "export", str(folder / "vm"), "-", "--format", "qemu"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_exported_file_is_for_its_owner_only(folder: Path, tmp_path: Path, file: Path) -> None:
    vmsnap.import_file(file, tmp_path / "vm")
    run("export", tmp_path / "vm", folder / "new", "--format", "qemu")
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o600
