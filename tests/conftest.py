"""Fixtures and checks that all tests share.

A test that lacks something optional says so with `pytest.skip(reason)`. Where VMSNAP_REQUIRE_ALL=1 is set, as in CI,
nothing may be missing: every skip, of one test or of a whole module, becomes a failure that names its reason. Only loop
devices and huge pages may be missing, because many containers do not have them.
"""

import os
import secrets
import signal
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hypothesis
import pytest
import qemus
import refusals
import vmsnap
from commands import write_private
from huge_pages import reserved
from small_disks import mounted
from support import Place

if TYPE_CHECKING:
    from toy_guest import Toy

REPOSITORY = Path(__file__).resolve().parents[1]

# A shell that runs the tests in the background lets them ignore SIGINT, and the programs that they start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("vmsnap", deadline=None)
hypothesis.settings.load_profile("vmsnap")


@pytest.fixture(scope="session", autouse=True)
def no_identity(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path, None, None]:
    """Return a directory for settings, so that no test finds or creates the identity of the user."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VMSNAP_IDENTITY", "VMSNAP_IDENTITY_FILE", "CREDENTIALS_DIRECTORY"):
            patch.delenv(name, raising=False)
        patch.setenv("XDG_CONFIG_HOME", str(home))
        yield home


@pytest.fixture
def key() -> bytes:
    """A fresh 32-byte key."""
    return secrets.token_bytes(32)


@pytest.fixture
def key_file(tmp_path: Path, key: bytes) -> Path:
    """A file with that key, as the command line takes it."""
    return write_private(tmp_path / "vm.key", key)


@pytest.fixture(params=["plain", "encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place for a snapshot: a plain one, then an encrypted one."""
    return Place(tmp_path / "vm1", vmsnap.generate_key() if request.param == "encrypted" else None)


@pytest.fixture
def encrypted_place(tmp_path: Path, key: bytes) -> Place:
    """A place for an encrypted snapshot."""
    return Place(tmp_path / "vm1", key)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory `shared` beside the checkout: known answers and other files that several programs test with."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no directory `shared` beside the checkout")
    return folder


@pytest.fixture(scope="session")
def guest_ram() -> Path:
    """The memory of a real Linux guest: a sparse file of 1 GiB, made where it is not there, that no test may change."""
    # Imported here, because it needs packages that only the tests of QEMU need.
    from guest_ram import made

    return made()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory for snapshots. The other files of a test are beside it."""
    path = tmp_path / "snapshots"
    path.mkdir()
    return path


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    """The path for the socket of a QEMU."""
    from guest import need_qemu

    need_qemu()
    return tmp_path / "qmp"


@pytest.fixture
def toy(tmp_path: Path) -> Generator["Toy", None, None]:
    """A guest that boots in well under a second, and checks its memory."""
    from toy_guest import Toy

    made = Toy(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=qemus.NAMES)
def qemu(request: pytest.FixtureRequest) -> qemus.Qemu:
    """A QEMU: that of the system, then 10.0 of Debian's backports. `qemu_command` takes it."""
    return qemus.found(request.param)


@pytest.fixture
def huge_pages() -> Callable[[int], AbstractContextManager[None]]:
    """Reserve a number of huge pages of 2 MiB during a block: ``with huge_pages(128): ...``."""
    return reserved


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 1 MiB and 20 files."""
    with mounted(tmp_path / "disk", "size=1m,nr_inodes=20") as folder:
        yield folder


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(*names): the rows of docs/errors.md that the test checks")


def pytest_runtest_setup(item: pytest.Item) -> None:
    refusals.begin_test(item)


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _refuse_skip(report: Report) -> Report:
    if os.environ.get("VMSNAP_REQUIRE_ALL") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if any(each in str(reason) for each in ("there are no loop devices", "there are no huge pages")):
            return report
        report.outcome = "failed"
        report.longrepr = f"{reason} (VMSNAP_REQUIRE_ALL=1 allows no skip)"
    return report


# Outermost, so that pytest's own treatment of skips is over when the report is seen.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _refuse_skip((yield))
