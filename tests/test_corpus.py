"""The corpus: vmsnap and the readers in examples/readers get the results of the index for each snapshot."""

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from commands import write_private
from independent import check_independently
from make_corpus import CORPUS, make
from readers import (
    CASES,
    INDEX,
    KINDS,
    PROGRAMS,
    SOURCES,
    Program,
    expected,
    expected_of,
    library_credentials,
    library_result,
    results_of,
    unpack_corpus,
)
from support import pattern, read, tree
from toolchains import UnavailableError


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with all snapshots of the corpus."""
    return unpack_corpus(tmp_path_factory.mktemp("corpus"))


# The library ---------------------------------------------------------------------------------------------------------


def verifies(root: Path, case: dict[str, Any]) -> bool:
    """Whether all of it was looked at, and is right, but for its not being sealed."""
    try:
        found = vmsnap.verify(root, **library_credentials(case))
    except (vmsnap.VmsnapError, OSError):
        return False
    return not found.not_checked and all(problem.kind == "not sealed" for problem in found.problems)


@pytest.mark.parametrize("name", CASES)
def test_vmsnap_makes_of_a_case_what_the_index_says(snapshots: Path, name: str, tmp_path: Path) -> None:
    assert library_result(snapshots / name, CASES[name], tmp_path) == expected(CASES[name])
    assert verifies(snapshots / name, CASES[name]) == CASES[name]["verifies"]


def test_the_corpus_is_what_its_command_makes(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made == INDEX, "make corpus"
    for name, case in made["cases"].items():
        if "passphrase" not in case:  # which takes a second
            assert library_result(tmp_path / name, case, tmp_path / "restored" / name) == expected(case), name


def test_the_corpus_is_small_and_has_what_it_needs() -> None:
    assert sum(file.stat().st_size for file in CORPUS.iterdir()) < 1 << 20
    parts = [case["result"] for case in CASES.values()]
    for case in CASES.values():
        parts += [*case["result"].get("fragments", {}).values(), *case.get("memory", {}).values()]
    errors = [part["error"] for part in parts if "error" in part]
    assert set(errors) == {kind for _, kind in KINDS}
    assert len(errors) >= 150


# The programs --------------------------------------------------------------------------------------------------------


@cache
def built(name: str) -> Program:
    """A reader, ready to run; the test is skipped where it cannot be built."""
    try:
        return PROGRAMS[name]()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    """A reader in each language, built."""
    return built(request.param)


@pytest.fixture(scope="session")
def results(program: Program, snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result for every case."""
    return results_of(program, snapshots, tmp_path_factory.mktemp(program.name))


@pytest.mark.parametrize("name", CASES)
def test_a_reader_makes_of_a_case_what_the_index_says(program: Program, results: dict[str, Any], name: str) -> None:
    assert results[name] == expected_of(program, CASES[name])


def test_a_reader_lists_sizes_and_paths_in_order(program: Program, snapshots: Path, tmp_path: Path) -> None:
    for name in ("plain", "plain-sealed", "encrypted-sealed"):
        options = program.open_with(CASES[name], tmp_path)
        lines = program.run(snapshots / name, *options, "list").stdout.decode().splitlines()
        fragments = CASES[name]["result"]["fragments"]
        escaped = {path: path.replace("\t", "\\u0009").replace("\x1b", "\\u001b") for path in fragments}
        in_order = sorted(fragments, key=lambda path: path.encode())
        assert lines == [f"{fragments[path]['size']:>16}  {escaped[path]}" for path in in_order]


def test_a_reader_writes_a_fragment_out(program: Program, snapshots: Path, tmp_path: Path) -> None:
    options = program.open_with(CASES["encrypted"], tmp_path)
    path = "chunks of 32/1000 bytes"
    done = program.run(snapshots / "encrypted", *options, "cat", path)
    assert hashlib.sha256(done.stdout).hexdigest() == CASES["encrypted"]["result"]["fragments"][path]["sha256"]
    for missing in ("nothing", "chunks of 32", "../encrypted/x", "enc_metadata", ""):
        done = program.run(snapshots / "encrypted", *options, "cat", missing)
        assert (done.returncode, done.stdout) == (1, b""), missing
        assert done.stderr.startswith(b"refused: ")
    # In a sealed snapshot, a name that is not in the manifest, with or without a file.
    for name in ("unlisted-fragment", "small-sealed"):
        done = program.run(snapshots / name, *program.open_with(CASES[name], tmp_path), "cat", "more")
        assert done.stderr.startswith(b"refused: missing: ")


def test_what_a_reader_writes_before_an_error_is_authentic(program: Program, snapshots: Path, tmp_path: Path) -> None:
    root, options = snapshots / "damaged-fragments", program.open_with(CASES["damaged-fragments"], tmp_path)
    done = program.run(root, *options, "cat", "ciphertext changed")
    assert (done.returncode, done.stdout) == (1, pattern(100, 3)[:32])
    assert done.stderr.startswith(b"refused: authentication: ")


def test_wrong_usage_ends_with_2_and_tells_no_key(program: Program, snapshots: Path, tmp_path: Path) -> None:
    secret = b"5ec2e7" * 10
    bad = write_private(tmp_path / "bad", secret)
    for arguments in (
        ["--key-file", bad, "check"],
        ["--key-file", tmp_path / "none", "check"],
        ["--key-file", bad],
        ["--what", "check"],
        ["what"],
        ["cat"],
        [],
    ):
        done = program.run(snapshots / "small", *arguments)
        assert (done.returncode, done.stdout) == (2, b""), arguments
        assert done.stderr
        assert secret not in done.stderr


def test_a_closed_pipe_ends_a_reader_quietly(program: Program, snapshots: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*program.command, str(snapshots / "memory"), "cat", "mem"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_reader_changes_the_segment_key_after_2_to_the_20_positions(
    program: Program, many_segments: tuple[Path, str], tmp_path: Path
) -> None:
    root, sha256 = many_segments
    options = program.open_with({"key": bytes(32).hex()}, tmp_path)
    done = program.run(root, *options, "check")
    assert done.stdout.decode().split("\t")[2] == sha256, done.stderr


@pytest.fixture(scope="session")
def many_segments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A fragment of 2^20 + 2 segments, and its contents."""
    root = tmp_path_factory.mktemp("segments") / "vm1"
    data = pattern(32 * ((1 << 20) + 1) + 5)
    with vmsnap.SnapshotWriter(root, key=bytes(32)).raw_fragment("mem", chunk_size_bytes=32) as fragment:
        fragment.write(data)
    return root, hashlib.sha256(data).hexdigest()


# Written snapshots ----------------------------------------------------------------------------------------------------


WRITERS = [name for name in PROGRAMS if name in ("go", "python")]
LENGTHS = (0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 131072, 200_000)


@pytest.fixture(scope="session", params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Program:
    """A reader that writes as well."""
    return built(request.param)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with files of many lengths, nested directories, and an empty directory."""
    folder = tmp_path / "source"
    for path in ("disks/żółć ☃", "holds nothing"):
        (folder / path).mkdir(parents=True)
    for length in LENGTHS:
        (folder / f"{length} bytes").write_bytes(pattern(length))
    (folder / "disks/żółć ☃/sda").write_bytes(b"boot sector")
    return folder


def test_what_an_example_writes_vmsnap_opens_and_verifies(writer: Program, source: Path, tmp_path: Path) -> None:
    key, root = vmsnap.generate_key(), tmp_path / "vm1"
    key_file = write_private(tmp_path / "key", key)
    done = writer.run(root, "--key-file", key_file, "write", source)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["key", "source", "vm1"]
    report = vmsnap.verify(root, key=key)
    assert report.ok, report
    assert report.fragments.keys() == {"disks/żółć ☃/sda", *(f"{length} bytes" for length in LENGTHS)}
    reader = vmsnap.open(root, require_sealed=True, key=key)
    assert reader.list_namespaces() == ["disks", "holds nothing"]
    for length in LENGTHS:
        assert read(reader, f"{length} bytes") == pattern(length)
    assert read(reader.namespace("disks").namespace("żółć ☃"), "sda") == b"boot sector"
    check_independently(root, key)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.open(root, key=vmsnap.generate_key())
    assert {file.stat().st_mode & 0o777 for file in root.rglob("*")} == {0o600, 0o700}


def test_an_example_writes_all_or_nothing(writer: Program, source: Path, tmp_path: Path) -> None:
    key_file = write_private(tmp_path / "key", bytes(32))

    def refuses(root: Path, *options: str | Path) -> None:
        before = tree(tmp_path)
        done = writer.run(root, *options, "write", source)
        assert done.returncode in (1, 2), done
        assert done.stderr
        assert tree(tmp_path) == before

    (tmp_path / "taken").mkdir()
    refuses(tmp_path / "taken", "--key-file", key_file)
    refuses(tmp_path / "vm1")
    refuses(tmp_path / "no/where", "--key-file", key_file)
    for make_entry in (
        lambda path: path.symlink_to("0 bytes"),
        lambda path: path.with_name("back\\slash").write_bytes(b""),
        lambda path: path.with_name("ENC_metadata").write_bytes(b""),
        lambda path: path.with_name(os.fsdecode(b"caf\xe9")).write_bytes(b""),
        os.mkfifo,
    ):
        (source / "disks/bad").mkdir()
        make_entry(source / "disks/bad/entry")
        refuses(tmp_path / "vm1", "--key-file", key_file)
        shutil.rmtree(source / "disks/bad")


def test_every_reader_has_a_page() -> None:
    pages = sorted(page.parent.name for page in SOURCES.glob("*/README.md"))
    assert pages == sorted(PROGRAMS)
