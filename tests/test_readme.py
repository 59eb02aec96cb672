"""Every line of the README that a reader may copy is run as it stands; its Rust is run by `cargo test`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["disk.img", "ram.img"]:
        (tmp_path / name).write_bytes(os.urandom(300_000))
    return tmp_path


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    # One after the other, as they are read.
    script = "\n".join(blocks("python"))
    output = subprocess.check_output([sys.executable, "-c", script], cwd=folder, text=True)
    assert output == "[] ['disks']\n300000\n"


def test_the_python_of_the_guide_runs(tmp_path: Path) -> None:
    subprocess.check_output([sys.executable, "-c", "\n".join(blocks("python", "docs/guide.md"))], cwd=tmp_path)


def test_the_commands_of_the_readme_run(folder: Path) -> None:
    [commands] = [block for block in blocks("sh") if "vmsnap ls" in block]
    commands = commands.replace("vmsnap demo", "vmsnap demo --size-mib 8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = subprocess.check_output(["sh", "-euc", commands], cwd=folder, env={**os.environ, "PATH": path})
    assert (folder / "ram.img").read_bytes()[4096:4608] in output
    assert output.startswith(b"ram\t300000\n")


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z]+)", (REPOSITORY / "README.md").read_text()))
    assert {"demo", "test", "build"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for document in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
