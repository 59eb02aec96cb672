"""The pictures of the documentation: `make pictures` records them, and they show commands of today."""

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = REPOSITORY / "docs/images"
PNG = b"\x89PNG\r\n\x1a\n"

for extra in ("rich", "PIL"):
    if importlib.util.find_spec(extra) is None:
        pytest.skip(f"no {extra} beside this Python: pip install 'vmsnap[cli,map]'", allow_module_level=True)

specification = importlib.util.spec_from_file_location("pictures", REPOSITORY / "scripts/pictures.py")
assert specification
assert specification.loader
pictures = importlib.util.module_from_spec(specification)
specification.loader.exec_module(pictures)


def text_of(picture: Path) -> str:
    """The text of a recorded session, without the ends of its lines."""
    ElementTree.parse(picture)  # it is well-formed
    return "".join(html.unescape(text) for text in re.findall(r"<text [^>]*>([^<]*)", picture.read_text())).replace(
        "\xa0", " "
    )


def commands() -> list[str]:
    return [command.replace("ADDRESS", "0x1000") for command, _ in pictures.SESSION]


def test_the_session_is_recorded_from_a_real_run(tmp_path: Path) -> None:
    image, target = tmp_path / "image", tmp_path / "images"
    version = b"Linux version 6.1.0 (builder@example.org) (gcc 12.2.0, GNU ld 2.40) #1 SMP PREEMPT_DYNAMIC " + b"x" * 40
    # More than 1,000,000 bytes that cannot be compressed: the session changes a byte there.
    image.write_bytes(bytes(0x1000) + version.ljust(0x1000, b"\0") + os.urandom(1 << 20))
    subprocess.run([sys.executable, REPOSITORY / "scripts/pictures.py", image, target], check=True)
    told = text_of(target / "session.svg")
    for command in commands():
        assert f"$ {command}" in told
    assert f"|{version[:16].decode()}|" in told
    assert "FAILED: 1 problem" in told
    assert (target / "map.png").read_bytes().startswith(PNG)


def test_a_command_that_fails_ends_the_recording(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="vmsnap info missing: exit status"):
        pictures.shown("vmsnap info missing", 0, tmp_path)


def test_a_progress_bar_leaves_nothing() -> None:
    bar = "\x1b[?25l\rread 10%\r\x1b[2Kread 90%\n\r\x1b[1A\x1b[2K\x1b[?25h"
    assert pictures.left_on(f"first\r\n{bar}\x1b[1mlast\x1b[0m\r\n") == "first\n\x1b[1mlast\x1b[0m"


def test_the_pictures_of_the_documentation_are_of_the_session_of_today() -> None:
    told = text_of(IMAGES / "session.svg")
    for command, _ in pictures.SESSION:
        assert f"$ {command.partition('ADDRESS')[0]}" in told
    assert (IMAGES / "map.png").read_bytes().startswith(PNG)


def test_pictures_are_small_and_load_nothing() -> None:
    for picture in IMAGES.iterdir():
        assert picture.stat().st_size < 200 << 10, picture.name
        if picture.suffix == ".svg":
            assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\((?!#)", picture.read_text()), picture.name
