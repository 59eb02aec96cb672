"""The wheel, as a user gets it: built as for a release, installed into an environment that holds nothing else."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from toolchains import OFFLINE

REPOSITORY = Path(__file__).resolve().parents[1]
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # no stable ABI for it: a wheel for this Python alone

WRITE_AND_READ_BACK = """
import sys, vmsnap

root, key, content = sys.argv[1], vmsnap.generate_key(), bytes(range(256)) * 1000
writer = vmsnap.SnapshotWriter(root, encrypt=True, key=key)
with writer.add_namespace("disks").raw_fragment("sda") as f:
    f.write(content)
writer.write_fragment("clock", {"ns": 12})
assert vmsnap.SnapshotReader(root, key=key).read_fragment("clock") == {"ns": 12}
with vmsnap.SnapshotReader(root, require_encrypted=True, key=key).namespace("disks").raw_fragment("sda") as f:
    assert f.read() == content
    assert f.read_at(123_456, 100) == content[123_456:123_556]
try:
    vmsnap.SnapshotReader(root, key=vmsnap.generate_key()).namespace("disks").raw_fragment("sda").read()
except vmsnap.AuthenticationError:
    print(vmsnap.__version__, vmsnap.__file__)
else:
    sys.exit("another key opened the fragment")
"""


def run(*command: str | Path, cwd: Path = REPOSITORY, env: dict[str, str] | None = None) -> str:
    """Run a command that has to end well; the test is skipped where it does not for want of an index of packages."""
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode and any(sign in done.stdout for sign in OFFLINE):
        pytest.skip(f"{Path(command[0]).name} cannot fetch packages: {done.stdout.strip()[-500:]}")
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("maturin") is None:
        pytest.skip("no maturin beside this Python: pip install --group build")
    if shutil.which("cargo") is None:
        pytest.skip("no cargo on the PATH")
    out = tmp_path_factory.mktemp("wheel")
    # The same call as in the Makefile: cargo finds everything in ./target.
    maturin = [sys.executable, "-m", "maturin", "build", "--release", "--locked"]
    run(*maturin, "--interpreter", sys.executable, "--out", out)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that holds pip and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def test_one_wheel_serves_every_cpython_from_3_11_on(wheel: Path) -> None:
    assert wheel.name.startswith("vmsnap-")
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert (f"-{this}-{this}t-" if FREE_THREADED else "-cp311-abi3-") in wheel.name
    assert "linux" in wheel.name


def test_the_wheel_holds_the_package_its_types_and_all_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
        info = metadata_name.removesuffix("METADATA")
        entry_points = archive.read(f"{info}entry_points.txt").decode()
    assert {
        "vmsnap/__init__.py",
        f"vmsnap/_vmsnap{sysconfig.get_config_var('EXT_SUFFIX') if FREE_THREADED else '.abi3.so'}",
        "vmsnap/_vmsnap.pyi",
        "vmsnap/py.typed",
        "vmsnap/cli/__init__.py",
        f"{info}licenses/LICENSE-APACHE",
        f"{info}licenses/LICENSE-MIT",
        f"{info}licenses/LICENSE-THIRD-PARTY",
    } <= set(names)
    folders = {name.split("/")[0] for name in names}
    assert {"vmsnap", info.rstrip("/")} <= folders <= {"vmsnap", info.rstrip("/"), "vmsnap.libs"}
    assert not [name for name in names if "__pycache__" in name]
    assert metadata["License-Expression"] == "MIT OR Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Version"] in wheel.name
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [re.split("[<>=!~ ;]", line)[0] for line in needed] == ["cbor2"]
    assert "vmsnap=vmsnap.cli:main" in entry_points.replace(" ", "")


def test_the_wheel_works_in_an_empty_environment(wheel: Path, empty_environment: Path, tmp_path: Path) -> None:
    # With its dependencies, from the index that pip uses.
    run(empty_environment, "-m", "pip", "install", wheel)
    # -I: neither this directory nor PYTHONPATH can replace the installed package.
    printed = run(empty_environment, "-I", "-c", WRITE_AND_READ_BACK, tmp_path / "vm1")
    version, installed_at = printed.split()
    assert f"vmsnap-{version}-" in wheel.name
    assert Path(installed_at).is_relative_to(empty_environment.parents[1])


def test_the_licences_are_those_of_what_is_linked_in() -> None:
    if shutil.which("cargo") is None:
        pytest.skip("no cargo on the PATH")
    script = runpy.run_path(str(REPOSITORY / "scripts/third_party_licenses.py"))
    run("cargo", "fetch", "--locked", *(f"--target={platform}" for platform in script["PLATFORMS"]))
    assert script["whole"]() == script["TARGET"].read_text(encoding="utf-8"), "make licenses"
    named = script["TARGET"].read_text(encoding="utf-8")
    for crate in ("aws-lc-sys", "age", "blake3", "pyo3", "libc"):
        assert re.search(rf"^{crate} [0-9.]+.* \(", named, re.MULTILINE), crate


# Sources -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist. Its build dependencies are installed if the wheel was built."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "maturin", "sdist", "--out", out)
    (built,) = out.iterdir()
    return built


def test_the_sdist_holds_what_is_built_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Cargo.toml", "Cargo.lock", "build.rs", "pyproject.toml", "README.md", "src/lib.rs"} <= names
    assert {"LICENSE-MIT", "LICENSE-APACHE", "LICENSE-THIRD-PARTY", "python/vmsnap/__init__.py"} <= names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"src", "python", "docs"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]


def test_the_sdist_builds_and_works_where_there_is_nothing_else(sdist: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    # cargo finds all crates there that it compiled for the wheel, except vmsnap itself.
    target = os.environ | {"CARGO_TARGET_DIR": str(REPOSITORY / "target")}
    (tmp_path / "empty").mkdir()
    run(environment / "bin/python", "-m", "pip", "install", sdist, cwd=tmp_path / "empty", env=target)
    printed = run(environment / "bin/python", "-I", "-c", WRITE_AND_READ_BACK, tmp_path / "vm1")
    assert Path(printed.split()[1]).is_relative_to(environment)


def test_the_crate_is_packaged_and_builds_from_the_package(wheel: Path) -> None:
    # Not --no-verify: cargo compiles the package. A checkout may have changes; that of CI does not.
    run("cargo", "package", "--locked", "--allow-dirty", "--quiet")
    listed = set(run("cargo", "package", "--locked", "--allow-dirty", "--list").splitlines())
    pages = {"README.md", "docs/format.md", "docs/rust.md"}
    assert {"src/lib.rs", "build.rs", "LICENSE-MIT", "LICENSE-APACHE"} | pages <= listed
    assert not [name for name in listed if name.startswith(("tests/", "python/", "rust-tests/", "examples/"))]


def test_an_index_would_take_wheel_and_sdist(wheel: Path, sdist: Path) -> None:
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
