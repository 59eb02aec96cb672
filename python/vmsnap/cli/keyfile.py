"""Files with secrets, and the key in a key file."""

import re
from os import PathLike
from pathlib import Path

import vmsnap
from vmsnap.cli.failure import CommandError
from vmsnap.keys import read_secret_file

KEY_BYTES = 32


def read_private(path: "str | PathLike[str]") -> bytearray:
    """Return the contents of a file with a secret.

    Raises
    ------
    CommandError
        If others than the owner may read or change the file.
    OSError
        If the file cannot be read.
    """
    try:
        return read_secret_file(path)
    except vmsnap.KeyUnavailableError as refused:
        raise CommandError(str(refused)) from None


def read_key_file(path: Path) -> bytes:
    """Return the key in a file: 32 raw bytes or 64 hex digits, with or without a newline at the end.

    Raises
    ------
    CommandError
        If others than the owner may read or change the file, or it does not contain a key.
    OSError
        If the file cannot be read.
    """
    content = bytes(read_private(path))
    # A raw key may itself end in the byte of a newline.
    if len(content) != KEY_BYTES:
        content = re.sub(rb"\r?\n\Z", b"", content)
    if re.fullmatch(rb"[0-9A-Fa-f]{%d}" % (2 * KEY_BYTES), content):
        return bytes.fromhex(content.decode())
    if len(content) == KEY_BYTES:
        return content
    raise CommandError(f"{path} is not a key file: expected {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits")
