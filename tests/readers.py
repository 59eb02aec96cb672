"""Build and run the readers in examples/readers, with the result of each in the terms of the index of the corpus.

As a program, run with vmsnap installed, prints the table of all cases and readers.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vmsnap
from corpus_cases.case import Result, holds
from independent import READER_PROGRAM, all_fragments
from make_corpus import CORPUS
from make_golden import Mask
from toolchains import GO, UnavailableError, build, recent_tool, tool

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = REPOSITORY / "examples/readers"
BUILT = REPOSITORY / "target/readers"

INDEX: dict[str, Any] = json.loads((CORPUS / "index.json").read_text(encoding="utf-8"))
CASES: dict[str, Any] = INDEX["cases"]


def unpack_corpus(folder: Path) -> Path:
    """Return the directory with all snapshots of the corpus."""
    # By the program: tarfile before 3.11.4 and after differ in how they are told to keep links and pipes.
    for name in ("snapshots.tar.gz", "archives.tar.gz"):
        subprocess.run(["tar", "-xzf", CORPUS / name, "-C", folder], check=True)
    return folder / "snapshots"


def expected(case: Mapping[str, Any]) -> Result:
    """Return the result that a reader must have for a case."""
    return {key: case[key] for key in ("result", "memory") if key in case}


def unescaped(path: str) -> str:
    """Return a path as it was before a reader escaped control characters."""
    head, *rest = path.split("\\u")
    return head + "".join(chr(int(part[:4], 16)) + part[4:] for part in rest)


# As programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A reader that is a program: its command, and its options for other keys than a raw one."""

    name: str
    command: tuple[str, ...]
    credentials: Mapping[str, str]

    def run(self, root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run([*self.command, root, *arguments], capture_output=True, timeout=300)
        for trace in (b"Traceback", b"Exception in thread", b"goroutine ", b"    at "):
            assert trace not in done.stderr, done.stderr.decode()
        return done

    def open_with(self, case: Mapping[str, Any], folder: Path) -> list[str | Path]:
        """Return the options that open a case. For a kind of key without an option, it is a wrong raw key."""
        content, option = case.get("key"), "--key-file"
        for kind in ("identity", "passphrase", "key_provider"):
            if kind in case:
                option = self.credentials.get(kind, option)
                content = case[kind] if kind in self.credentials else bytes(32).hex()
        if content is None:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "credential"
        file.write_text(f"{content}\n")
        file.chmod(0o600)
        return [option, file]

    def knows(self, case: Mapping[str, Any]) -> bool:
        """Whether it opens keys that are wrapped so."""
        return all(kind in self.credentials for kind in ("identity", "passphrase", "key_provider") if kind in case)

    def result(self, root: Path, case: Mapping[str, Any], folder: Path) -> Result:
        """Return the result of the program for a case."""
        options = self.open_with(case, folder)
        done = self.run(root, *options, "check")
        error = self._error(done)
        if error is not None and not done.stdout:
            return {"result": error}
        fragments = {}
        for line in done.stdout.decode().splitlines():
            match line.split("\t"):
                case ["ok", size, sha256, path]:
                    fragments[unescaped(path)] = {"size": int(size), "sha256": sha256}
                case ["refused", kind, path, _]:
                    fragments[unescaped(path)] = {"error": kind}
                case _:
                    raise AssertionError(line)
        refused = any("error" in fragment for fragment in fragments.values())
        assert done.returncode == (1 if refused else 0), done
        result: Result = {"result": {"fragments": fragments}}
        if "memory" in case:
            result["memory"] = {}
            for number, namespace in enumerate(case["memory"]):
                result["memory"][namespace] = self._restored(root, options, namespace, folder / f"memory{number}")
        return result

    def _restored(self, root: Path, options: list[str | Path], namespace: str, into: Path) -> Result:
        into.parent.mkdir(parents=True, exist_ok=True)
        done = self.run(root, *options, "restore", into, *([namespace] if namespace else []))
        assert done.stdout == b"", done.stdout
        error = self._error(done)
        if error is not None:
            assert not into.exists(), "something was left behind"
            return error
        return {"regions": {file.name: holds(file.read_bytes()) for file in into.iterdir()}}

    @staticmethod
    def _error(done: subprocess.CompletedProcess[bytes]) -> Result | None:
        if done.returncode == 0:
            return None
        assert done.returncode == 1, done
        kinds = [line.split(": ")[1] for line in done.stderr.decode().splitlines() if line.startswith("refused: ")]
        return {"error": kinds[0]} if kinds else None


def _copied(name: str) -> Path:
    """Return a copy of the sources of a reader to build in. It keeps earlier build results, and nothing else."""
    built = ("target", "node_modules")
    (BUILT / name).mkdir(parents=True, exist_ok=True)
    for entry in (BUILT / name).iterdir():
        if entry.name in built:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    shutil.copytree(SOURCES / name, BUILT / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*built))
    return BUILT / name


def _go() -> Program:
    go, program = recent_tool("go", "Go", "1.19", "version"), BUILT / "go/vmsnap-reader"
    environment = {"GOPATH": str(GO), "GOFLAGS": "-modcacherw -mod=readonly"}
    build(go, "build", "-o", program, ".", cwd=SOURCES / "go", **environment)
    return Program("go", (str(program),), {"identity": "--identity", "passphrase": "--passphrase-file"})


def _java() -> Program:
    java, maven = tool("java", "Java"), tool("mvn", "Maven")
    recent_tool("javac", "the Java compiler", "17", "-version")
    folder = _copied("java")
    repository = f"-Dmaven.repo.local={REPOSITORY / 'target/maven'}"
    build(maven, "-q", "-B", repository, "package", cwd=folder)
    # Started some 200 times, for a few milliseconds of work each.
    flags = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
    return Program("java", (java, *flags, "-jar", str(folder / "target/vmsnap-reader.jar")), {})


def _node() -> Program:
    node, npm, folder = recent_tool("node", "Node.js", "18"), tool("npm", "npm"), _copied("node")
    cache = f"--cache={REPOSITORY / 'target/npm'}"
    build(npm, "ci", "--prefer-offline", cache, "--no-audit", "--no-fund", cwd=folder)
    return Program("node", (node, str(folder / "vmsnap-reader.mjs")), {})


def _python() -> Program:
    # -E and -s: only the packages of this Python, and the directory of the program.
    return Program("python", (sys.executable, "-E", "-s", str(READER_PROGRAM)), {})


PROGRAMS: dict[str, Callable[[], Program]] = {"go": _go, "java": _java, "node": _node, "python": _python}


# The library ---------------------------------------------------------------------------------------------------------

KINDS: list[tuple[type[Exception], str]] = [
    (vmsnap.AuthenticationError, "authentication"),
    (vmsnap.CorruptSnapshotError, "corrupt"),
    (vmsnap.UnsupportedFormatError, "unsupported"),
    (vmsnap.KeyUnavailableError, "key"),
    (vmsnap.NotEncryptedError, "not-encrypted"),
    (FileNotFoundError, "missing"),
]


def _kind(error: Exception) -> str:
    for exception, kind in KINDS:
        if isinstance(error, exception):
            return kind
    raise AssertionError(f"of no kind in the index: {error!r}")


def library_credentials(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that open a case in vmsnap."""
    if "key_provider" in case:
        return {"key_provider": Mask()}
    if "identity" in case:
        return {"identities": case["identity"]}
    if "passphrase" in case:
        return {"passphrase": case["passphrase"]}
    return {"key": bytes.fromhex(case["key"])} if "key" in case else {}


def library_result(root: Path, case: Mapping[str, Any], folder: Path) -> Result:
    """Return the result of vmsnap for a case."""
    try:
        found = all_fragments(vmsnap.SnapshotReader(root, **library_credentials(case)))
    except (vmsnap.VmsnapError, OSError) as error:
        return {"result": {"error": _kind(error)}}
    fragments = {}
    for path, reader in found.items():
        try:
            with reader.raw_fragment(path.rpartition("/")[2]) as fragment:
                fragments[path] = holds(fragment.read())
        except (vmsnap.VmsnapError, OSError) as error:
            fragments[path] = {"error": _kind(error)}
    result: Result = {"result": {"fragments": fragments}}
    if "memory" in case:
        result["memory"] = {}
        for number, namespace in enumerate(case["memory"]):
            result["memory"][namespace] = _library_restored(root, case, namespace, folder / f"memory{number}")
    return result


def _library_restored(root: Path, case: Mapping[str, Any], namespace: str, into: Path) -> Result:
    reader = vmsnap.SnapshotReader(root, **library_credentials(case))
    for name in filter(None, namespace.split("/")):
        reader = reader.namespace(name)
    into.mkdir(parents=True)
    try:
        memory = reader.memory()
        files = {f"{region.start:016x}": into / f"{region.start:016x}" for region in memory.regions}
        memory.restore(files.values())
    except (vmsnap.VmsnapError, OSError) as error:
        return {"error": _kind(error)}
    return {"regions": {name: holds(file.read_bytes()) for name, file in files.items()}}


# All cases -----------------------------------------------------------------------------------------------------------


def expected_of(program: Program, case: Mapping[str, Any]) -> Result:
    """Return the result that a program must have for a case: "unsupported" for a key that it cannot use."""
    return expected(case) if program.knows(case) else {"result": {"error": "unsupported"}}


def results_of(program: Program, snapshots: Path, folder: Path) -> dict[str, Result | Exception]:
    """Return the results of a program for all cases, by name."""

    def one(name: str) -> Result | Exception:
        try:
            return program.result(snapshots / name, CASES[name], folder / name)
        except Exception as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(one, CASES), strict=True))


def _table() -> bool:
    """Print a line for each case; tell whether all is as the index says."""
    with tempfile.TemporaryDirectory() as temporary:
        snapshots = unpack_corpus(Path(temporary))
        columns: dict[str, dict[str, bool]] = {}
        for name, made in PROGRAMS.items():
            try:
                program = made()
            except UnavailableError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            results = results_of(program, snapshots, Path(temporary, name))
            columns[name] = {case: results[case] == expected_of(program, CASES[case]) for case in CASES}
        library = {
            name: library_result(snapshots / name, case, Path(temporary, "library", name)) == expected(case)
            for name, case in CASES.items()
        }
    columns = {"vmsnap": library} | columns
    print(f"| case | fragments, memories | refused | {' | '.join(columns)} |")
    print(f"|---|---|---|{'---|' * len(columns)}")
    for name, case in CASES.items():
        entries = [*case["result"].get("fragments", {}).values(), *case.get("memory", {}).values()]
        refused = [entry["error"] for entry in [case["result"], *entries] if "error" in entry]
        told = ", ".join(f"{refused.count(kind)} {kind}" for kind in dict.fromkeys(refused))
        cells = " | ".join("as said" if column[name] else "**not**" for column in columns.values())
        print(f"| {name} | {len(entries)} | {told} | {cells} |")
    return all(all(column.values()) for column in columns.values())


if __name__ == "__main__":
    sys.exit(0 if _table() else 1)
