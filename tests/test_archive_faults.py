"""Archives are complete or absent, proved by breaking things as `test_faults` does for directories."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from archive_runs import KEYS, make_sources, outcome, prepared
from faults import traced_children

SCENARIOS = [
    *(f"{action}-{kind}" for action in ("pack", "commit_twice", "unpack", "unpack_pipe") for kind in KEYS),
    "create-encrypted",
    "pack_stream-plain",
    "rekey-encrypted",
    "grow-plain",
]

# Calls that change something. A process that is killed anywhere else leaves what the call before left.
CHANGES = [
    *("openat", "mkdir", "mkdirat", "fchmod", "fchown", "write", "pwrite64", "pwritev", "ftruncate", "fallocate"),
    *("copy_file_range", "ioctl", "fsync", "unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2"),
]
# Calls that only look.
LOOKS = ["read", "pread64", "newfstatat", "fstat", "statx", "lseek", "getdents64", "flock", "poll", "ppoll"]
# Calls that may need room.
GROWING = [
    *("mkdir", "mkdirat", "write", "pwrite64", "pwritev", "ftruncate", "fallocate", "copy_file_range", "ioctl"),
    *("fsync", "rename", "renameat", "renameat2"),
]
# An error of one of these may leave a hidden directory, because it breaks the removal.
REMOVALS = {"openat", "unlink", "unlinkat", "rmdir", "rename", "renameat", "renameat2", *LOOKS}


@dataclass(frozen=True)
class Result:
    """The end of a scenario that was broken at a call."""

    scenario: str
    name: str
    number: int
    status: int
    error: str
    # The names that the process left, before anything was cleaned.
    left: tuple[str, ...]
    found: str


def run_all(
    sources: Path, folder: Path, scenarios: Sequence[str], call: tuple[str, int], *options: str
) -> tuple[list[Result], dict[int, str]]:
    """Run scenarios below a directory under strace. Return their ends, and the scenario of each process."""
    folder.mkdir()
    prepared_runs = [prepared(scenario, sources, folder / scenario) for scenario in scenarios]
    actions = [partial(action, run) for action, run in prepared_runs]
    ended = traced_children(actions, folder, *options)
    results = []
    for scenario, (_, run), end in zip(scenarios, prepared_runs, ended, strict=True):
        if run.pipe is not None:
            run.pipe.close()
        left = tuple(sorted(os.listdir(run.folder)))
        results.append(Result(scenario, *call, end.status, end.error, left, outcome(scenario, run.folder)))
    shutil.rmtree(folder)
    return results, dict(zip([end.pid for end in ended], scenarios, strict=True))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


@pytest.fixture
def untouched(sources: Path) -> Iterator[None]:
    """Check that the test changes neither the snapshots nor the archives that it reads."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sources.rglob("*") if path.is_file()}

    before = contents()
    yield
    assert contents() == before


@pytest.fixture(scope="module")
def calls(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """How many system calls of each name each scenario makes if nothing fails."""
    folder = tmp_path_factory.mktemp("calls")
    log = folder / "log"
    results, scenarios = run_all(sources, folder / "runs", SCENARIOS, ("none", 0), "-o", str(log))
    for result in results:
        assert (result.status, result.found, result.error, len(result.left)) == (0, "complete", "", 1), result
    counted: dict[str, Counter[str]] = {scenario: Counter() for scenario in SCENARIOS}
    for line in log.read_text().splitlines():
        called = re.match(r"(\d+) +(\w+)\(", line)
        if called and int(called[1]) in scenarios:
            counted[scenarios[int(called[1])]][called[2]] += 1
    return counted


@dataclass(frozen=True)
class Breaking:
    """Breaks all scenarios at every call of some names."""

    sources: Path
    calls: dict[str, Counter[str]]
    folder: Path

    def everywhere(self, names: Sequence[str], injection: str) -> list[Result]:
        results = []
        for name in names:
            for number in range(1, 1 + max(counter[name] for counter in self.calls.values())):
                scenarios = [scenario for scenario, counter in self.calls.items() if counter[name] >= number]
                inject = ["-e", f"trace={name}", "-e", f"inject={name}:{injection}:when={number}"]
                folder = self.folder / f"{name}-{number}"
                results += run_all(self.sources, folder, scenarios, (name, number), "-o", os.devnull, *inject)[0]
        return results


@pytest.fixture
def breaking(sources: Path, calls: dict[str, Counter[str]], tmp_path: Path) -> Breaking:
    return Breaking(sources, calls, tmp_path)


def check_killed(results: list[Result]) -> None:
    killed = sum(result.status == -9 for result in results)
    outcomes = Counter((result.scenario, result.found) for result in results)
    print(f"killed {killed} of {len(results)}: {dict(outcomes)}")
    assert killed > 0.95 * len(results)
    for result in results:
        assert result.found in ("absent", "complete"), result
    for scenario in SCENARIOS:
        assert outcomes[scenario, "absent"], scenario
        # After the last change of a snapshot, which completes it, its directory is synced. A stream is not.
        assert outcomes[scenario, "complete"] or scenario.startswith("pack_stream"), scenario


@pytest.mark.usefixtures("untouched")
def test_killed_before_any_change_it_is_absent_or_complete(breaking: Breaking) -> None:
    check_killed(breaking.everywhere(CHANGES, "signal=KILL"))


@pytest.mark.torture
@pytest.mark.usefixtures("untouched")
def test_killed_before_any_system_call_it_is_absent_or_complete(breaking: Breaking) -> None:
    # The process that starts them makes these.
    own = {"wait4", "clone", "clone3", "exit_group", "mmap", "munmap", "brk", "mprotect", "set_robust_list", "gettid"}
    own |= {name for counter in breaking.calls.values() for name in counter if name.startswith("rt_sig")}
    check_killed(
        breaking.everywhere(sorted({name for counter in breaking.calls.values() for name in counter} - own), "signal=KILL")
    )


def check_refused(results: list[Result], error: str) -> None:
    for result in results:
        if result.status == 0:
            assert result.found == "complete", result
            assert result.error == "", result
        else:
            assert result.status == 1, result
            assert re.match(r"\w*Error: .*", result.error), result
            assert result.found in ("absent", "complete"), result
            if result.found == "complete":
                assert "in place" in result.error or "cannot be synced" in result.error, result
        if result.name not in REMOVALS:
            assert not [name for name in result.left if name.startswith(".vmsnap")], result
    outcomes = Counter((result.scenario, result.status, result.found) for result in results)
    print(f"{error} at {len(results)} calls: {dict(outcomes)}")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("error", "names"), [("EIO", CHANGES), ("ENOSPC", GROWING)], ids=["EIO", "ENOSPC"])
def test_refused_at_any_change_it_says_so_and_is_absent_or_complete(
    breaking: Breaking, error: str, names: list[str]
) -> None:
    check_refused(breaking.everywhere(names, f"error={error}"), error)
