"""Names as arguments: a name that is not UTF-8 is an error of one line, others are the same in every locale."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run
from support import MIB, pattern, tree

BAD = b"\xff"
CREATE = "--create"

# As where no locale is set, and Python is not to make UTF-8 of that.
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def called(*arguments: bytes | str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line with arguments that are any bytes."""
    command = [sys.executable, "-m", "vmsnap", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=300)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A snapshot with guest memory, and with é in the namespace è."""
    with vmsnap.create(tmp_path / "base") as snapshot:
        snapshot.write_memory([vmsnap.GuestRegion(0, pattern(MIB))])
        snapshot.add_namespace("è").write_fragment("é", {"now": 12})
    (tmp_path / "ram.img").write_bytes(pattern(MIB))
    return tmp_path / "base"


Arguments = Callable[[Path, bytes], list[bytes | str | Path]]

# Every place where text goes to the library.
NAMES: dict[str, Arguments] = {
    "cat": lambda base, bad: ["cat", base, bad],
    "cat, in a namespace": lambda base, bad: ["cat", base, bad + b"/x"],
    "ls": lambda base, bad: ["ls", base, bad],
    "tree": lambda base, bad: ["tree", base, bad],
    "show": lambda base, bad: ["show", base, bad],
    "peek": lambda base, bad: ["peek", base, "0", "1", "--namespace", bad],
    "map": lambda base, bad: ["map", base, "-o", base.parent / "map.png", "--namespace", bad],
    "restore": lambda base, bad: ["restore", base, base.parent / "out", "--namespace", bad],
    "get": lambda base, bad: ["get", base, bad, base.parent / "out"],
    "put": lambda base, bad: ["put", base.parent / "ram.img", base, bad],
    "put, into a new one": lambda base, bad: ["put", base.parent / "ram.img", bytes(base) + b"2", b"ns/" + bad, CREATE],
    "put, by the name of a file": lambda base, bad: ["put", base.parent / os.fsdecode(bad), bytes(base) + b"2", CREATE],
    "dump -r": lambda base, bad: ["dump", base.parent / "ram.img", base.parent / "out", "-r", bad],
    "encrypt -r": lambda base, bad: ["encrypt", base, base.parent / "out", "-r", bad],
    "rekey -r": lambda base, bad: ["rekey", base, "-r", bad],
    "verify": lambda base, bad: ["verify", base, "--expect-seal-digest", bad],
}


@pytest.mark.parametrize("locale", [{}, C_LOCALE], ids=["UTF-8", "C"])
@pytest.mark.parametrize("command", NAMES)
def test_a_name_that_is_not_utf_8_is_one_line(base: Path, command: str, locale: dict[str, str]) -> None:
    before = tree(base.parent)
    done = called(*NAMES[command](base, b"caf\xe9"), **locale)
    assert done.returncode == 1, done.stderr
    assert re.search(r"caf\\xe9(/x)? is not UTF-8, and names and recipients must be$", error_of(done))
    assert tree(base.parent) == before


def test_a_path_is_any_bytes(base: Path) -> None:
    """The name of the directory that a snapshot is in, or of a file, is not one of a snapshot's own."""
    folder = os.path.join(bytes(base.parent), BAD)
    [recipient] = vmsnap.recipients_of(vmsnap.generate_identity())
    for arguments in (
        ["dump", base.parent / "ram.img", folder],
        ["verify", folder],
        ["ls", folder],
        ["info", folder],
        ["tree", folder],
        ["get", folder, "mem", folder + b"2"],
        ["restore", folder, folder + b"3"],
        ["encrypt", folder, folder + b"4", "-r", recipient],
        ["clean", base.parent],
    ):
        done = called(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert (base.parent / os.fsdecode(BAD + b"2")).read_bytes() == pattern(MIB)
    # And it is shown by its bytes.
    assert rb"\xff5: No such file" in called("dump", folder + b"5", base.parent / "out").stderr
    assert rb"\xff" in called("info", folder).stdout


def test_what_is_listed_can_be_read_in_the_c_locale(base: Path) -> None:
    listed = called("ls", base, **C_LOCALE)
    [line] = [line for line in listed.stdout.splitlines() if b"/" in line]
    path, size = line.split(b"\t")
    assert path == "è/é".encode()
    assert len(called("cat", base, path, **C_LOCALE).stdout) == int(size)
    assert called("show", base, path, **C_LOCALE).stdout == called("show", base, path).stdout
    namespace = path.split(b"/")[0]
    assert called("ls", base, namespace, **C_LOCALE).stdout == listed.stdout.splitlines(keepends=True)[-1]
    tree_of = called("tree", base, namespace, **C_LOCALE)
    assert "é".encode() in tree_of.stdout
    assert tree_of.stdout == called("tree", base, namespace).stdout


def test_a_name_goes_out_and_in_again_in_the_c_locale(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert called("get", base, "è/é".encode(), out, **C_LOCALE).returncode == 0
    assert os.listdir(bytes(out)) == ["é".encode()]
    # By the file's own name, into a new namespace.
    done = called("put", out / "é", tmp_path / "copy", "ü/".encode(), CREATE, **C_LOCALE)
    assert done.returncode == 0, done.stderr
    assert vmsnap.open(tmp_path / "copy").namespace("ü").read_fragment("é") == {"now": 12}


def test_an_error_shows_a_name_as_it_was_given_in_the_c_locale(base: Path) -> None:
    for path in ("ö", "ö/é"):
        done = called("cat", base, path.encode(), **C_LOCALE)
        assert done.returncode == 1
        assert "ö" in error_of(done)
    assert "ö: No such file" in error_of(called("dump", "ö".encode(), base.parent / "out", **C_LOCALE))


def test_a_latin_1_argument_is_its_bytes(base: Path) -> None:
    """Where there is such a locale, é is one byte, and no name."""
    encoding = {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}
    assert called("cat", base, b"\xe9", **encoding).returncode == 1
    assert called("cat", base, "è/é".encode(), **encoding).returncode == 0
    assert run("cat", base, "è/é").stdout == called("cat", base, "è/é".encode(), **encoding).stdout
