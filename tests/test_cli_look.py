"""Looking inside from the command line: `tree`, `show`, `info`, `ls -l`, `get`, `put`, completion and exit codes."""

import datetime
import errno
import json
import os
import pty
import re
import stat
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vmsnap
from commands import error_of, run, write_private
from support import MIB, Place, pattern, read, tree, write

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture
def place(tmp_path: Path, key: bytes) -> Place:
    """An encrypted snapshot with fragments at three levels."""
    place = Place(tmp_path / "vm", key)
    writer = write(place.create(), "clock", b"\x0c")
    write(writer.add_namespace("disks"), "sda", pattern(5000), 1024)
    write(writer.add_namespace("pci").add_namespace("00:1f.2"), "état", b"")
    return place


@pytest.fixture
def plain(tmp_path: Path) -> vmsnap.SnapshotWriter:
    return vmsnap.SnapshotWriter(tmp_path / "plain")


def text_of(*arguments: str | Path | int, **options: Any) -> str:
    return run(*arguments, **options).stdout.decode()


def json_of(*arguments: str | Path | int) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def shown(writer: vmsnap.SnapshotWriter, value: object, *options: str) -> str:
    """Return the output of `vmsnap show` for a value."""
    name = f"value {len(os.listdir(writer.path))}"
    writer.write_fragment(name, value)
    return text_of("show", writer.path, name, *options)


def screen(columns: int, *arguments: str | Path) -> str:
    """Return the output on a terminal of so many columns, without colours."""
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-m", "vmsnap", *map(str, arguments)], stdout=child, stderr=child, env=environment
    ) as command:
        os.close(child)
        sent = b""
        while piece := _read_terminal(parent):
            sent += piece
    os.close(parent)
    assert command.returncode == 0, sent
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode()).replace("\r\n", "\n")


def _read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError as error:
        # Linux says so where the other end has closed.
        if error.errno != errno.EIO:
            raise
        return b""


# ls ------------------------------------------------------------------------------------------------------------------


def test_ls_long_adds_stored_size_chunk_size_and_time(place: Place, key_file: Path) -> None:
    lines = [line.split("\t") for line in text_of("ls", place.location, "-l", "--key-file", key_file).splitlines()]
    assert [line[:4] for line in lines] == [
        ["clock", "1", "107", "4096"],
        ["disks/sda", "5000", str(74 + 5000 + 5 * 32), "1024"],
        ["pci/00:1f.2/état", "0", "106", "4096"],
    ]
    assert all(TIME.fullmatch(line[4]) for line in lines)
    os.utime(place.file("clock"), (0, 86400))
    assert json_of("ls", place.location, "--key-file", key_file)[0] == {
        "path": "clock",
        "size": 1,
        "stored_size": 107,
        "chunk_size_bytes": 4096,
        "modified": "1970-01-02T00:00:00Z",
    }


def test_ls_of_a_namespace_lists_that_one_by_full_paths(place: Place, key_file: Path) -> None:
    assert text_of("ls", place.location, "pci", "--key-file", key_file) == "pci/00:1f.2/état\t0\n"
    assert text_of("ls", place.location, "disks", "--key-file", key_file) == "disks/sda\t5000\n"
    assert "does not exist" in error_of(run("ls", place.location, "pci/none", "--key-file", key_file, status=1))


def test_a_plain_snapshot_has_no_chunk_sizes(plain: vmsnap.SnapshotWriter) -> None:
    write(plain, "a", b"12")
    assert re.fullmatch(rf"a\t2\t2\t-\t{TIME.pattern}\n", text_of("ls", plain.path, "-l"))
    assert json_of("ls", plain.path)[0]["chunk_size_bytes"] is None


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_columns_line_up_and_long_paths_stay_whole(plain: vmsnap.SnapshotWriter, columns: int) -> None:
    names = ["x" * 255, "世界" * 20, "[red]name", "short"]
    for name in names:
        write(plain, name, bytes(2000))
    header, *lines = screen(columns, "ls", "-l", plain.path).splitlines()
    assert header.split() == ["size", "stored", "chunk", "modified", "path"]
    assert [line[header.index("path") :] for line in lines] == sorted(names)


# tree ----------------------------------------------------------------------------------------------------------------


def test_tree_draws_namespaces_and_fragments_with_exact_sizes_into_a_pipe(place: Place, key_file: Path) -> None:
    drawn = text_of(
        "tree", place.location.name, "--key-file", key_file, cwd=place.location.parent, env={"COLUMNS": "20"}
    )
    assert drawn == (
        "vm  3 fragments, 5001 bytes\n"
        "├── clock  1 byte\n"
        "├── disks/  1 fragment, 5000 bytes\n"
        "│   └── sda  5000 bytes\n"
        "└── pci/  1 fragment, 0 bytes\n"
        "    └── 00:1f.2/  1 fragment, 0 bytes\n"
        "        └── état  0 bytes\n"
    )
    assert text_of("tree", place.location, "pci/00:1f.2", "--key-file", key_file).endswith("\n└── état  0 bytes\n")


def test_tree_as_json_nests_objects(place: Place, key_file: Path) -> None:
    root = json_of("tree", place.location, "--key-file", key_file)
    assert (root["name"], root["path"]) == ("", "")
    assert [(each["name"], each["size"]) for each in root["fragments"]] == [("clock", 1)]
    disks, pci = root["namespaces"]
    assert disks["fragments"][0]["path"] == "disks/sda"
    assert pci["namespaces"][0]["path"] == "pci/00:1f.2"
    assert pci["namespaces"][0]["fragments"][0]["name"] == "état"


def test_an_empty_snapshot_is_shown_as_empty(plain: vmsnap.SnapshotWriter) -> None:
    assert text_of("tree", plain.path) == f"{plain.path}  0 fragments, 0 bytes\n"
    assert json_of("tree", plain.path) == {"name": "", "path": "", "fragments": [], "namespaces": []}
    assert text_of("ls", "-l", plain.path) == ""
    assert json_of("ls", plain.path) == []
    assert "fragments\t0\n" in text_of("info", plain.path)


def test_nothing_of_a_long_or_deep_tree_is_cut_off(plain: vmsnap.SnapshotWriter) -> None:
    namespace = plain
    for level in range(100):
        namespace = namespace.add_namespace(f"level{level}")
    write(namespace, "x" * 255, b"")
    for drawn in (text_of("tree", plain.path), screen(80, "tree", plain.path)):
        assert "─ level99/  1 fragment" in drawn
        assert "x" * 255 + "  0 bytes" in drawn
        assert all(len(line) < 800 for line in drawn.splitlines())


@pytest.mark.parametrize("columns", [80, 120])
def test_a_long_name_goes_on_below_itself_on_a_terminal(plain: vmsnap.SnapshotWriter, columns: int) -> None:
    write(plain, "x" * 255, b"")
    write(plain, "世" * 80, b"")
    text = screen(columns, "tree", plain.path)
    assert "\n├── " + "x" * (columns - 4) + "\n│   " + "x" * (columns - 4) + "\n" in text
    assert "\n└── " + "世" * (columns // 2 - 2) + "\n    世" in text


# info ----------------------------------------------------------------------------------------------------------------


def test_info_tells_all_with_the_key_and_what_shows_without(place: Place, key_file: Path) -> None:
    stored = 107 + 74 + 5000 + 5 * 32 + 106
    told = json_of("info", place.location, "--key-file", key_file)
    assert TIME.fullmatch(told.pop("modified"))
    assert told == {
        "location": str(place.location),
        "encrypted": True,
        "sealed": False,
        "key_wrapping": "raw-key",
        "key_recipients": [],
        "values": "none",
        "namespaces": 3,
        "fragments": 3,
        "size": 5001,
        "stored_size": stored,
        "overhead": stored - 5001,
    }
    without = json_of("info", place.location)
    assert TIME.fullmatch(without.pop("modified"))
    assert without == told | {"values": None, "size": None, "overhead": None}
    text = text_of("info", place.location)
    assert "encrypted\tyes\nkey wrapped by\ta 32-byte key\nsealed\tno\nvalues\tneeds the key\n" in text
    assert "stored size\t5447\noverhead\tneeds the key\n" in text


def test_info_finds_the_format_of_the_values(tmp_path: Path) -> None:
    for formats, found in ((["cbor"], "cbor"), (["json"], "json"), (["cbor", "json"], "mixed"), ([], "none")):
        root = tmp_path / found
        vmsnap.SnapshotWriter(root)
        write(vmsnap.SnapshotWriter.open(root), "raw", pattern(1000))
        for each in formats:
            writer = vmsnap.SnapshotWriter.open(root, format=each)
            writer.write_fragment(f"{each} map", {"a": 1})
            # A digit in JSON is a number in CBOR as well.
            writer.write_fragment(f"{each} number", 5)
        assert json_of("info", root)["values"] == found


@pytest.mark.parametrize(("era", "found"), [("crosvm-cbor", "cbor"), ("crosvm-json", "json")])
def test_the_snapshots_of_crosvm_are_looked_into(shared_dir: Path, era: str, found: str) -> None:
    roots = sorted((shared_dir / "golden" / era).rglob("snapshot"))
    assert roots
    for root in roots:
        assert json_of("info", root)["values"] == found
        text_of("tree", root)
        for entry in json_of("ls", root):
            assert run("show", root, entry["path"]).stdout or not entry["size"]
            json_of("show", root, entry["path"])


# show: values --------------------------------------------------------------------------------------------------------


def test_a_value_is_shown_indented_with_hexadecimal_beside_large_numbers(plain: vmsnap.SnapshotWriter) -> None:
    value = {
        "rip": 0xFFFFFFF0,
        "small": 65535,
        "below": -65536,
        "flags": [True, None, 1.5],
        "regions": [{"start": 0, "data": []}, {"start": 1}],
        "two words": "text",
    }
    assert shown(plain, value) == (
        "rip: 4294967280 (0xfffffff0)\n"
        "small: 65535\n"
        "below: -65536 (-0x10000)\n"
        "flags: [true, null, 1.5]\n"
        "regions: 2 items\n"
        "  - start: 0\n"
        "    data: []\n"
        "  - start: 1\n"
        '"two words": "text"\n'
    )


def test_every_kind_of_value_is_shown(plain: vmsnap.SnapshotWriter) -> None:
    for value, text in {
        'a\x1b[31m\n[red]\\"': r'"a\x1b[31m\n[red]\\\""',
        float("nan"): "NaN",
        float("-inf"): "-inf",
        b"\x00\xff": "h'00ff'",
        frozenset({3, 1, 2}): "set {1, 2, 3}",
        uuid.UUID(int=5): "uuid 00000000-0000-0000-0000-000000000005",
        datetime.date(2026, 1, 2): "2026-01-02",
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC): "2026-01-02T00:00:00+00:00",
        1 << 4096: "0x1" + "0" * 1024,
        None: "null",
    }.items():
        assert shown(plain, value) == text + "\n"
    assert shown(plain, []) == "[]\n"
    assert shown(plain, {}) == "{}\n"
    assert shown(plain, {5: 1, b"\x01": 2, (1, "a"): 3, "5": 4}) == '5: 1\nh\'01\': 2\n(1, "a"): 3\n"5": 4\n'


def test_typed_arrays_are_shown_with_type_and_shape(plain: vmsnap.SnapshotWriter) -> None:
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert shown(plain, {"a": array}) == "a: array of uint16, 2 x 3\n  [[0 1 2]\n   [3 4 5]]\n"
    assert shown(plain, np.array([1.5, np.nan])) == "array of float64, 2\n[1.5 nan]\n"


def test_long_byte_strings_and_lists_are_cut_off_unless_all_is_asked_for(plain: vmsnap.SnapshotWriter) -> None:
    value = {"page": pattern(1000), "zeros": bytes(800), "list": list(range(1000))}
    text = shown(plain, value)
    assert "page: 1000 bytes\n  0000  " in text
    assert "  ... 488 more bytes (--full shows them)\n" in text
    assert re.search(r"zeros: 800 bytes\n  0000  (00 ){8} (00 ){8} \|\.{16}\|\n  \*\n  0200\n  \.\.\. 288 more", text)
    assert "list: 1000 numbers\n  [   0] 0, 1, 2" in text
    assert "  ... 488 more numbers (--full shows them)\n" in text
    full = shown(plain, value, "--full")
    assert "more" not in full
    assert "999\n" in full
    assert all(len(line) <= 80 for line in full.splitlines())


def test_show_as_json_keeps_to_what_is_documented(plain: vmsnap.SnapshotWriter) -> None:
    value = {
        "bytes": b"\x00\xff",
        "floats": [float("nan"), float("inf"), float("-inf"), 0.5],
        "map": {1: "one", "two": 2},
        "set": {3, 1, 2},
        "uuid": uuid.UUID(int=5),
        "time": datetime.date(2026, 1, 2),
        "array": np.array([[1, 2], [3, 4]]),
        "big": 1 << 64,
        "huge": 1 << 5000,
    }
    assert json.loads(shown(plain, value, "--json")) == {
        "bytes": {"hex": "00ff"},
        "floats": ["NaN", "inf", "-inf", 0.5],
        "map": [[1, "one"], ["two", 2]],
        "set": [1, 2, 3],
        "uuid": "00000000-0000-0000-0000-000000000005",
        "time": "2026-01-02",
        "array": [[1, 2], [3, 4]],
        "big": 1 << 64,
        "huge": hex(1 << 5000),
    }


def test_a_format_that_is_given_is_held_to(plain: vmsnap.SnapshotWriter) -> None:
    write(plain, "number", b"5")
    write(plain, "raw", b"\xff\xff")
    assert text_of("show", plain.path, "number") == "-22\n"
    assert text_of("show", plain.path, "number", "--format", "json") == "5\n"
    assert '"raw"' in error_of(run("show", plain.path, "raw", "--format", "cbor", status=4))
    assert b"cannot be combined with" in run("show", plain.path, "raw", "--format", "cbor", "--hex", status=2).stderr


# show: bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_are_shown_as_hexdump_does(plain: vmsnap.SnapshotWriter) -> None:
    write(plain, "raw", b"\xff" + bytes(range(0x40, 0x80)) + bytes(50))
    assert text_of("show", plain.path, "raw") == (
        "00000000  ff 40 41 42 43 44 45 46  47 48 49 4a 4b 4c 4d 4e  |.@ABCDEFGHIJKLMN|\n"
        "00000010  4f 50 51 52 53 54 55 56  57 58 59 5a 5b 5c 5d 5e  |OPQRSTUVWXYZ[\\]^|\n"
        "00000020  5f 60 61 62 63 64 65 66  67 68 69 6a 6b 6c 6d 6e  |_`abcdefghijklmn|\n"
        "00000030  6f 70 71 72 73 74 75 76  77 78 79 7a 7b 7c 7d 7e  |opqrstuvwxyz{|}~|\n"
        "00000040  7f 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "00000050  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "*\n"
        "00000070  00 00 00                                          |...|\n"
        "00000073\n"
    )
    part = run("show", plain.path, "raw", "--offset", 65, "--size", 9)
    assert part.stdout.splitlines()[0] == (b"00000041  00 00 00 00 00 00 00 00  00                       |.........|")
    assert part.stderr == b"vmsnap: 41 more bytes: --offset 74 shows the next ones, --size N more at once\n"
    assert run("show", plain.path, "raw", "--offset", 200).stdout == b""


def test_of_many_bytes_the_first_are_shown_and_how_to_see_more(place: Place, key_file: Path) -> None:
    done = run("show", place.location, "disks/sda", "--key-file", key_file)
    assert done.stdout.endswith(b"\n00001000\n")
    assert done.stderr == b"vmsnap: 904 more bytes: --offset 4096 shows the next ones, --size N more at once\n"
    assert run("show", place.location, "disks/sda", "--full", "--key-file", key_file).stderr == b""
    assert run("show", place.location, "pci/00:1f.2/état", "--key-file", key_file).stderr == (
        b"vmsnap: the fragment is empty\n"
    )


def test_bytes_as_json_tell_where_they_are(place: Place, key_file: Path) -> None:
    part = json_of("show", place.location, "disks/sda", "--offset", 4990, "--size", 100, "--key-file", key_file)
    assert part == {"offset": 4990, "size": 10, "fragment_size": 5000, "hex": pattern(5000)[4990:].hex()}
    assert json_of("show", place.location, "clock", "--hex", "--key-file", key_file)["hex"] == "0c"


def test_a_large_value_is_shown_where_its_format_is_given(plain: vmsnap.SnapshotWriter) -> None:
    plain.write_fragment("large", b"x" * (17 * MIB))
    assert text_of("show", plain.path, "large").startswith("00000000  5a 01 10 00 00 78")
    assert text_of("show", plain.path, "large", "--format", "cbor").startswith("17825792 bytes\n")


def test_a_large_fragment_is_not_read_whole_to_be_shown(plain: vmsnap.SnapshotWriter) -> None:
    write(plain, "ram", b"")
    os.truncate(plain.path / "ram", 1 << 40)
    done = run("show", plain.path, "ram")
    assert done.stdout == b"00000000" + b"  00 00 00 00 00 00 00 00" * 2 + b"  |................|\n*\n00001000\n"
    assert b"longer than 16 MiB" in done.stderr
    far = run("show", plain.path, "ram", "--offset", 1 << 39, "--size", 1).stdout.decode()
    assert far.splitlines()[1] == f"{(1 << 39) + 1:x}"


# get and put ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(3 * MIB + 5))
    return path


def test_a_file_goes_in_and_out_byte_for_byte(place: Place, image: Path, key_file: Path) -> None:
    run("put", image, place.location, "new/space/sdb", "--key-file", key_file)
    assert read(place.open().namespace("new").namespace("space"), "sdb") == image.read_bytes()
    out = image.with_name("out")
    assert run("get", place.location, "new/space/sdb", out, "--key-file", key_file).stdout == b""
    assert out.read_bytes() == image.read_bytes()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run("get", place.location, "disks/sda", "-", "--key-file", key_file).stdout == pattern(5000)


def test_a_name_that_is_left_out_is_the_other_one(place: Place, image: Path, key_file: Path) -> None:
    run("put", image, place.location, "disks/", "--key-file", key_file)
    run("put", image, place.location, "--key-file", key_file)
    assert place.open().namespace("disks").list_fragments() == ["disk.img", "sda"]
    assert place.open().list_fragments() == ["clock", "disk.img"]
    run("get", place.location, "pci/00:1f.2/état", image.parent, "--key-file", key_file)
    assert (image.parent / "état").read_bytes() == b""
    run("get", place.location, "disks/sda", "--key-file", key_file, cwd=image.parent)
    assert (image.parent / "sda").read_bytes() == pattern(5000)


def test_put_reads_standard_input(plain: vmsnap.SnapshotWriter) -> None:
    command = [sys.executable, "-m", "vmsnap", "put", "-", plain.path, "in"]
    subprocess.run(command, input=pattern(5000), check=True)
    assert (plain.path / "in").read_bytes() == pattern(5000)
    assert b"name the fragment" in run("put", "-", plain.path, status=2).stderr
    assert b"name the fragment" in run("put", "-", plain.path, "ns/", status=2).stderr


def test_put_never_overwrites_a_fragment(place: Place, image: Path, key_file: Path) -> None:
    before = tree(place.location)
    for target in ("clock", "disks", "disks/sda"):
        error = error_of(run("put", image, place.location, target, "--key-file", key_file, status=1))
        assert "exists" in error
    assert tree(place.location) == before


def test_get_overwrites_a_regular_file_only_if_forced(place: Place, image: Path, key_file: Path) -> None:
    arguments = ["get", place.location, "disks/sda", image, "--key-file", key_file]
    before = tree(image.parent)
    assert "disk.img: File exists" in error_of(run(*arguments, status=1))
    assert tree(image.parent) == before
    run(*arguments, "--force")
    assert image.read_bytes() == pattern(5000)
    link = image.with_name("link")
    link.symlink_to(image)
    arguments[3] = link
    assert "is not a regular file" in error_of(run(*arguments, "--force", status=1))


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_get_writes_no_file_into_a_snapshot(place: Place, image: Path, key_file: Path, force: list[str]) -> None:
    run("put", image, place.location, "disks/sdb", "--key-file", key_file)
    before = tree(place.location)
    for target in ("", "/new", "/disks/new", "/disks", "/enc_metadata", f"/../{place.location.name}/disks/sdb"):
        path = f"{place.location}{target}"
        done = run("get", place.location, "disks/sdb", path, "--key-file", key_file, *force, status=1)
        assert "is in the snapshot" in error_of(done)
        assert "vmsnap put" in error_of(done)
        assert tree(place.location) == before
    done = run("get", place.location, "disks/sda", "--key-file", key_file, *force, cwd=place.location / "pci", status=1)
    assert "is in the snapshot" in error_of(done)
    assert tree(place.location) == before


def test_options_that_do_not_apply_are_refused(place: Place, image: Path, tmp_path: Path, key_file: Path) -> None:
    before = tree(tmp_path)
    for arguments in (
        ["get", place.location, "disks/sda", tmp_path / "out", "--create"],
        ["get", place.location],
        ["put", image, place.location, "new", "--force"],
        ["put", image, place.location, "new", "--chunk-size", "5"],
        ["put", image, place.location, "new", "-r", "age1x"],
        ["put", image, place.location, ""],
    ):
        run(*arguments, "--key-file", key_file, status=2)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["ls", "tree", "info"])
def test_a_closed_standard_output_is_an_error(plain: vmsnap.SnapshotWriter, command: str) -> None:
    write(plain, "sda", b"x")
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m vmsnap {command} '{plain.path}' >&-"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "vmsnap: error: standard output is closed\n")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_get_that_fails_leaves_nothing(place: Place, image: Path, key_file: Path, force: list[str]) -> None:
    stored = bytearray(place.file("disks/sda").read_bytes())
    stored[200] ^= 1
    place.file("disks/sda").write_bytes(stored)
    if not force:
        image.unlink()
    before = tree(image.parent)
    error = error_of(run("get", place.location, "disks/sda", image, "--key-file", key_file, *force, status=3))
    assert '"sda"' in error
    assert tree(image.parent) == before


@pytest.mark.parametrize("source", ["none", "directory", "unreadable"])
def test_a_put_that_fails_leaves_nothing(place: Place, tmp_path: Path, key_file: Path, source: str) -> None:
    (tmp_path / "directory").mkdir()
    # It opens, and then cannot be read.
    path = "/proc/self/mem" if source == "unreadable" else str(tmp_path / source)
    before = tree(tmp_path)
    error_of(run("put", path, place.location, "new/space/it", "--key-file", key_file, status=1))
    error_of(run("put", path, place.location, "new/../it", "--key-file", key_file, status=1))
    error_of(run("put", path, tmp_path / "made", "it", "--create", status=1))
    assert tree(tmp_path) == before


def test_put_creates_a_snapshot_only_if_asked_to(tmp_path: Path, image: Path, key_file: Path, key: bytes) -> None:
    target = [tmp_path / "made", "disks/sda"]
    assert "made" in error_of(run("put", image, *target, status=1))
    assert not (tmp_path / "made").exists()
    run("put", image, *target, "--create", "--key-file", key_file)
    made = vmsnap.SnapshotReader(tmp_path / "made", True, key=key)
    assert read(made.namespace("disks"), "sda") == image.read_bytes()
    assert "exists" in error_of(run("put", image, tmp_path / "made", "x", "--create", "--key-file", key_file, status=1))


def test_colons_are_ordinary_characters(tmp_path: Path) -> None:
    root = tmp_path / "vm:12:30"
    write(vmsnap.SnapshotWriter(root), "00:1f.2", b"it")
    run("get", root, "00:1f.2", tmp_path / "a:b")
    assert (tmp_path / "a:b").read_bytes() == b"it"
    run("put", tmp_path / "a:b", root, "c:d")
    assert (root / "c:d").read_bytes() == b"it"


# Exit codes ----------------------------------------------------------------------------------------------------------


def test_the_exit_code_tells_what_kind_of_error_it_was(
    place: Place, plain: vmsnap.SnapshotWriter, tmp_path: Path, key_file: Path
) -> None:
    wrong = write_private(tmp_path / "wrong.key", vmsnap.generate_key())
    for command in (["tree"], ["ls"], ["show", "clock"]):
        arguments = [command[0], place.location, *command[1:]]
        assert "pass the key that it was written with" in error_of(run(*arguments, status=3))
        assert "enc_metadata" in error_of(run(*arguments, "--key-file", wrong, status=3))
        assert "not encrypted" in error_of(run(command[0], plain.path, *command[1:], "--key-file", wrong, status=3))
    assert "enc_metadata" in error_of(run("info", place.location, "--key-file", wrong, status=3))
    (plain.path / "link").symlink_to("nowhere")
    assert "symbolic link" in error_of(run("info", plain.path, status=4))
    place.file("enc_metadata").write_bytes(b"age-encryption.org/v2\n")
    assert "install a newer vmsnap" in error_of(run("ls", place.location, "--key-file", key_file, status=4))
    place.file("enc_metadata").write_bytes(b"foreign")
    assert "does not contain a wrapped vmsnap key" in error_of(run("info", place.location, status=4))
    assert "No such file" in error_of(run("info", tmp_path / "none", status=1))
    help_text = text_of("--help")
    for code in (0, 1, 2, 3, 4, 130, 141):
        assert re.search(rf"^ +{code} +\w", help_text, re.MULTILINE)


@pytest.mark.parametrize("command", [["cat", "ram"], ["show", "ram", "--hex", "--full"], ["get", "ram", "-"]])
def test_a_reader_that_goes_away_ends_a_command_quietly(plain: vmsnap.SnapshotWriter, command: list[str]) -> None:
    write(plain, "ram", pattern(MIB))
    arguments = [command[0], plain.path, *command[1:]]
    done = subprocess.Popen(
        [sys.executable, "-m", "vmsnap", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.read(1)
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 141


def test_all_is_written_where_standard_output_has_no_buffer(plain: vmsnap.SnapshotWriter) -> None:
    write(plain, "ram", pattern(3 * MIB))
    for arguments in (["cat", plain.path, "ram"], ["get", plain.path, "ram", "-"]):
        assert run(*arguments, env={"PYTHONUNBUFFERED": "1"}).stdout == pattern(3 * MIB)


def test_what_the_encoding_has_not_is_shown_escaped(plain: vmsnap.SnapshotWriter) -> None:
    write(plain, "世", b"")
    latin = {"PYTHONIOENCODING": "iso8859-1"}
    assert run("ls", plain.path, env=latin).stdout == b"\\u4e16\t0\n"
    assert run("tree", plain.path, env=latin).stdout.splitlines()[1].endswith(b" \\u4e16  0 bytes")
    assert run("show", plain.path, "世", "--hex", env=latin).stdout == b""


# Completion ----------------------------------------------------------------------------------------------------------


def completed(*words: str | Path) -> list[str]:
    """Return the completions that bash gets for the last of these words."""
    environment = {
        "_VMSNAP_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["vmsnap", *map(str, words)]),
        "COMP_CWORD": str(len(words)),
    }
    return [line for line in text_of(env=environment).splitlines() if line]


def test_fragments_and_namespaces_complete_without_a_key(place: Place) -> None:
    assert completed("cat", place.location, "di") == ["plain,disks/sda"]
    assert completed("show", place.location, "pci/") == ["plain,pci/00:1f.2/état"]
    assert completed("ls", place.location, "p") == ["plain,pci", "plain,pci/00:1f.2"]
    assert completed("tree", "v") == ["file,v"]  # and directories
    assert completed("get", place.location, "di") == ["plain,disks/sda"]
    assert completed("get", place.location, "disks/sda", "s") == ["file,s"]
    assert completed("put", "di") == ["file,di"]
    assert completed("cat", place.location, "di", "--key-file", "none", "di") == []
    archive = place.location.parent / "packed"
    vmsnap.seal(place.location, key=place.key)
    vmsnap.pack(place.location, archive, key=place.key)
    assert completed("cat", archive, "di") == ["plain,disks/sda"]
    assert completed("ls", archive, "p") == ["plain,pci", "plain,pci/00:1f.2"]


def test_what_cannot_be_completed_gives_nothing_and_no_error(place: Place) -> None:
    assert completed("cat", place.location / "none", "d") == []
    place.file("link").symlink_to("nowhere")
    assert completed("cat", place.location, "d") == []


def test_a_name_with_a_newline_is_not_offered(plain: vmsnap.SnapshotWriter) -> None:
    write(write(plain, "a\nplain,evil", b""), "a", b"")
    assert completed("cat", plain.path, "a") == ["plain,a"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    assert f"_VMSNAP_COMPLETE={shell}_complete" in text_of("completion", shell)
