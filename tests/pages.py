"""Code blocks of the README and of docs/, and how they are run as a reader would."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# `vmsnap` and `python3` come from the environment that the tests run in.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def text_of(page: str, heading: str = "") -> str:
    """The text of a page, or of the section of it under a heading."""
    text = (REPOSITORY / page).read_text()
    if not heading:
        return text
    [section] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(section)


def blocks(page: str, language: str, heading: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page, heading), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a block in sh, one by one."""
    return [line for line in block.splitlines() if line.strip()]


def shell(script: str, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a block in sh, or a line of it, and hold it to an exit status."""
    environment = os.environ | {"PATH": PATH}
    done = subprocess.run(["sh", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, f"{script}\n{done.stdout}{done.stderr}"
    return done


def python(script: str, folder: Path) -> str:
    """Run blocks in Python, and return their output."""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def at_a_terminal(script: str, folder: Path, answers: list[str]) -> str:
    """Run a line of sh on a terminal of its own, type an answer at each prompt, and return the output."""
    child, terminal = pty.fork()
    if not child:
        os.chdir(folder)
        os.execvpe("sh", ["sh", "-euc", script], os.environ | {"PATH": PATH})
    printed, left = b"", list(answers)
    try:
        while piece := _typed_on(terminal):
            printed += piece
            # Input typed before a prompt has been shown is discarded.
            if left and printed.endswith(b": "):
                os.write(terminal, left.pop(0).encode() + b"\n")
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"{script}\n{printed.decode()}"
    assert not left, f"{script} did not ask for {left}"
    return printed.decode()


def _typed_on(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other side was closed
        return b""
