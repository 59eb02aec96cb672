"""Write a small encrypted and sealed snapshot, as simply as ``docs/format.md`` allows.

This is an example. Use vmsnap for real work: it uses all processors, compresses, and supports
more kinds of keys.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import BinaryIO

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from vmsnap_floe import (
    FLOE_IV_BYTES,
    HEADER_BYTES,
    HEADER_TAG_BYTES,
    KEY_BYTES,
    LENGTH_BYTES,
    NONCE_BYTES,
    NOT_LAST,
    PARAMETERS,
    POSITIONS_PER_KEY,
    SEGMENT_OVERHEAD_BYTES,
    FormatError,
    floe_kdf,
    require_key_length,
    segment_aad,
)
from vmsnap_snapshot import (
    FRAGMENT_AAD,
    KEY_AAD,
    KEY_CHUNK_SIZE,
    MANIFEST_AAD,
    MANIFEST_CHUNK_SIZE,
)
from vmsnap_tree import KEY_METADATA_NAME, MANIFEST_NAME, check_name, utf8

GENERATOR = "vmsnap_writer.py"
CHUNK_SIZE = 65536


# FLOE (section 2) ----------------------------------------------------------------------------------------------------


def _seal(source: Iterator[bytes], sink: BinaryIO, key: bytes, aad: bytes, chunk_size: int) -> bytes:
    """Seal chunks, each of them full but the last; return the header tag.

    The IV and every nonce are random, and used once: a second file under the same would destroy all protection.
    """
    parameters_and_iv = PARAMETERS.pack(0, 0, chunk_size + SEGMENT_OVERHEAD_BYTES, FLOE_IV_BYTES)
    parameters_and_iv += secrets.token_bytes(FLOE_IV_BYTES)
    header_tag = floe_kdf(key, parameters_and_iv, b"HEADER_TAG:", aad, HEADER_TAG_BYTES)
    message_key = floe_kdf(key, parameters_and_iv, b"MESSAGE_KEY:", aad, 48)
    sink.write(parameters_and_iv + header_tag)

    # A full chunk is only the last one where nothing follows: so one is always held back. Nothing at all is one, empty.
    chunk, position = next(source, b""), 0
    while True:
        following = next(source, None)
        is_last = following is None
        if position % POSITIONS_PER_KEY == 0:
            purpose = b"DEK:" + position.to_bytes(8, "big")
            cipher = AESGCM(floe_kdf(message_key, parameters_and_iv, purpose, aad, KEY_BYTES))
        length = len(chunk) + SEGMENT_OVERHEAD_BYTES if is_last else NOT_LAST
        nonce = secrets.token_bytes(NONCE_BYTES)
        sink.write(length.to_bytes(LENGTH_BYTES, "big") + nonce)
        sink.write(cipher.encrypt(nonce, chunk, segment_aad(position, is_last)))
        if following is None:
            return header_tag
        chunk, position = following, position + 1


def _chunks(data: bytes, chunk_size: int) -> Iterator[bytes]:
    return (data[at : at + chunk_size] for at in range(0, len(data), chunk_size))


def _chunks_of(file: BinaryIO, chunk_size: int) -> Iterator[bytes]:
    while chunk := file.read(chunk_size):  # a buffered file gives all it has until the end
        yield chunk


# CBOR (section 4) ----------------------------------------------------------------------------------------------------


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    info, length = next((info, 1 << info - 24) for info in range(24, 28) if argument < 1 << (8 << info - 24))
    return bytes([major << 5 | info]) + argument.to_bytes(length, "big")


def _cbor(value: object) -> bytes:
    """Encode an item in the one way in which section 4 allows it."""
    match value:
        case bool():
            return b"\xf5" if value else b"\xf4"
        case int():
            return _head(0, value)
        case bytes():
            return _head(2, len(value)) + value
        case str():
            return _head(3, len(value.encode())) + value.encode()
        case list():
            return _head(4, len(value)) + b"".join(map(_cbor, value))
        case Mapping():
            return _head(5, len(value)) + b"".join(_cbor(key) + _cbor(item) for key, item in value.items())
    raise TypeError(type(value))


# The snapshot (sections 1, 3 to 5) -----------------------------------------------------------------------------------


class _Writer:
    """A snapshot in the making."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._data_key = secrets.token_bytes(KEY_BYTES)
        self._snapshot_id = secrets.token_bytes(16)
        self._namespaces: list[str] = []
        self._fragments: dict[str, dict[str, object]] = {}

    def write_key(self, key: bytes) -> None:
        payload = {
            "format": "vmsnap-key",
            "version": 1,
            "snapshot_id": self._snapshot_id,
            "data_key": self._data_key,
            "sealed": True,  # without its manifest it is not complete
            "requires": [],
        }
        with self._new_file(KEY_METADATA_NAME) as sink:
            _seal(_chunks(_cbor(payload), KEY_CHUNK_SIZE), sink, key, KEY_AAD, KEY_CHUNK_SIZE)

    def add_folder(self, source: str, path: str = "") -> None:
        """Write every file below a folder as a fragment, and every folder as a namespace."""
        with os.scandir(source) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = utf8(os.fsencode(entry.name), repr(source))
            check_name(name, repr(source))
            child = f"{path}/{name}" if path else name
            if entry.is_dir(follow_symlinks=False):
                os.mkdir(os.path.join(self._root, child), 0o700)
                self._namespaces.append(child)
                self.add_folder(entry.path, child)
            elif entry.is_file(follow_symlinks=False):
                self._add_fragment(entry.path, child)
            else:
                raise FormatError("corrupt", f"{entry.path!r}: neither a regular file nor a directory")

    def _add_fragment(self, source: str, path: str) -> None:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file, self._new_file(path) as sink:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FormatError("corrupt", f"{source!r}: not a regular file")
            aad = FRAGMENT_AAD + path.encode()
            header_tag = _seal(_chunks_of(file, CHUNK_SIZE), sink, self._data_key, aad, CHUNK_SIZE)
            stored_size = sink.tell()
        segments = -(-(stored_size - HEADER_BYTES) // (CHUNK_SIZE + SEGMENT_OVERHEAD_BYTES))
        self._fragments[path] = {
            "size": stored_size - HEADER_BYTES - segments * SEGMENT_OVERHEAD_BYTES,
            "stored_size": stored_size,
            "chunk_size": CHUNK_SIZE,
            "floe_header_tag": header_tag,
        }

    def write_manifest(self) -> None:
        manifest = {
            "format": "vmsnap-manifest",
            "version": 1,
            "snapshot_id": self._snapshot_id,
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "generator": GENERATOR,
            "encrypted": True,
            "requires": [],
            "namespaces": sorted(self._namespaces),
            "fragments": dict(sorted(self._fragments.items())),  # by code point, which is the order of the bytes
        }
        with self._new_file(MANIFEST_NAME) as sink:
            chunks = _chunks(_cbor(manifest), MANIFEST_CHUNK_SIZE)
            _seal(chunks, sink, self._data_key, MANIFEST_AAD, MANIFEST_CHUNK_SIZE)

    def sync(self) -> None:
        """Bring every file, and then every folder from the deepest up, to the disk."""
        for folder, _, files in os.walk(self._root, topdown=False):
            for path in (*(os.path.join(folder, name) for name in files), folder):
                _sync(path)

    def _new_file(self, path: str) -> BinaryIO:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        return open(os.open(os.path.join(self._root, path), flags, 0o600), "wb")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_snapshot(root: str | os.PathLike[str], source: str | os.PathLike[str], key: bytes) -> None:
    """Make a snapshot of all files below a folder; it is there as a whole, or not at all.

    Parameters
    ----------
    root
        Where it is to be; there must be nothing.
    source
        The folder. Links and special files in it are refused.
    key
        The 32-byte key to wrap the data key with.

    Raises
    ------
    FormatError
        A name that no snapshot can have, a link or a special file.
    OSError
        Something is at `root`, or the system refuses.
    ValueError
        The key is not 32 bytes long.
    """
    require_key_length(key)
    root = os.path.abspath(root)
    _require_absent(root)
    # Beside its place, under a name that vmsnap's `clean` knows. The lock of section 5 is for several writers of one
    # snapshot: nobody else knows of this one.
    parent = os.path.dirname(root)
    staged = os.path.join(parent, f".vmsnap-{secrets.token_hex(8)}")
    os.mkdir(staged, 0o700)
    try:
        writer = _Writer(staged)
        writer.write_key(key)
        writer.add_folder(os.fspath(source))
        writer.write_manifest()
        writer.sync()
        _require_absent(root)  # rename(2) would take the place of an empty folder
        os.rename(staged, root)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _sync(parent)


def _require_absent(root: str) -> None:
    if os.path.lexists(root):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), root)
