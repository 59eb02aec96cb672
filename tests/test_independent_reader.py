"""Other readers and writers of the format: the one in examples/readers/python, the one by hand, and both providers."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import floe
import pytest
import vmsnap
from hypothesis import example, given, settings
from hypothesis import strategies as st
from independent import READER_PROGRAM, all_fragments, check_independently, vmsnap_reader
from support import MIB, Place, pattern, read, run_python_well, temporary_place, write

FORMAT_PAGE = READER_PROGRAM.parents[3] / "docs/format.md"
PROVIDERS = ["aws-lc", "aes-gcm"]


@pytest.fixture
def place(tmp_path: Path, key: bytes) -> Place:
    return Place(tmp_path / "vm1", key)


# Known answers -------------------------------------------------------------------------------------------------------

VECTOR_KEY = bytes(32)
VECTOR_AAD = b"This is AAD"
VECTORS = [
    *(f"{code}_GCM256_IV256_{size}" for code in ("cpp", "go", "java", "pub_java", "rust") for size in ("4K", "64")),
    "java_lastSegAligned",
    "java_lastSegEmpty",
]


def vector(shared_dir: Path, name: str) -> tuple[bytes, bytes]:
    """A ciphertext and its plaintext."""
    files = [shared_dir / "vectors/floe" / f"{name}_{part}.txt" for part in ("ct", "pt")]
    ciphertext, plaintext = (bytes.fromhex(file.read_text()) for file in files)
    return ciphertext, plaintext


def test_all_known_answers_are_in_the_list(shared_dir: Path) -> None:
    files = (shared_dir / "vectors/floe").glob("*_ct.txt")
    assert sorted(f"{name}_ct.txt" for name in VECTORS) == sorted(file.name for file in files)


@pytest.mark.parametrize("name", VECTORS)
def test_the_independent_reader_opens_a_known_answer_and_refuses_it_changed(shared_dir: Path, name: str) -> None:
    ciphertext, plaintext = vector(shared_dir, name)
    assert vmsnap_reader.floe_decrypt(VECTOR_KEY, VECTOR_AAD, ciphertext) == plaintext
    for position in {*range(0, len(ciphertext), max(1, len(ciphertext) // 100)), len(ciphertext) - 1}:
        changed = bytearray(ciphertext)
        changed[position] ^= 1
        with pytest.raises(vmsnap_reader.FormatError):
            vmsnap_reader.floe_decrypt(VECTOR_KEY, VECTOR_AAD, bytes(changed))
    for key, aad, data in (
        (bytes(31) + b"\x01", VECTOR_AAD, ciphertext),
        (VECTOR_KEY, VECTOR_AAD + b".", ciphertext),
        (VECTOR_KEY, VECTOR_AAD, ciphertext[:-1]),
        (VECTOR_KEY, VECTOR_AAD, ciphertext + b"\0"),
    ):
        with pytest.raises(vmsnap_reader.FormatError):
            vmsnap_reader.floe_decrypt(key, aad, data)


@pytest.mark.parametrize("name", VECTORS)
def test_sealing_by_hand_gives_the_header_and_the_lengths_of_the_known_answer(shared_dir: Path, name: str) -> None:
    ciphertext, plaintext = vector(shared_dir, name)
    chunk = int.from_bytes(ciphertext[2:6], "big") - 32
    empty_last = name == "java_lastSegEmpty"
    iv = ciphertext[10:42]
    sealed = floe.seal(VECTOR_KEY, VECTOR_AAD, plaintext, chunk, iv=iv, empty_last_segment=empty_last)
    assert sealed[:74] == ciphertext[:74]
    assert len(sealed) == len(ciphertext)
    assert vmsnap_reader.floe_decrypt(VECTOR_KEY, VECTOR_AAD, sealed) == plaintext


# The page itself -----------------------------------------------------------------------------------------------------


def worked_example(heading: str) -> bytes:
    """The hex digits of the last block under a heading of docs/format.md."""
    section = FORMAT_PAGE.read_text().split(f"### {heading}", 1)[1].split("\n### ", 1)[0]
    return bytes.fromhex(re.findall(r"```\n(.*?)```", section, re.DOTALL)[-1])


@pytest.fixture
def place_on_the_page(tmp_path: Path) -> Place:
    place = Place(tmp_path / "example", b"\x11" * 32)
    place.file("vm").mkdir(parents=True)
    place.file("vm/blob").write_bytes(worked_example("`vm/blob`"))
    place.file("vm/empty").write_bytes(worked_example("`vm/empty`"))
    place.file("enc_metadata").write_bytes(worked_example("`enc_metadata`"))
    return place


def test_the_example_on_the_format_page_is_a_snapshot(place_on_the_page: Place) -> None:
    expected = {"vm/blob": bytes(range(40)), "vm/empty": b""}
    check_independently(place_on_the_page.location, place_on_the_page.key, expected)


def test_the_example_on_the_format_page_is_what_sealing_by_hand_gives(place_on_the_page: Place) -> None:
    def sealed(key: bytes, aad: bytes, data: bytes, chunk: int) -> bytes:
        return floe.seal(key, aad, data, chunk, iv=bytes(32), counted_nonces=True)

    for path, data in (("vm/blob", bytes(range(40))), ("vm/empty", b"")):
        assert place_on_the_page.file(path).read_bytes() == sealed(bytes(32), floe.fragment_aad(path), data, 32)
    payload = floe.cbor(floe.payload_with(data_key=bytes(32)))
    assert place_on_the_page.file("enc_metadata").read_bytes() == sealed(
        b"\x11" * 32, floe.KEY_AAD, payload, floe.KEY_CHUNK_BYTES
    )


def test_the_independent_reader_needs_nothing_but_cryptography() -> None:
    imported, own = set(), {file.stem for file in READER_PROGRAM.parent.glob("*.py")}
    for file in READER_PROGRAM.parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or ".").partition(".")[0])
    assert imported - sys.stdlib_module_names - own == {"cryptography"}


# Readers and writers --------------------------------------------------------------------------------------------------

CHUNKS = [32, 33, 4096, 65536, MIB, MIB + 1]


def lengths(chunk: int) -> list[int]:
    return sorted({0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 7 * chunk + 5, (256 << 10) + 1, MIB + 1})


EVERYTHING = {f"chunks of {chunk}/{length}": pattern(length) for chunk in CHUNKS for length in lengths(chunk)}

OTHER_PROVIDER = """
import json, os, sys, vmsnap
sys.path.insert(0, sys.argv[1])
from support import pattern
root, key = sys.argv[2], bytes.fromhex(sys.argv[3])
assert vmsnap.aead_provider() == os.environ["VMSNAP_AEAD"]
"""

WRITE_EVERYTHING = """
writer = vmsnap.SnapshotWriter(root, key=key)
for chunk, lengths in json.loads(sys.argv[4]):
    namespace = writer.add_namespace(f"chunks of {chunk}")
    for length in lengths:
        with namespace.raw_fragment(str(length), chunk_size_bytes=chunk) as fragment:
            fragment.write(pattern(length))
"""

READ_EVERYTHING = """
reader, count = vmsnap.SnapshotReader(root, key=key), 0
for name in reader.list_namespaces():
    for length in reader.namespace(name).list_fragments():
        data = pattern(int(length))
        with reader.namespace(name).raw_fragment(length) as fragment:
            assert fragment.read() == data, (name, length)
            assert fragment.read_at(len(data) // 2, 100) == data[len(data) // 2 :][:100], (name, length)
        count += 1
print(count)
"""


@pytest.fixture(scope="module", params=PROVIDERS)
def written_by_either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A snapshot with all chunk sizes and lengths, written by one provider."""
    key = vmsnap.generate_key()
    root = tmp_path_factory.mktemp(request.param) / "vm1"
    plan = json.dumps([(chunk, lengths(chunk)) for chunk in CHUNKS])
    script = OTHER_PROVIDER + WRITE_EVERYTHING
    run_python_well(script, Path(__file__).parent, root, key.hex(), plan, VMSNAP_AEAD=request.param)
    return Place(root, key)


def test_the_independent_reader_reads_what_either_provider_writes(written_by_either: Place) -> None:
    check_independently(written_by_either.location, written_by_either.key, EVERYTHING)


@pytest.mark.parametrize("reading", PROVIDERS)
def test_either_provider_reads_what_either_writes(written_by_either: Place, reading: str) -> None:
    assert written_by_either.key is not None
    arguments = (Path(__file__).parent, written_by_either.location, written_by_either.key.hex())
    count = run_python_well(OTHER_PROVIDER + READ_EVERYTHING, *arguments, VMSNAP_AEAD=reading)
    assert int(count) == len(EVERYTHING)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_either_provider_reads_what_was_sealed_by_hand(tmp_path: Path, key: bytes, provider: str) -> None:
    place = Place(tmp_path / "vm1", key)
    place.location.mkdir()
    place.file("enc_metadata").write_bytes(floe.key_metadata(key, floe.payload_fields()))
    count = 0
    for chunk in (32, 33, 4096):
        place.file(f"chunks of {chunk}").mkdir()
        for length in (0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 7 * chunk + 5):
            path = f"chunks of {chunk}/{length}"
            sealed = floe.seal(floe.DATA_KEY, floe.fragment_aad(path), pattern(length), chunk)
            place.file(path).write_bytes(sealed)
            count += 1
    arguments = (Path(__file__).parent, place.location, key.hex())
    assert int(run_python_well(OTHER_PROVIDER + READ_EVERYTHING, *arguments, VMSNAP_AEAD=provider)) == count
    check_independently(place.location, key)


@given(chunk=st.integers(32, 200), chunks=st.integers(0, 8), more=st.integers(0, 199), empty_last=st.booleans())
@example(chunk=32, chunks=0, more=0, empty_last=False)
@example(chunk=32, chunks=3, more=0, empty_last=True)
@settings(max_examples=60)
def test_what_is_sealed_by_hand_is_read_also_with_an_empty_last_segment(
    chunk: int, chunks: int, more: int, empty_last: bool
) -> None:
    data = pattern(chunk * chunks + (0 if empty_last else more % chunk))
    with temporary_place(encrypted=True) as place:
        assert place.key is not None
        place.location.mkdir()
        place.file("enc_metadata").write_bytes(floe.key_metadata(place.key, floe.payload_fields()))
        aad = floe.fragment_aad("mem")
        place.file("mem").write_bytes(floe.seal(floe.DATA_KEY, aad, data, chunk, empty_last_segment=empty_last))
        check_independently(place.location, place.key, {"mem": data})
        with place.open().raw_fragment("mem") as fragment:
            assert fragment.size == len(data)
            assert fragment.read_at(max(0, len(data) - 5), 100) == data[-5:]
            assert fragment.read_at(len(data), 100) == b""


def test_plain_snapshots_are_read_alike(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    write(writer, "mem", pattern(MIB + 5))
    write(writer.add_namespace("a").add_namespace("b"), "empty", b"")
    check_independently(tmp_path / "vm1", None, {"mem": pattern(MIB + 5), "a/b/empty": b""})


def test_snapshots_of_crosvm_are_read_alike(shared_dir: Path) -> None:
    roots = [file.parent / "snapshot" for file in (shared_dir / "golden").rglob("expected.json")]
    assert roots
    for root in roots:
        check_independently(root, None)


# Payloads ------------------------------------------------------------------------------------------------------------


def accepted(place: Place, payload: object) -> tuple[bool, bool]:
    """Whether vmsnap, and the independent reader, accept a payload; where both do, they found the same data key."""
    assert place.key is not None
    place.location.mkdir(exist_ok=True)
    place.file("enc_metadata").write_bytes(floe.key_metadata(place.key, payload))
    place.file("mem").write_bytes(floe.seal(floe.DATA_KEY, floe.fragment_aad("mem"), b"by hand", 32))
    ours = theirs = None
    try:
        reader = place.open()
        try:
            ours = read(reader, "mem")
        except vmsnap.AuthenticationError:
            ours = b"another data key"
    except (vmsnap.CorruptSnapshotError, vmsnap.UnsupportedFormatError):
        pass
    try:
        snapshot = vmsnap_reader.open_snapshot(place.location, place.key)
        try:
            theirs = snapshot.read("mem")
        except vmsnap_reader.AuthenticationError:
            theirs = b"another data key"
    except vmsnap_reader.FormatError:
        pass
    assert ours == theirs or ours is None or theirs is None
    return ours is not None, theirs is not None


@pytest.mark.parametrize("what", floe.UNUSUAL_PAYLOADS)
def test_an_unusual_payload_is_accepted_by_both(place: Place, what: str) -> None:
    assert accepted(place, floe.UNUSUAL_PAYLOADS[what]) == (True, True)


@pytest.mark.parametrize("what", floe.MALFORMED_PAYLOADS)
def test_a_malformed_payload_is_refused_by_both(place: Place, what: str) -> None:
    assert accepted(place, floe.MALFORMED_PAYLOADS[what]) == (False, False)


GOOD_PAYLOAD = floe.cbor(floe.payload_with(hint=[{"a": 1, "b": b"2"}, "three", -4]))


@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD_PAYLOAD) - 1), st.integers(0, 2), st.binary(min_size=1, max_size=2)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=300, derandomize=True)
def test_both_agree_on_any_changed_payload(changes: list[tuple[int, int, bytes]]) -> None:
    payload = GOOD_PAYLOAD
    for position, removed, added in changes:
        payload = payload[:position] + added + payload[position + removed :]
    with temporary_place(encrypted=True) as place:
        ours, theirs = accepted(place, payload)
        assert ours == theirs, payload.hex()


# Mischief ------------------------------------------------------------------------------------------------------------


def read_by_vmsnap(place: Place) -> dict[str, bytes]:
    return {path: read(reader, path.rpartition("/")[2]) for path, reader in all_fragments(place.open()).items()}


def read_by_the_other(place: Place) -> dict[str, bytes]:
    snapshot = vmsnap_reader.open_snapshot(place.location, place.key)
    return {path: snapshot.read(path) for path in snapshot.fragments()}


def exchange(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def another_snapshot(place: Place) -> Place:
    other = Place(place.location.parent / "vm2", place.key)
    write(other.create().add_namespace("disks"), "sda", pattern(100))
    return other


def key_metadata_becomes(make: Callable[[Path], object]) -> Callable[[Place], None]:
    def mischief(place: Place) -> None:
        place.file("enc_metadata").rename(place.location.parent / "true metadata")
        make(place.file("enc_metadata"))

    return mischief


def key_metadata_holds(contents: bytes) -> Callable[[Place], object]:
    return lambda place: place.file("enc_metadata").write_bytes(contents)


MISCHIEF: dict[str, Callable[[Place], object]] = {
    "two fragments swapped": lambda place: exchange(place.file("disks/sda"), place.file("disks/sdb")),
    "swapped between namespaces": lambda place: exchange(place.file("disks/sda"), place.file("sda")),
    "renamed": lambda place: place.file("disks/sda").rename(place.file("disks/sdc")),
    "moved": lambda place: place.file("disks/sda").rename(place.file("sdc")),
    "the namespace renamed": lambda place: place.file("disks").rename(place.file("disk")),
    "of another snapshot": lambda place: exchange(place.file("disks/sda"), another_snapshot(place).file("disks/sda")),
    "a plain file": lambda place: place.file("mem").write_bytes(pattern(500)),
    "a short plain file": lambda place: place.file("mem").write_bytes(b"x"),
    "an empty file": lambda place: place.file("mem").write_bytes(b""),
    "a segment longer than any": lambda place: place.file("sda").write_bytes(
        floe.seal(floe.DATA_KEY, floe.fragment_aad("sda"), b"", (64 << 20) + 1)
    ),
    "a link": lambda place: place.file("mem").symlink_to("sda"),
    "a link that leads nowhere": lambda place: place.file("mem").symlink_to("nowhere"),
    "a link to a folder": lambda place: place.file("mem").symlink_to("disks"),
    "a FIFO": lambda place: os.mkfifo(place.file("mem")),
    "a name with a backslash": lambda place: place.file("disks/sda").rename(place.file("disks/a\\b")),
    "no key metadata": lambda place: place.file("enc_metadata").unlink(),
    "key metadata of another": lambda place: exchange(
        place.file("enc_metadata"), another_snapshot(place).file("enc_metadata")
    ),
    "key metadata is a link": key_metadata_becomes(lambda path: path.symlink_to("../true metadata")),
    "key metadata is a link that leads nowhere": key_metadata_becomes(lambda path: path.symlink_to("nowhere")),
    "key metadata is a folder": key_metadata_becomes(Path.mkdir),
    "key metadata is a FIFO": key_metadata_becomes(os.mkfifo),
    "key metadata is empty": key_metadata_holds(b""),
    "key metadata is not wrapped": key_metadata_holds(floe.cbor(floe.payload_fields())),
    "key metadata is age": key_metadata_holds(b"age-encryption.org/v1\n"),
    "key metadata of a service": key_metadata_holds(b"\xd9\xd9\xf7\xa0"),
    "too much key metadata": lambda place: os.truncate(place.file("enc_metadata"), 2 * MIB),
    "key metadata of another segment length": lambda place: place.file("enc_metadata").write_bytes(
        floe.seal(place.key or b"", floe.KEY_AAD, floe.cbor(floe.payload_fields()), 1023)
    ),
}


@pytest.mark.parametrize("what", MISCHIEF)
def test_what_vmsnap_refuses_the_independent_reader_refuses(place: Place, what: str) -> None:
    writer = write(place.create(), "sda", pattern(100, seed=1), 32)
    write(write(writer.add_namespace("disks"), "sda", pattern(100), 32), "sdb", pattern(100, seed=2), 32)
    assert read_by_vmsnap(place) == read_by_the_other(place)
    MISCHIEF[what](place)
    with pytest.raises((vmsnap.VmsnapError, OSError)):
        read_by_vmsnap(place)
    with pytest.raises(vmsnap_reader.FormatError):
        read_by_the_other(place)


def test_an_entry_that_is_not_utf_8_is_refused_by_both(place: Place) -> None:
    write(place.create(), "mem", b"x")
    with open(os.fsencode(place.location) + b"/\xff", "wb"):
        pass
    with pytest.raises(vmsnap.CorruptSnapshotError):
        read_by_vmsnap(place)
    with pytest.raises(vmsnap_reader.FormatError):
        read_by_the_other(place)


def test_a_file_changed_in_any_byte_or_length_is_refused_by_both(place: Place) -> None:
    write(place.create(), "mem", pattern(70), 32)
    for name in ("mem", "enc_metadata"):
        stored = place.file(name).read_bytes()
        variants = [stored[:length] for length in range(len(stored))]
        variants += [stored + bytes(more) for more in (1, 31, 32, 33, 64)]
        for position in range(len(stored)):
            changed = bytearray(stored)
            changed[position] ^= 1 << position % 8
            variants.append(bytes(changed))
        for variant in variants:
            place.file(name).write_bytes(variant)
            with pytest.raises(vmsnap.VmsnapError):
                read_by_vmsnap(place)
            with pytest.raises(vmsnap_reader.FormatError):
                read_by_the_other(place)
        place.file(name).write_bytes(stored)
    assert read_by_vmsnap(place) == read_by_the_other(place) == {"mem": pattern(70)}


def test_names_kept_for_vmsnap_are_left_out_by_both(place: Place) -> None:
    writer = write(place.create(), "mem", b"x")
    write(writer.add_namespace("disks"), "sda", b"y")
    for folder in (place.location, place.file("disks")):
        (folder / ".vmsnap-0123456789abcdef").mkdir()
        (folder / ".vmsnap.tmp").symlink_to("nowhere")
        (folder / "Vmsnap_manifest").write_bytes(b"not for this version")
    place.file("disks/enc_metadata").write_bytes(b"left out")
    check_independently(place.location, place.key, {"mem": b"x", "disks/sda": b"y"})


# As a program --------------------------------------------------------------------------------------------------------


def run_reader(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    # Isolated except for its own directory, which must have all that it needs.
    command = [sys.executable, "-E", "-s", str(READER_PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True)


def test_the_independent_reader_is_a_program_that_lists_shows_and_checks(place: Place, tmp_path: Path) -> None:
    writer = write(place.create(), "mem", pattern(5000))
    write(writer.add_namespace("disks"), "sda", b"boot sector")
    assert place.key is not None
    key_file = tmp_path / "key"
    key_file.write_bytes(place.key)

    listed = run_reader(place.location, "--key-file", key_file, "list")
    assert [line.split() for line in listed.stdout.splitlines()] == [[b"11", b"disks/sda"], [b"5000", b"mem"]]
    assert run_reader(place.location, "--key-file", key_file, "cat", "disks/sda").stdout == b"boot sector"
    assert run_reader(place.location, "--key-file", key_file, "cat", "mem").stdout == pattern(5000)
    assert run_reader(place.location, "--key-file", key_file, "check").returncode == 0

    place.damage("mem", 100)
    checked = run_reader(place.location, "--key-file", key_file, "check")
    assert checked.returncode == 1
    assert checked.stdout.splitlines()[-1].startswith(b"refused\tauthentication\tmem\t")
    assert run_reader(place.location, "check").returncode == 1
