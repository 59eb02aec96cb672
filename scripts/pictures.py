"""Make the pictures of the documentation from a real run: `make pictures` runs it.

    scripts/pictures.py IMAGE [DIRECTORY]

IMAGE is the raw memory of a guest. The commands of `SESSION` store it, and their output becomes DIRECTORY/session.svg
(DIRECTORY is docs/images by default), beside map.png from `vmsnap map`.
"""

import io
import mmap
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parents[1]
COLUMNS = 108

# Each command with the status that it exits with. ADDRESS becomes that of the version of the guest's kernel.
SESSION = [
    ("vmsnap dump ram.img vm1 --compress lz4 --encrypt", 0),
    ("vmsnap info vm1", 0),
    ("vmsnap peek vm1 ADDRESS 96", 0),
    ("vmsnap map vm1 -o map.png", 0),
    ("vmsnap restore vm1 back.img && cmp ram.img back.img", 0),
    ("vmsnap verify vm1", 0),
    ("printf tampered | dd of=vm1/mem bs=1 seek=1000000 conv=notrunc status=none", 0),
    ("vmsnap verify vm1", 1),
]
# The text, not the one in the compressed image of the kernel.
KERNEL = re.compile(rb"Linux version [ -~]{80}")

# The template of rich without its fonts, which it loads from another host.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def address_of_kernel(image: Path) -> str:
    """Return where the version of the kernel is in memory, at a multiple of 16; 0x1000 if it is not there."""
    with open(image, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        found = KERNEL.search(memory)
        return hex(found.start() // 16 * 16) if found else "0x1000"


# Control sequences of the terminal (colors among them), and text without any.
TOKEN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+")


def left_on(terminal: str) -> str:
    """Return the text that stays on a terminal: rich draws a progress bar, moves up and erases it."""
    lines, row = [""], 0
    for token in TOKEN.findall(terminal):
        match token:
            case "\n":
                row += 1
                lines += [""] * (row == len(lines))
            case "\x1b[1A":
                row -= 1
            case "\x1b[2K":
                lines[row] = ""
            case "\r" | "\x1b[?25l" | "\x1b[?25h":
                pass
            case _:
                lines[row] += token
    return "\n".join(lines).rstrip("\n")


def shown(command: str, status: int, directory: Path) -> str:
    """Run a command on a terminal; returns the text that it left there."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, COLUMNS))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TERM": "xterm-256color",
        "XDG_CONFIG_HOME": str(directory / "settings"),
    }
    shell = ["sh", "-c", command]
    with subprocess.Popen(shell, cwd=directory, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        printed = b""
        try:
            while read := os.read(ours, 4096):
                printed += read
        except OSError:  # EIO: the command has closed the terminal
            os.close(ours)
    text = left_on(printed.decode())
    if process.returncode != status:
        sys.exit(f"{command}: exit status {process.returncode}, expected {status}\n{text}")
    return text


def record(image: Path, target: Path) -> None:
    """Run the session and write both pictures to the directory `target`."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "ram.img").symlink_to(image.resolve())
        # An identity that exists: the first use of it would print the path of this directory.
        (directory / "settings/vmsnap").mkdir(mode=0o700, parents=True)
        shown("vmsnap keygen -o settings/vmsnap/identity.txt", 0, directory)
        address = address_of_kernel(image)
        for command, status in SESSION:
            command = command.replace("ADDRESS", address)
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=True)
            if text := shown(command, status, directory):
                console.print(Text.from_ansi(text))
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / "map.png", target / "map.png")
    svg = console.export_svg(title="vmsnap", theme=MONOKAI, code_format=SVG, unique_id="session")
    (target / "session.svg").write_text(svg)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    record(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else REPOSITORY / "docs/images")
