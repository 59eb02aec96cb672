#!/usr/bin/env python3
"""Read vmsnap snapshots, plain and encrypted, without vmsnap.

Written from ``docs/format.md`` alone; section numbers refer to that page. Needs Python 3.11 and the package
``cryptography``. As a program::

    vmsnap_reader.py SNAPSHOT [--key-file FILE] list | check | cat PATH | restore OUT_DIR [NAMESPACE]
    vmsnap_reader.py SNAPSHOT_DIR --key-file FILE write SOURCE_DIR
    vmsnap_reader.py ARCHIVE [--key-file FILE] pack SNAPSHOT_DIR

SNAPSHOT is a directory or an archive.

As a module: `open_snapshot`, `Snapshot`, `floe_decrypt`, `FormatError`, `AuthenticationError`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Sequence

from vmsnap_floe import KEY_BYTES, AuthenticationError, FormatError, floe_decrypt
from vmsnap_snapshot import MAX_KEY_FILE_BYTES, Snapshot, open_snapshot

__all__ = ["AuthenticationError", "FormatError", "Snapshot", "floe_decrypt", "open_snapshot"]

#: What a terminal would obey, or draw elsewhere than it stands.
UNPRINTABLE = re.compile("[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """Escape what a terminal would obey. Unambiguous for paths: a backslash is in no name."""
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _parse_key(data: bytes, where: str) -> bytes:
    """Take 64 hex digits, with or without a line end, for a key."""
    text = data.strip(b"\r\n")
    if not re.fullmatch(rb"[0-9A-Fa-f]{64}", text):
        raise ValueError(f"{where} does not hold a key of {KEY_BYTES} bytes")
    return bytes.fromhex(text.decode())


def _key(arguments: argparse.Namespace) -> bytes | None:
    if arguments.key_file is not None:
        with open(arguments.key_file, "rb") as stream:
            data = stream.read(256)
        return data if len(data) == KEY_BYTES else _parse_key(data, f"the file {arguments.key_file!r}")
    if arguments.key_hex_env is not None:
        value = os.environ.get(arguments.key_hex_env)
        if value is None:
            raise ValueError(f"the environment variable {arguments.key_hex_env} is not set")
        return _parse_key(os.fsencode(value), f"the environment variable {arguments.key_hex_env}")
    return None


def _payload(arguments: argparse.Namespace) -> bytes | None:
    if arguments.payload_file is None:
        return None
    if arguments.payload_file == "-":
        return sys.stdin.buffer.read(MAX_KEY_FILE_BYTES)
    with open(arguments.payload_file, "rb") as stream:
        return stream.read(MAX_KEY_FILE_BYTES)


def _refused(error: FormatError) -> None:
    print(f"refused: {error.kind}: {printable(str(error))}", file=sys.stderr)


def _list(snapshot: Snapshot) -> bool:
    """Print sizes and paths; tell whether all fragments opened."""
    refused = 0
    for path in snapshot.fragments():
        try:
            print(f"{snapshot.size(path):>16}  {printable(path)}")
        except FormatError as error:
            refused += 1
            _refused(error)
    return refused == 0


def _check(snapshot: Snapshot) -> bool:
    """Open every segment of every fragment, never stopping at the first error; tell whether all are good."""
    total = opened = 0
    paths = snapshot.fragments()
    for path in paths:
        digest, size = hashlib.sha256(), 0
        try:
            for piece in snapshot.stream(path):
                digest.update(piece)
                size += len(piece)
        except FormatError as error:
            print("refused", error.kind, printable(path), printable(str(error)), sep="\t")
        else:
            print("ok", size, digest.hexdigest(), printable(path), sep="\t")
            total += size
            opened += 1
    how = "every segment is authentic" if snapshot.encrypted else "plain, nothing proves that they are unchanged"
    print(
        f"{opened} of {len(paths)} fragments read, {total} bytes: {how if opened == len(paths) else 'damaged'}",
        file=sys.stderr,
    )
    return opened == len(paths)


def _cat(snapshot: Snapshot, path: str) -> bool:
    """Write a fragment's plaintext to the standard output."""
    for piece in snapshot.stream(path):
        sys.stdout.buffer.write(piece)
    return True


def _restore(snapshot: Snapshot, folder: str, namespace: str) -> bool:
    import vmsnap_memory  # here, for whoever copied what reads fragments alone

    vmsnap_memory.restore(snapshot, folder, namespace)
    return True


def _write(root: str, source: str, key: bytes | None) -> bool:
    import vmsnap_writer  # here, for whoever copied the reader alone

    if key is None:
        raise FormatError("key", "an encrypted snapshot needs a key: --key-file")
    vmsnap_writer.write_snapshot(root, source, key)
    return True


def _pack(archive: str, source: str, key: bytes | None, payload: bytes | None) -> bool:
    import vmsnap_packer  # here, for whoever copied the reader alone

    vmsnap_packer.pack(open_snapshot(source, key, payload=payload), archive)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Read a vmsnap snapshot.")
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="the snapshot's root, or an archive")
    key_options = parser.add_mutually_exclusive_group()
    key_options.add_argument("--key-file", metavar="FILE", help="the key: 32 bytes, or 64 hex digits")
    key_options.add_argument("--key-hex-env", metavar="VAR", help="an environment variable with the key, 64 hex digits")
    key_options.add_argument("--payload-file", metavar="FILE", help="what age -d made of enc_metadata; - for the input")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print size and path of every fragment")
    commands.add_parser("check", help="open every segment of every fragment")
    commands.add_parser("cat", help="write a fragment to the standard output").add_argument("path", metavar="PATH")
    restore = commands.add_parser("restore", help="write guest memory into a new folder, a file for each region")
    restore.add_argument("folder", metavar="OUT_DIR")
    restore.add_argument("namespace", metavar="NAMESPACE", nargs="?", default="", help="where it is; the root")
    write = commands.add_parser("write", help="make SNAPSHOT, encrypted and sealed, of all files below a folder")
    write.add_argument("source", metavar="SOURCE_DIR")
    pack = commands.add_parser("pack", help="make SNAPSHOT, an archive, of a sealed snapshot")
    pack.add_argument("source", metavar="SNAPSHOT_DIR")
    return parser


def _run(arguments: argparse.Namespace, key: bytes | None, payload: bytes | None) -> bool:
    if arguments.command == "write":
        return _write(arguments.snapshot, arguments.source, key)
    if arguments.command == "pack":
        return _pack(arguments.snapshot, arguments.source, key, payload)
    snapshot = open_snapshot(arguments.snapshot, key, payload=payload)
    match arguments.command:
        case "list":
            return _list(snapshot)
        case "check":
            return _check(snapshot)
        case "cat":
            return _cat(snapshot, arguments.path)
    return _restore(snapshot, arguments.folder, arguments.namespace)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Parameters
    ----------
    argv
        The arguments, the process's own if None.

    Returns
    -------
    int
        0 for success, 1 where the snapshot or a fragment was refused; wrong usage exits with 2.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        key, payload = _key(arguments), _payload(arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        good = _run(arguments, key, payload)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away; without this, Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FormatError as error:
        _refused(error)
        return 1
    except OSError as error:
        _refused(FormatError("io", str(error)))
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
