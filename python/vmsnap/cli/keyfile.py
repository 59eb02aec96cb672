"""The file that a key is read from."""

import os
import re
import stat
from pathlib import Path

from vmsnap.cli.failure import CommandError
from vmsnap.cli.files import NamedFile

KEY_BYTES = 32
# Hex digits and "\r\n", and one byte more to find out that a file is longer.
_READ_BYTES = 2 * KEY_BYTES + 3


def read_key_file(path: Path) -> bytes:
    """Return the key in a file: 32 raw bytes or 64 hex digits, with or without a newline at the end.

    Raises
    ------
    CommandError
        If others than the owner may read or change the file, or it holds no key.
    OSError
        If the file cannot be read.
    """
    with NamedFile(path, "rb", str(path)) as file:
        # The open file is asked, not its path, which may be another file by now.
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise CommandError(f"{path}: others may use this key file (mode {mode:04o}): chmod 600 '{path}'")
        content = b""
        while len(content) < _READ_BYTES and (piece := file.read(_READ_BYTES - len(content))):
            content += piece
    # A raw key may itself end in the byte of a newline.
    if len(content) != KEY_BYTES:
        content = re.sub(rb"\r?\n\Z", b"", content)
    if re.fullmatch(rb"[0-9A-Fa-f]{%d}" % (2 * KEY_BYTES), content):
        return bytes.fromhex(content.decode())
    if len(content) == KEY_BYTES:
        return content
    raise CommandError(f"{path}: a key file holds {KEY_BYTES} bytes, or {2 * KEY_BYTES} hex digits")
