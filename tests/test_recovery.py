"""docs/recovery.md: each of its commands runs after the damage that it is for, with the described result."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cbor2
import pytest
import vmsnap
from commands import error_of, run, write_private
from pages import REPOSITORY, blocks, commands, python, shell, text_of
from support import MIB, pattern, segment_offset
from vmsnap._vmsnap import DEFAULT_CHUNK_SIZE_BYTES

PAGE = "docs/recovery.md"
KEY = bytes(range(32))
DISK = pattern(300_000)
# Half of it in use, which compresses to a half again.
RAM = b"".join(pattern(2048, seed) * 2 for seed in range(256)) + bytes(MIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with `vm1` from the page, its key, and the identity of another person."""
    write_private(tmp_path / "vm.key", KEY)
    identity = vmsnap.generate_identity()
    write_private(tmp_path / "id.txt", identity.encode())
    (tmp_path / "team.txt").write_text("\n".join(vmsnap.recipients_of(identity)))
    make(tmp_path / "vm1", KEY)
    return tmp_path


def make(root: Path, key: bytes | None, *, in_place: bool = False) -> None:
    if in_place:
        fill(vmsnap.SnapshotWriter(root, key=key))
    else:
        with vmsnap.create(root, key=key) as snap:
            fill(snap)


def fill(snap: vmsnap.SnapshotWriter) -> None:
    snap.write_memory([vmsnap.GuestRegion(guest_base=0, source=RAM)], compress="lz4")
    snap.write_fragment("clock", 12)
    with snap.add_namespace("disks").raw_fragment("sda") as fragment:
        fragment.write(DISK)


def flip(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


# What is wrong? ------------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """A change to a snapshot, the problems that `verify` then reports, and the remedy of the page."""

    do: Callable[[Path], object]
    told: list[str]
    remedy: Callable[[Path], object]
    key: bytes | None = KEY


def bring_back(name: str) -> Callable[[Path], object]:
    def copied(root: Path) -> None:
        source = root.parent / "copy" / name
        if source.is_dir():
            shutil.copytree(source, root / name)
        else:
            shutil.copy(source, root / name)

    return copied


def move_away(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).rename(root.parent / "moved away")


def rename_both(root: Path) -> None:
    (root / "clock").rename(root.parent / "aside")
    (root / "mem_metadata").rename(root / "clock")
    (root.parent / "aside").rename(root / "mem_metadata")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"appended")


def cut_to_the_size_in_the_text(root: Path) -> None:
    text = run("verify", root, "--key-file", root.parent / "vm.key", status=1).stderr.decode()
    [size] = re.findall(r"bytes long, but the manifest says (\d+) bytes", text)
    shell(f"truncate -s {size} vm1/disks/sda", root.parent)


def other_key_metadata(root: Path) -> None:
    vmsnap.SnapshotWriter(root.parent / "other", key=KEY)
    shutil.copy(root.parent / "other/enc_metadata", root)


def folder_for_key_metadata(root: Path) -> None:
    (root / "enc_metadata").unlink()
    (root / "enc_metadata").mkdir()


def file_for_key_metadata(root: Path) -> None:
    (root / "enc_metadata").rmdir()
    bring_back("enc_metadata")(root)


FRAGMENTS = ["clock", "disks/sda", "mem", "mem_metadata"]

DAMAGES = {
    "a bit": Damage(
        lambda root: flip(root / "disks/sda", 100_000), ["not authentic: disks/sda"], bring_back("disks/sda")
    ),
    "a bit, plain": Damage(
        lambda root: flip(root / "disks/sda", 100_000), ["changed: disks/sda"], bring_back("disks/sda"), key=None
    ),
    "cut off": Damage(
        lambda root: os.truncate(root / "disks/sda", 100_000), ["truncated: disks/sda"], bring_back("disks/sda")
    ),
    "appended to": Damage(
        lambda root: append(root / "disks/sda"), ["wrong size: disks/sda"], cut_to_the_size_in_the_text
    ),
    "a fragment is gone": Damage(lambda root: (root / "clock").unlink(), ["missing: clock"], bring_back("clock")),
    "a namespace is gone": Damage(
        lambda root: shutil.rmtree(root / "disks"), ["missing: disks", "missing: disks/sda"], bring_back("disks")
    ),
    "two for each other": Damage(rename_both, ["swapped: clock", "swapped: mem_metadata"], rename_both),
    "one too many": Damage(lambda root: (root / "more").touch(), ["extra: more"], move_away("more")),
    "a link": Damage(lambda root: (root / "more").symlink_to("clock"), ["link: more"], move_away("more")),
    "a pipe": Damage(lambda root: os.mkfifo(root / "more"), ["special file: more"], move_away("more")),
    "a name in Latin-1": Damage(
        lambda root: (root / os.fsdecode(b"\xe9")).touch(),
        ["not UTF-8: \N{REPLACEMENT CHARACTER}"],
        move_away("\udce9"),
    ),
    "what cannot be read": Damage(folder_for_key_metadata, ["unreadable: enc_metadata"], file_for_key_metadata),
    "a bit of the key metadata": Damage(
        lambda root: flip(root / "enc_metadata"), ["not authentic: enc_metadata"], bring_back("enc_metadata")
    ),
    "no key metadata": Damage(
        lambda root: os.truncate(root / "enc_metadata", 0),
        ["bad key metadata: enc_metadata"],
        bring_back("enc_metadata"),
    ),
    "key metadata of another": Damage(
        other_key_metadata,
        [f"not authentic: {name}" for name in [*FRAGMENTS, "vmsnap_manifest"]],
        bring_back("enc_metadata"),
    ),
    "the manifest is gone": Damage(
        lambda root: (root / "vmsnap_manifest").unlink(), ["missing: vmsnap_manifest"], bring_back("vmsnap_manifest")
    ),
    "a bit of the manifest": Damage(
        lambda root: flip(root / "vmsnap_manifest"), ["not authentic: vmsnap_manifest"], bring_back("vmsnap_manifest")
    ),
    "a plain manifest is cut off": Damage(
        lambda root: os.truncate(root / "vmsnap_manifest", 50),
        ["bad manifest: vmsnap_manifest"],
        bring_back("vmsnap_manifest"),
        key=None,
    ),
}


def told(root: Path, key: bytes | None) -> tuple[int, list[str]]:
    """The exit status of the page's `vmsnap verify`, and the problems that it names."""
    [command] = commands(blocks(PAGE, "sh")[0])
    command = command.replace("vm1", root.name)
    if key is None:
        command = command.replace(" --key-file vm.key", "")
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=root.parent, capture_output=True, text=True)
    problems = re.findall(r"^([a-zA-Z0-9 -]+: [^:]+): ", done.stderr, re.MULTILINE)
    return done.returncode, [problem for problem in problems if not problem.startswith(("not checked", "vmsnap"))]


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_the_damage_and_the_remedy_is_one(folder: Path, name: str) -> None:
    damage = DAMAGES[name]
    root = folder / "vm1"
    if damage.key is None:
        shutil.rmtree(root)
        make(root, None)
    shutil.copytree(root, folder / "copy")
    assert told(root, damage.key) == (0, [])
    damage.do(root)
    assert told(root, damage.key) == (1, damage.told)
    # Each is a row of the table: the problem and its subject.
    table = text_of(PAGE, "What is wrong?")
    for problem in damage.told:
        assert f"`{problem.partition(': ')[0]}`" in table
    damage.remedy(root)
    assert told(root, damage.key) == (0, [])


def test_the_table_has_every_problem_that_there_is() -> None:
    table = text_of(PAGE, "What is wrong?")
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    named = {kind for cell in cells for kind in re.findall("`([^`]+)`", cell)}
    documented = (vmsnap.Problem.__doc__ or "").partition("kind\n")[2].partition("text\n")[0]
    assert named == set(re.findall("``([^`]+)``", documented))
    tried = {problem.partition(": ")[0] for damage in DAMAGES.values() for problem in damage.told}
    assert named - tried == {"not sealed"}


def test_one_written_in_place_is_not_sealed_and_that_is_all(folder: Path) -> None:
    make(folder / "in-place", KEY, in_place=True)
    assert told(folder / "in-place", KEY) == (1, ["not sealed: vmsnap_manifest"])


def test_without_the_key_verify_says_what_it_did_not_check(folder: Path) -> None:
    done = run("verify", folder / "vm1", status=1)
    assert b"not checked: the list of fragments and their contents, without the key" in done.stderr


def test_beside_a_damaged_fragment_the_others_read_and_lists_end(folder: Path) -> None:
    root, opened = folder / "vm1", ["--key-file", folder / "vm.key"]
    os.truncate(root / "disks/sda", 100_000)
    assert run("show", root, "clock", *opened).stdout == b"12\n"
    assert run("peek", root, "0x1000", "16", *opened).stdout
    for command in ("ls", "tree", "info"):
        assert "disks" in error_of(run(command, root, *opened, status=4)), command
    assert set(vmsnap.verify(root, key=KEY).fragments) == set(FRAGMENTS)


@pytest.mark.parametrize("name", ["a link", "a pipe", "a name in Latin-1"])
def test_lists_end_at_what_no_snapshot_has(folder: Path, name: str) -> None:
    DAMAGES[name].do(folder / "vm1")
    error_of(run("ls", folder / "vm1", "--key-file", folder / "vm.key", status=4))
    assert vmsnap.open(folder / "vm1", key=KEY).read_fragment("clock") == 12


# A damaged fragment, damaged guest memory ----------------------------------------------------------------------------

LOST = 7


@pytest.fixture
def damaged(folder: Path) -> Path:
    """`vm1` with a bit changed in one segment of the disk, and in one of the memory."""
    flip(folder / "vm1/disks/sda", segment_offset(LOST, DEFAULT_CHUNK_SIZE_BYTES) + 20)
    flip(folder / "vm1/mem", 100_000)
    return folder


def test_of_a_damaged_fragment_all_but_one_segment_is_saved(damaged: Path) -> None:
    printed = python(blocks(PAGE, "python", "A damaged fragment")[0], damaged)
    offset = LOST * DEFAULT_CHUNK_SIZE_BYTES
    assert printed == f"lost, as zeros: [{offset}]\n"
    rest = DISK[offset + DEFAULT_CHUNK_SIZE_BYTES :]
    assert (damaged / "sda.img").read_bytes() == DISK[:offset] + bytes(DEFAULT_CHUNK_SIZE_BYTES) + rest
    # The statements of the page on the sizes of segments.
    assert DEFAULT_CHUNK_SIZE_BYTES == 4096
    (damaged / "ram.img").write_bytes(RAM)
    run("dump", damaged / "ram.img", damaged / "vm5", "--key-file", damaged / "vm.key")
    with vmsnap.open(damaged / "vm5", key=KEY).raw_fragment("mem") as fragment:
        assert fragment.chunk_size_bytes == 16384
    run("put", damaged / "ram.img", damaged / "vm6", "ram", "--create", "--key-file", damaged / "vm.key")
    with vmsnap.open(damaged / "vm6", key=KEY).raw_fragment("ram") as fragment:
        assert fragment.chunk_size_bytes == 65536


def test_commands_end_at_a_damaged_segment_and_copy_a_part_that_is_whole(folder: Path) -> None:
    opened = ["--key-file", folder / "vm.key"]
    flip(folder / "vm1/disks/sda", segment_offset(16, DEFAULT_CHUNK_SIZE_BYTES) + 20)
    run("cat", folder / "vm1", "disks/sda", *opened, status=3)
    run("get", folder / "vm1", "disks/sda", folder / "out.img", *opened, status=3)
    assert not (folder / "out.img").exists()
    [command] = blocks(PAGE, "sh", "A damaged fragment")
    shell(command, folder)
    assert (folder / "beginning.img").read_bytes() == DISK[:65536]


@pytest.mark.parametrize("offset", [70, -1], ids=["the header", "the last segment"])
def test_a_fragment_without_its_header_or_last_segment_does_not_open(folder: Path, offset: int) -> None:
    flip(folder / "vm1/disks/sda", offset)
    disks = vmsnap.open(folder / "vm1", key=KEY).namespace("disks")
    with pytest.raises((vmsnap.AuthenticationError, vmsnap.CorruptSnapshotError)):
        disks.raw_fragment("sda")


def test_of_one_that_is_cut_off_only_a_plain_file_is_left(folder: Path) -> None:
    make(folder / "plain", None)
    for root, key in ((folder / "vm1", KEY), (folder / "plain", None)):
        os.truncate(root / "disks/sda", 100_000)
        with pytest.raises(vmsnap.CorruptSnapshotError):
            vmsnap.open(root, key=key).namespace("disks").raw_fragment("sda")
    assert (folder / "plain/disks/sda").read_bytes() == DISK[:100_000]


def test_of_a_plain_fragment_only_verify_tells(folder: Path) -> None:
    make(folder / "plain", None)
    flip(folder / "plain/disks/sda", 100_000)
    assert len(run("cat", folder / "plain", "disks/sda").stdout) == len(DISK)
    assert told(folder / "plain", None) == (1, ["changed: disks/sda"])


def test_of_damaged_memory_all_pages_but_those_of_lost_blocks_are_saved(damaged: Path) -> None:
    start = blocks(PAGE, "python", "A damaged fragment")[0].partition("lost = []")[0]
    printed = python(start + blocks(PAGE, "python", "Damaged guest memory")[0], damaged)
    lost = [int(address, 16) for address in re.findall("0x([0-9a-f]+)", printed)]
    # Two bytes of memory are one of `mem`: a segment of 64 KiB has parts of three or four blocks of 64 KiB at most.
    assert 16 <= len(lost) <= 64
    image = (damaged / "0000000000000000.img").read_bytes()
    assert len(image) == len(RAM)
    for address in range(0, len(RAM), 4096):
        expected = bytes(4096) if address in lost else RAM[address : address + 4096]
        assert image[address : address + 4096] == expected, hex(address)
    assert (damaged / "0000000000000000.img").stat().st_blocks * 512 < len(RAM) * 3 // 4
    run("peek", damaged / "vm1", "0", "4096", "--key-file", damaged / "vm.key")
    run("peek", damaged / "vm1", str(lost[0]), "4096", "--key-file", damaged / "vm.key", status=3)


# Keys ----------------------------------------------------------------------------------------------------------------


def test_which_kind_of_key_is_lost_shows_without_it(folder: Path) -> None:
    assert "key wrapped by\ta 32-byte key\n" in shell(blocks(PAGE, "sh", "A lost key")[0], folder).stdout


def test_a_wrong_key_and_damaged_key_metadata_look_the_same(folder: Path) -> None:
    texts = []
    for key, damage in ((KEY[::-1], False), (KEY, True)):
        if damage:
            flip(folder / "vm1/enc_metadata")
        with pytest.raises(vmsnap.AuthenticationError) as error:
            vmsnap.open(folder / "vm1", key=key)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_a_pickled_handle_opens_what_its_key_is_lost_of(folder: Path) -> None:
    pickled = pickle.dumps(vmsnap.open(folder / "vm1", key=KEY))
    (folder / "vm1/enc_metadata").unlink()
    assert pickle.loads(pickled).read_fragment("clock") == 12


def test_key_metadata_is_brought_back_from_its_copy(folder: Path) -> None:
    [keep], [restore] = map(commands, blocks(PAGE, "sh", "The key metadata")[:2])
    shell(keep, folder)
    assert (folder / "vm1.enc_metadata").stat().st_size < 1000
    (folder / "vm1/enc_metadata").unlink()
    opened = ["--key-file", folder / "vm.key"]
    assert "is not encrypted" in error_of(run("ls", folder / "vm1", *opened, status=3))
    shell(restore, folder)
    assert told(folder / "vm1", KEY) == (0, [])
    # After a rekey the copy is unchanged: it opens with the old key.
    other = vmsnap.generate_key()
    vmsnap.rekey(folder / "vm1", key=KEY, new_key=other)
    assert vmsnap.open(folder / "vm1", key=other).read_fragment("clock") == 12
    assert told(folder / "vm1", KEY) == (1, ["not authentic: enc_metadata"])
    shell(restore, folder)
    assert told(folder / "vm1", KEY) == (0, [])


def test_a_second_one_for_another_key_opens_when_the_first_is_lost(folder: Path) -> None:
    prepare, [restore, verify] = map(commands, blocks(PAGE, "sh", "The key metadata")[2:])
    for command in prepare:
        shell(command, folder)
    assert told(folder / "vm1", KEY) == (0, [])
    (folder / "vm.key").unlink()
    shell(restore, folder)
    assert "\nok: 4 fragments" in shell(verify, folder).stdout


# The manifest --------------------------------------------------------------------------------------------------------


def test_the_manifest_is_brought_back_from_its_copy(folder: Path) -> None:
    [keep], [restore] = map(commands, blocks(PAGE, "sh", "The manifest")[:2])
    shell(keep, folder)
    (folder / "vm1/vmsnap_manifest").unlink()
    with pytest.raises(vmsnap.CorruptSnapshotError, match="not complete"):
        vmsnap.open(folder / "vm1", key=KEY)
    # Its fragments are read all the same.
    assert set(vmsnap.verify(folder / "vm1", key=KEY).fragments.values()) == {"ok"}
    shell(restore, folder)
    assert told(folder / "vm1", KEY) == (0, [])


@pytest.mark.parametrize(("key", "in_place"), [(None, False), (None, True), (KEY, True)])
def test_without_its_manifest_a_plain_one_and_one_written_in_place_open(
    folder: Path, key: bytes | None, in_place: bool
) -> None:
    root = folder / "vm2"
    make(root, key, in_place=in_place)
    if in_place:
        vmsnap.seal(root, key=key)
    flip(root / "vmsnap_manifest", 5)
    with pytest.raises(vmsnap.VmsnapError):
        vmsnap.open(root, key=key)
    (root / "vmsnap_manifest").rename(folder / "damaged manifest")
    assert vmsnap.open(root, key=key).read_fragment("clock") == 12
    (root / "clock").unlink()
    assert told(root, key) == (1, ["not sealed: vmsnap_manifest"])
    [command] = commands(blocks(PAGE, "sh", "The manifest")[2])
    shell(command if key is None else f"{command} --key-file vm.key", folder)
    assert told(root, key) == (0, [])


# Never committed -----------------------------------------------------------------------------------------------------

WRITER = """
import sys, vmsnap
held = eval(sys.argv[1])
writer = getattr(held, "writer", held)
writer.write_fragment("clock", 12)
unfinished = writer.raw_fragment("ram")
unfinished.write(bytes(1 << 20))
print("written", flush=True)
sys.stdin.read()
"""


@contextmanager
def writing(folder: Path, how: str) -> Iterator[None]:
    """A process that has a snapshot half-written, and is killed at the end."""
    command = [sys.executable, "-c", WRITER, how]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        yield
        process.kill()


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_holds_is_not(folder: Path) -> None:
    clean, clean_snapshot = commands(blocks(PAGE, "sh", "Never committed")[0])
    with writing(folder, f"vmsnap.create('vm3', key={KEY!r})"):
        assert "kept, in use" in shell(clean, folder).stderr
        [staged] = folder.glob(".vmsnap-*")
    assert re.fullmatch(r"\.vmsnap-[0-9a-f]{16}", staged.name)
    assert not (folder / "vm3").exists()
    with pytest.raises(vmsnap.CorruptSnapshotError, match="not complete"):
        vmsnap.open(staged, key=KEY)
    shell(clean, folder)
    assert not staged.exists()
    assert told(folder / "vm1", KEY) == (0, [])

    # As a `rekey` that is killed leaves it.
    left = folder / "vm1/.vmsnap-0123456789abcdef"
    left.touch()
    assert told(folder / "vm1", KEY) == (1, [f"extra: {left.name}"])
    shell(clean_snapshot, folder)
    assert told(folder / "vm1", KEY) == (0, [])


def test_in_a_plain_one_the_files_are_the_fragments_and_a_mode_tells_which_is_not_finished(folder: Path) -> None:
    with writing(folder, "vmsnap.create('vm3')"):
        pass
    [staged] = folder.glob(".vmsnap-*")
    assert cbor2.loads((staged / "clock").read_bytes()) == 12
    readable = {path.name: bool(path.stat().st_mode & 0o400) for path in staged.iterdir()}
    assert readable == {"clock": True, "ram": False}


def test_one_written_in_place_stays_as_far_as_it_came(folder: Path) -> None:
    for root, key in ((folder / "vm3", KEY), (folder / "vm4", None)):
        with writing(folder, f"vmsnap.SnapshotWriter({root.name!r}, key={key!r})"):
            pass
        assert vmsnap.open(root, key=key).read_fragment("clock") == 12
    # The stored part depends on when the process was killed: perhaps only a header.
    not_finished = (vmsnap.AuthenticationError, vmsnap.CorruptSnapshotError)
    with pytest.raises(not_finished):
        vmsnap.open(folder / "vm3", key=KEY).raw_fragment("ram")
    with pytest.raises(not_finished):
        vmsnap.seal(folder / "vm3", key=KEY)
    (folder / "vm3/ram").unlink()
    vmsnap.seal(folder / "vm3", key=KEY)
    vmsnap.seal(folder / "vm4")


# The rest ------------------------------------------------------------------------------------------------------------


def test_a_newer_format_says_so(folder: Path) -> None:
    make(folder / "vm2", None)
    manifest = folder / "vm2/vmsnap_manifest"
    manifest.write_bytes(cbor2.dumps(cbor2.loads(manifest.read_bytes()) | {"version": 2}))
    assert "install a newer one" in error_of(run("ls", folder / "vm2", status=4))


def test_the_reader_in_python_needs_no_vmsnap(folder: Path) -> None:
    for module in (REPOSITORY / "examples/readers/python").glob("*.py"):
        shutil.copy(module, folder)
    # It is beside the script and found first, so that vmsnap could not be imported.
    (folder / "vmsnap.py").write_text("raise ImportError('there is no vmsnap')")
    check, cat, restore = commands(blocks(PAGE, "sh", "Without vmsnap")[0])
    printed = shell(check, folder).stdout
    assert [line.rpartition("\t")[2] for line in printed.splitlines() if line.startswith("ok\t")] == FRAGMENTS
    shell(cat, folder)
    assert (folder / "sda.img").read_bytes() == DISK
    shell(restore, folder)
    assert (folder / "ram/0000000000000000").read_bytes() == RAM
    flip(folder / "vm1/clock")
    shell(check, folder, status=1)


def test_tar_unpacks_an_archive(folder: Path) -> None:
    run("pack", folder / "vm1", folder / "vm1.vmsnap.tar", "--key-file", folder / "vm.key")
    printed = shell(blocks(PAGE, "sh", "Without vmsnap")[1], folder).stdout
    assert "\nok: 4 fragments checked" in printed


def test_a_backup_is_made_restored_and_compared(folder: Path) -> None:
    lines = commands(blocks(PAGE, "sh", "Backups")[0])
    printed = shell("\n".join([*lines, 'echo "digest: $digest"']), folder).stdout
    [digest] = re.findall("^digest: ([0-9a-f]{64})$", printed, re.MULTILINE)
    assert "\nok: 4 fragments" in printed
    # Another snapshot in its place is refused, and `rekey` changes nothing of that.
    shutil.rmtree(folder / "restored/vm1")
    make(folder / "restored/vm1", KEY)
    verify = lines[-1].replace('"$digest"', digest)
    assert "bad manifest: vmsnap_manifest" in shell(verify, folder, status=1).stderr
    vmsnap.rekey(folder / "vm1", key=KEY, new_key=KEY[::-1])
    assert vmsnap.verify(folder / "vm1", key=KEY[::-1], expect_seal_digest=digest).ok
