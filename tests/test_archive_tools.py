"""An archive is a tar file: every tar program unpacks it into the directory that was packed."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import floe
import pytest
import vmsnap
from commands import write_private
from independent import READER_PROGRAM, vmsnap_packer, vmsnap_reader
from support import pattern
from toolchains import UnavailableError, recent_tool

GIB = 1 << 30
SOURCE = Path(__file__).parent / "programs/untar.go"

# Packers -------------------------------------------------------------------------------------------------------------


def pack_by_python(root: Path, archive: Path, key: bytes | None) -> None:
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(root, key), archive)


def pack_by_vmsnap(root: Path, archive: Path, key: bytes | None) -> None:
    vmsnap.pack(root, archive, key=key)


PACKERS: dict[str, Callable[[Path, Path, bytes | None], None]] = {"python": pack_by_python, "vmsnap": pack_by_vmsnap}


@pytest.fixture(params=PACKERS)
def pack(request: pytest.FixtureRequest) -> Callable[[Path, Path, bytes | None], None]:
    """A program that packs: it makes an archive of a directory."""
    return PACKERS[request.param]


# Tools ---------------------------------------------------------------------------------------------------------------


class Tool:
    """A program that lists and unpacks tar files. `size_column` is that of the sizes in its long listing."""

    def __init__(self, *command: str, size_column: int, sparsely: tuple[str, ...] | None = None) -> None:
        self._command, self._size_column, self._sparsely = command, size_column, sparsely

    @property
    def unpacks_sparsely(self) -> bool:
        return self._sparsely is not None

    def unpack(self, archive: Path, into: Path) -> None:
        self._run("-x", *(self._sparsely or ()), "-f", archive, "-C", into)

    def unpack_stream(self, stream: BinaryIO, into: Path) -> None:
        self._run("-x", "-f", "-", "-C", into, stdin=stream)

    def sizes(self, archive: Path) -> dict[str, int]:
        lines = self._run("-tvf", archive).splitlines()
        return {line.split()[-1]: int(line.split()[self._size_column]) for line in lines}

    def is_right(self, archive: Path, name: str, size: int) -> bool:
        """Whether a member that is unpacked into a pipe has zeros, then END."""
        with subprocess.Popen([*self._command, "-xOf", archive, name], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            zeros, last = bytes(1 << 20), b""
            while block := process.stdout.read(len(zeros)):
                size -= len(block)
                if block != zeros[: len(block)]:
                    last += block.lstrip(b"\0")
        return (process.returncode, size, last) == (0, 0, END)

    def _run(self, *arguments: str | Path, stdin: BinaryIO | None = None) -> str:
        # bsdtar takes names that are not ASCII from a header only where the locale has them.
        environment = os.environ | {"LC_ALL": "C.UTF-8"}
        done = subprocess.run([*self._command, *arguments], stdin=stdin, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b""), done
        return done.stdout.decode()


class TarFile(Tool):
    """The module of Python."""

    def __init__(self) -> None:
        super().__init__(size_column=0, sparsely=())

    def unpack(self, archive: Path, into: Path) -> None:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                source = tar.extractfile(member)
                if source is None:
                    assert member.isdir()
                    (into / member.name).mkdir()
                    continue
                with source, open(into / member.name, "xb") as target:
                    _copy_sparsely(source, target)

    def unpack_stream(self, stream: BinaryIO, into: Path) -> None:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))

    def sizes(self, archive: Path) -> dict[str, int]:
        with tarfile.open(archive) as tar:
            return {member.name: member.size for member in tar.getmembers()}


def _copy_sparsely(source: BinaryIO, target: BinaryIO) -> None:
    zeros = bytes(1 << 20)
    while block := source.read(len(zeros)):
        if block == zeros[: len(block)]:
            target.seek(len(block), os.SEEK_CUR)
        else:
            target.write(block)
    target.truncate(target.tell())


class Go(Tool):
    """The package archive/tar of Go, in a program."""

    def __init__(self, program: Path) -> None:
        super().__init__(str(program), size_column=0, sparsely=())

    def unpack(self, archive: Path, into: Path) -> None:
        self._run("unpack", archive, into)

    def unpack_stream(self, stream: BinaryIO, into: Path) -> None:
        self._run("unpack", "/dev/stdin", into, stdin=stream)

    def sizes(self, archive: Path) -> dict[str, int]:
        lines = [line.split(" ", 1) for line in self._run("list", archive).splitlines()]
        return {name: int(size) for size, name in lines if name != "pax_global_header"}


def _installed(name: str, *arguments: str, says: str, **options: Any) -> Tool:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"there is no program `{name}`")
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    if says not in done.stdout + done.stderr:
        pytest.skip(f"`{name}` is not {says}")
    return Tool(program, *arguments, **options)


def _go(folder: Path) -> Tool:
    try:
        go = recent_tool("go", "Go", "1.19", "version")
    except UnavailableError as error:
        pytest.skip(str(error))
    subprocess.run([go, "build", "-o", folder / "untar", SOURCE], check=True, capture_output=True)
    return Go(folder / "untar")


TOOLS: dict[str, Callable[[Path], Tool]] = {
    "GNU tar": lambda _: _installed("tar", says="GNU", size_column=2),
    "bsdtar": lambda _: _installed("bsdtar", says="bsdtar", size_column=4, sparsely=("-S",)),
    "busybox": lambda _: _installed("busybox", "tar", says="BusyBox", size_column=2),
    "tarfile": lambda _: TarFile(),
    "Go": _go,
}


@pytest.fixture(scope="module", params=TOOLS)
def tool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tool:
    """A program that unpacks tar files."""
    return TOOLS[request.param](tmp_path_factory.mktemp("tool"))


# Snapshots -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A sealed snapshot, its key, and an archive of it."""

    root: Path
    key: bytes | None
    archive: Path


NAMES = ["a" * 255, "☃" * 85, "żółć ☃ 𝄞", "tab\tand\x1b[2J", "new\nline", "-dash"]
NAMES += ["a" * 99, "b" * 100, "c" * 101, "é" * 50]


@pytest.fixture(params=["plain", "encrypted"])
def packed(request: pytest.FixtureRequest, pack: Callable[[Path, Path, bytes | None], None], tmp_path: Path) -> Packed:
    """A snapshot with names of many kinds, and sizes around those from which on data are aligned."""
    key = vmsnap.generate_key() if request.param == "encrypted" else None
    root, archive = tmp_path / "vm1", tmp_path / "vm1.vmsnap.tar"
    with vmsnap.create(root, key=key) as writer:
        namespace = writer
        for name in NAMES:
            _write(namespace, name, name.encode())
            _write(namespace, f"{name[:50]} empty", b"")
            namespace.add_namespace(f"{name[:60]} holds nothing")
            namespace = namespace.add_namespace(f"{name[:60]} namespace")
        # Of plain and of encrypted fragments, which are 106 bytes longer.
        for size in (65429, 65430, 65431, 65535, 65536, 65537, 200_000):
            _write(writer, f"{size} bytes", pattern(size))
    pack(root, archive, key)
    return Packed(root, key, archive)


def _write(writer: vmsnap.SnapshotWriter, name: str, data: bytes) -> None:
    with writer.raw_fragment(name, chunk_size_bytes=65536) as fragment:
        fragment.write(data)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of all files by their paths, and None for directories."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(root: Path, key: bytes | None, tmp_path: Path) -> None:
    """Run the Python reader's `check`."""
    options = [] if key is None else ["--key-file", write_private(tmp_path / "key", key)]
    subprocess.run(
        [sys.executable, "-E", "-s", READER_PROGRAM, root, *options, "check"], check=True, capture_output=True
    )


# Tests ---------------------------------------------------------------------------------------------------------------


def test_a_tar_program_unpacks_an_archive_into_the_snapshot(packed: Packed, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    tool.unpack(packed.archive, tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(packed.root)
    check(tmp_path / "unpacked", packed.key, tmp_path)
    assert vmsnap.verify(tmp_path / "unpacked", key=packed.key).ok


def test_a_tar_program_unpacks_an_archive_from_a_pipe(packed: Packed, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    with subprocess.Popen(["cat", packed.archive], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        tool.unpack_stream(process.stdout, tmp_path / "unpacked")
        # Some programs stop at the end blocks, others read everything.
        process.stdout.close()
    assert contents(tmp_path / "unpacked") == contents(packed.root)


def test_all_members_have_the_time_of_the_manifest(packed: Packed) -> None:
    manifest = vmsnap_reader.open_snapshot(packed.root, packed.key).manifest
    assert manifest is not None
    created = int(datetime.fromisoformat(manifest["created"]).timestamp())
    with tarfile.open(packed.archive) as tar:
        members = tar.getmembers()
    assert {member.mtime for member in members} == {created}
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    assert {(member.isdir(), member.mode) for member in members} == {(False, 0o600), (True, 0o700)}


def test_data_are_aligned(packed: Packed) -> None:
    with tarfile.open(packed.archive) as tar:
        for member in tar.getmembers():
            large = 4096 if member.size >= 65536 else 512
            assert member.offset_data % (65536 if member.name == "vmsnap_manifest" else large) == 0, member.name


def test_packing_again_gives_the_same_bytes(
    packed: Packed, pack: Callable[[Path, Path, bytes | None], None], tmp_path: Path
) -> None:
    pack(packed.root, tmp_path / "again", packed.key)
    (tmp_path / "unpacked").mkdir()
    TarFile().unpack(packed.archive, tmp_path / "unpacked")
    pack(tmp_path / "unpacked", tmp_path / "unpacked.vmsnap.tar", packed.key)
    assert (tmp_path / "again").read_bytes() == packed.archive.read_bytes()
    assert (tmp_path / "unpacked.vmsnap.tar").read_bytes() == packed.archive.read_bytes()


def test_all_packers_give_the_same_bytes(packed: Packed, tmp_path: Path) -> None:
    for number, pack in enumerate(PACKERS.values()):
        pack(packed.root, tmp_path / f"again{number}", packed.key)
        assert (tmp_path / f"again{number}").read_bytes() == packed.archive.read_bytes()


def test_the_python_reader_reads_an_archive_as_it_reads_the_directory(packed: Packed) -> None:
    directory = vmsnap_reader.open_snapshot(packed.root, packed.key)
    archive = vmsnap_reader.open_snapshot(packed.archive, packed.key)
    assert archive.fragments() == directory.fragments()
    for path in directory.fragments():
        assert archive.read(path) == directory.read(path)


# From 8 GiB on -------------------------------------------------------------------------------------------------------

#: Sizes of zeros with `END` at the end, and their BLAKE3, which `vmsnap seal` of such files took a minute to compute.
#: A header has the first size in octal digits, and the second not any more.
END = b"guest"
LARGE = {
    "below": (8 * GIB - 1, "062110841fd6c394aa769a0ab62bdf6aefe6c72b064420270eb3c35c813f9b41"),
    "from": (8 * GIB + 5, "571e416b45eaf1d504875d76d45477594f3cd1b16499284dfdf4dbea3d47e1de"),
}


@pytest.fixture
def large(tmp_path: Path) -> Packed:
    """A plain snapshot of sparse files, and its archive, which is sparse too."""
    root, archive = tmp_path / "vm1", tmp_path / "vm1.vmsnap.tar"
    root.mkdir()
    fragments = {}
    for name, (size, blake3) in LARGE.items():
        with open(root / name, "xb") as file:
            file.seek(size - len(END))
            file.write(END)
        fragments[name] = {"size": size, "stored_size": size, "blake3": bytes.fromhex(blake3)}
    manifest = {
        "format": "vmsnap-manifest",
        "version": 1,
        "snapshot_id": bytes(16),
        "created": "2026-11-26T12:00:00Z",
        "generator": "by hand",
        "encrypted": False,
        "requires": [],
        "namespaces": [],
        "fragments": fragments,
    }
    (root / "vmsnap_manifest").write_bytes(floe.cbor(manifest))
    # Not by vmsnap, which checks all the bytes and takes long for it.
    pack_by_python(root, archive, None)
    if archive.stat().st_blocks * 512 > GIB:
        pytest.skip("the file system does not keep holes")
    return Packed(root, None, archive)


def test_a_tar_program_lists_the_size_of_a_fragment_of_8_gib(large: Packed, tool: Tool) -> None:
    sizes = tool.sizes(large.archive)
    assert {name: sizes[name] for name in LARGE} == {name: size for name, (size, _) in LARGE.items()}
    assert sizes.keys() == {"vmsnap_manifest", *LARGE}


@pytest.mark.torture
def test_a_tar_program_unpacks_a_fragment_of_8_gib(large: Packed, tool: Tool, tmp_path: Path) -> None:
    if not tool.unpacks_sparsely:
        # It would write 16 GiB of zeros.
        assert all(tool.is_right(large.archive, name, size) for name, (size, _) in LARGE.items())
        return
    (tmp_path / "unpacked").mkdir()
    tool.unpack(large.archive, tmp_path / "unpacked")
    assert vmsnap.verify(tmp_path / "unpacked").ok
    check(tmp_path / "unpacked", None, tmp_path)
