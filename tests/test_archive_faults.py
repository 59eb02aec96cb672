"""Archives are complete or absent, proved by breaking things as `test_faults` does for directories."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import archive_runs
import power_loss
import pytest
from archive_runs import KEYS, make_sources, outcome, prepared
from block_devices import mounted
from faults import short_transfers, traced, traced_children

BOTH = pytest.mark.parametrize("kind", list(KEYS))

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
LOOKS = ["open", "read", "pread64", "newfstatat", "fstat", "statx", "lseek", "getdents64", "flock", "poll", "ppoll"]
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


# Of each scenario, the numbers of its calls of each name.
Calls = dict[str, dict[str, list[int]]]


def calls_in(log: str, scenarios: dict[int, str]) -> Calls:
    """Read the calls from a record. Those that open a file without creating one are listed under `open`."""
    calls: Calls = {scenario: {} for scenario in scenarios.values()}
    seen: Counter[tuple[str, str]] = Counter()
    for line in log.splitlines():
        called = re.match(r"(\d+) +(\w+)\(", line)
        if called and int(called[1]) in scenarios:
            scenario, name = scenarios[int(called[1])], called[2]
            seen[scenario, name] += 1
            key = "open" if name == "openat" and "O_CREAT" not in line else name
            calls[scenario].setdefault(key, []).append(seen[scenario, name])
    return calls


@pytest.fixture(scope="module")
def calls(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """The system calls that each scenario makes if nothing fails."""
    folder = tmp_path_factory.mktemp("calls")
    log = folder / "log"
    results, scenarios = run_all(sources, folder / "runs", SCENARIOS, ("none", 0), "-o", str(log))
    for result in results:
        assert (result.status, result.found, result.error, len(result.left)) == (0, "complete", "", 1), result
    return calls_in(log.read_text(), scenarios)


@dataclass(frozen=True)
class Breaking:
    """Breaks all scenarios at every call of some names."""

    sources: Path
    calls: Calls
    folder: Path

    def everywhere(self, names: Sequence[str], injection: str, *, long: bool = False) -> list[Result]:
        results = []
        for name in names:
            chosen = {scenario: calls.get(name, []) for scenario, calls in self.calls.items()}
            if not long:
                # The calls between write contents, one like the other.
                chosen = {
                    scenario: calls if len(calls) < 30 else calls[:5] + calls[-15:]
                    for scenario, calls in chosen.items()
                }
            for number in sorted({number for calls in chosen.values() for number in calls}):
                scenarios = [scenario for scenario, calls in chosen.items() if number in calls]
                call = "openat" if name == "open" else name
                results += self.at(scenarios, (name, number), f"{call}:{injection}:when={number}")
        return results

    def at(self, scenarios: Sequence[str], call: tuple[str, int], *injections: str) -> list[Result]:
        names = ",".join(injection.partition(":")[0] for injection in injections)
        inject = [option for injection in injections for option in ("-e", f"inject={injection}")]
        folder = self.folder / f"{call[0]}-{call[1]}"
        return run_all(self.sources, folder, scenarios, call, "-o", os.devnull, "-e", f"trace={names}", *inject)[0]


@pytest.fixture
def breaking(sources: Path, calls: Calls, tmp_path: Path) -> Breaking:
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
    names = {name for calls in breaking.calls.values() for name in calls if not name.startswith("rt_sig")}
    check_killed(breaking.everywhere(sorted(names - own), "signal=KILL", long=True))


def check_refused(results: list[Result], error: str) -> None:
    for result in results:
        if result.status == 0:
            assert result.found == "complete", result
            assert result.error == "", result
        else:
            assert result.status == 1, result
            assert re.match(r"\w*Error: .*", result.error), result
            assert result.found in ("absent", "complete"), result
            if result.scenario.startswith(("commit_twice", "grow")):
                # The fault is over, so the second commit succeeds, unless the first could not be undone.
                assert "Repeated" not in result.error or "could not be restored" in result.error, result
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


@pytest.mark.torture
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EINTR"])
def test_refused_at_any_system_call_it_says_so_and_is_absent_or_complete(breaking: Breaking, error: str) -> None:
    check_refused(breaking.everywhere([*CHANGES, *LOOKS], f"error={error}", long=True), error)


# Calls that a signal may interrupt, and that are tried again.
INTERRUPTIBLE = ["pwrite64", "pread64", "read", "write", "copy_file_range", "fallocate", "ftruncate", "poll", "flock"]


@pytest.mark.usefixtures("untouched")
def test_interrupted_again_and_again_it_is_complete(breaking: Breaking) -> None:
    for every in (2, 3):
        injections = [f"{name}:error=EINTR:when=1+{every}" for name in INTERRUPTIBLE]
        for result in breaking.at(SCENARIOS, ("EINTR", every), *injections):
            assert (result.status, result.found, len(result.left)) == (0, "complete", 1), result


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if not name.startswith("commit_twice")])
def test_short_reads_and_writes_change_nothing(sources: Path, tmp_path: Path, scenario: str) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    script = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    trace = ["-e", "trace=pread64,pwrite64,read,write", "-o", str(log)]
    done = traced(script, [archive_runs.__file__, scenario, sources, folder], short_transfers(tmp_path), *trace)
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(folder)) == 1
    assert outcome(scenario, folder) == "complete"
    # It was so: a place is read or written again and again, by halves.
    assert len(re.findall(r"(?:pread64|pwrite64|read|write)\(.*, 1[,)]", log.read_text())) > 3


# A commit that inserted room in front of a fragment, and undoes that ------------------------------------------------


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("disk")) as folder:
        yield folder


@pytest.fixture
def growing(sources: Path, ext4: Path, tmp_path: Path) -> Breaking:
    """A scenario on a file system that can insert room."""
    log = tmp_path / "log"
    _, scenarios = run_all(sources, ext4 / "runs", ["grow-plain"], ("none", 0), "-o", str(log))
    calls = calls_in(log.read_text(), scenarios)
    assert len(calls["grow-plain"]["fallocate"]) == 1
    return Breaking(sources, calls, ext4)


# Each fails after room was inserted.
FAILURES = ["copy_file_range:error=EIO:when=1", "fsync:error=EIO:when=1", "renameat2:error=EIO:when=1"]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("failure", FAILURES)
def test_an_undo_that_is_broken_is_reported_or_absent(growing: Breaking, failure: str) -> None:
    scenario = ["grow-plain"]
    call = failure.partition(":")[0]
    (whole,) = growing.at(scenario, (call, 0), failure)
    assert (whole.status, whole.found) == (0, "complete"), whole
    last = len(growing.calls["grow-plain"]["ftruncate"])
    undo = [f"ftruncate:when={last + 1}", "fallocate:when=2"]
    for number, step in enumerate(undo, 1):
        name, when = step.split(":")
        (refused,) = growing.at(scenario, (f"{call} {name}", number), failure, f"{name}:error=EIO:{when}")
        # The fragment is lost, which every further commit says.
        assert (refused.status, refused.found, refused.left) == (1, "absent", ()), refused
        assert '"bulk" could not be restored' in refused.error, refused
        assert "discard the snapshot and write it again" in refused.error, refused
        assert "; again: " in refused.error, refused
        assert "never finished" in refused.error, refused
        (interrupted,) = growing.at(scenario, (f"{call} {name}", 10), failure, f"{name}:error=EINTR:{when}")
        assert (interrupted.status, interrupted.found) == (0, "complete"), interrupted
        (killed,) = growing.at(scenario, (f"{call} {name}", 20), failure, f"{name}:signal=KILL:{when}")
        assert (killed.status, killed.found) == (-9, "absent"), killed


# Power failures -----------------------------------------------------------------------------------------------------


def operations_of(scenario: str, sources: Path, tmp_path: Path) -> list[power_loss.Operation]:
    """Record a scenario. The operations begin with those that made what it found."""
    top, log = tmp_path / "recorded", tmp_path / "log"
    action, own = prepared(scenario, sources, top)
    before = power_loss.existing(top)
    (ended,) = traced_children([partial(action, own)], tmp_path, "-o", str(log), *power_loss.STRACE)
    assert ended.status == 0, ended
    lines = [line for line in log.read_text().splitlines() if line.startswith(f"{ended.pid} ")]
    operations = power_loss.recorded_operations("\n".join(lines), top, before)
    whole = power_loss.Disk(operations).tree()
    assert {path.decode() for path in whole} == {str(path.relative_to(top)) for path in top.rglob("*")}
    return operations


def power_losses(sources: Path, tmp_path: Path, scenario: str) -> None:
    """Let the power fail after each operation of a scenario."""
    operations = operations_of(scenario, sources, tmp_path)
    # The archive that gets another key is there, and synced.
    start = 4 if scenario.startswith("rekey") else 0
    during, end = power_loss.outcomes(operations, tmp_path, partial(outcome, scenario), 64, start=start)
    print(f"{scenario}: power lost before the end: {dict(during)}, after: {dict(end)}")
    assert set(during) == {"absent", "complete"}
    assert set(end) == {"complete"}


@BOTH
def test_without_syncs_the_model_loses_something(sources: Path, tmp_path: Path, kind: str) -> None:
    operations = operations_of(f"pack_careless-{kind}", sources, tmp_path)
    _, end = power_loss.outcomes(operations, tmp_path, partial(outcome, f"pack-{kind}"), 64, only_at_the_end=True)
    assert end["broken"]


DURABLE = [name for name in SCENARIOS if not name.startswith(("pack_stream", "unpack_pipe", "grow"))]


@pytest.mark.parametrize("scenario", DURABLE)
def test_what_returned_outlives_a_power_failure(sources: Path, tmp_path: Path, scenario: str) -> None:
    power_losses(sources, tmp_path, scenario)


@pytest.mark.torture
def test_a_grown_file_outlives_a_power_failure(sources: Path, tmp_path: Path) -> None:
    power_losses(sources, tmp_path, "grow-plain")
