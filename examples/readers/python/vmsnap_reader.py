#!/usr/bin/env python3
"""Read vmsnap snapshots, plain and encrypted, without vmsnap.

Uses nothing beyond what ``docs/format.md`` says; section numbers in the comments are of that page. Needs Python 3.11
and the package ``cryptography``. As a program::

    vmsnap_reader.py SNAPSHOT_DIR [--key-file FILE | --key-hex-env VAR | --payload-file FILE] list | cat PATH | check

As a module: `open_snapshot`, `Snapshot`, `floe_decrypt`, `FormatError`, `AuthenticationError`.
"""

from __future__ import annotations

import argparse
import hmac
import io
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["AuthenticationError", "FormatError", "Snapshot", "floe_decrypt", "open_snapshot"]

KEY_BYTES = 32

# Section 2: a FLOE header is 10 bytes of parameters, the IV, the header tag.
PARAMETERS = struct.Struct(">BBII")
FLOE_IV_BYTES = 32
HEADER_TAG_BYTES = 32
HEADER_BYTES = PARAMETERS.size + FLOE_IV_BYTES + HEADER_TAG_BYTES
# ... and a segment is a length, a nonce, the ciphertext, a tag.
LENGTH_BYTES = 4
NONCE_BYTES = 12
TAG_BYTES = 16
SEGMENT_OVERHEAD_BYTES = LENGTH_BYTES + NONCE_BYTES + TAG_BYTES
NOT_LAST = 0xFFFFFFFF
MAX_SEGMENTS = 1 << 40
POSITIONS_PER_KEY = 1 << 20

# Sections 3 and 4.
FRAGMENT_AAD = b"vmsnap/1/fragment\x00"
FRAGMENT_SEGMENT_LENGTHS = range(32 + SEGMENT_OVERHEAD_BYTES, (64 << 20) + SEGMENT_OVERHEAD_BYTES + 1)
KEY_AAD = b"vmsnap/1/key"
KEY_SEGMENT_LENGTH = 1056
KEY_FILE_PREFIX = PARAMETERS.pack(0, 0, KEY_SEGMENT_LENGTH, FLOE_IV_BYTES)
UNSUPPORTED_KEY_FILES = {b"age-encryption.org/v1": "age", b"\xd9\xd9\xf7": "a key service"}
MAX_KEY_FILE_BYTES = 1 << 20
MAX_CBOR_DEPTH = 16

MANIFEST_AAD = b"vmsnap/1/manifest"
MANIFEST_SEGMENT_LENGTH = (1 << 16) + SEGMENT_OVERHEAD_BYTES
MAX_MANIFEST_BYTES = 1 << 28

KEY_METADATA_NAME = "enc_metadata"
MANIFEST_NAME = "vmsnap_manifest"
RESERVED_NAMES = (b"enc_metadata", b"vmsnap_manifest")
RESERVED_PREFIX = b".vmsnap"
MAX_NAME_BYTES = 255

PLAIN_READ_BYTES = 1 << 20


class FormatError(Exception):
    """What is on disk is not a snapshot that this reader reads, or not the one that was asked for."""


class AuthenticationError(FormatError):
    """A tag does not fit: the key is wrong, or the file was damaged, changed, moved or swapped."""


# FLOE (section 2) ----------------------------------------------------------------------------------------------------


def _kdf(key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand-SHA-384 for at most 48 bytes, which is one HMAC (RFC 5869, section 2.3)."""
    return hmac.digest(key, info + b"\x01", "sha384")[:length]


class _FloeFile:
    """One FLOE ciphertext whose header and last segment were found authentic.

    Parameters
    ----------
    stream
        The ciphertext, seekable.
    key
        The FLOE key, 32 bytes.
    aad
        The FLOE AAD.
    what
        How errors name the ciphertext.
    segment_lengths
        The segment lengths that are accepted.
    """

    def __init__(self, stream: BinaryIO, key: bytes, aad: bytes, what: str, segment_lengths: range) -> None:
        self._stream = stream
        self._what = what
        self._aad = aad
        self._cipher: tuple[int, AESGCM] | None = None

        file_size = stream.seek(0, os.SEEK_END)
        if file_size < HEADER_BYTES + SEGMENT_OVERHEAD_BYTES:
            raise FormatError(f"{what}: too short for a FLOE ciphertext: truncated, or not encrypted")
        header = self._read_at(0, HEADER_BYTES)
        aead_id, kdf_id, self._segment_length, iv_length = PARAMETERS.unpack_from(header)
        if (aead_id, kdf_id, iv_length) != (0, 0, FLOE_IV_BYTES):
            raise FormatError(f"{what}: no FLOE header: damaged, or not encrypted")
        if self._segment_length not in segment_lengths:
            raise FormatError(f"{what}: segment length {self._segment_length} is not allowed here")

        self._parameters_and_iv, header_tag = header[:-HEADER_TAG_BYTES], header[-HEADER_TAG_BYTES:]
        expected_tag = self._floe_kdf(key, b"HEADER_TAG:", HEADER_TAG_BYTES)
        if not hmac.compare_digest(expected_tag, header_tag):
            raise AuthenticationError(f"{what}: wrong key, or the header was damaged, or it is not in its own place")
        self._message_key = self._floe_kdf(key, b"MESSAGE_KEY:", 48)

        body_size = file_size - HEADER_BYTES
        self._segment_count = -(-body_size // self._segment_length)
        self._last_length = body_size - (self._segment_count - 1) * self._segment_length
        if self._last_length < SEGMENT_OVERHEAD_BYTES or self._segment_count > MAX_SEGMENTS:
            raise FormatError(f"{what}: no FLOE ciphertext has this length: truncated or extended")
        self.chunk_size: int = self._segment_length - SEGMENT_OVERHEAD_BYTES
        self.size: int = body_size - self._segment_count * SEGMENT_OVERHEAD_BYTES
        self.segment(self._segment_count - 1)

    def segment(self, position: int) -> bytes:
        """Return the plaintext of one segment, after its tag was checked."""
        is_last = position == self._segment_count - 1
        length = self._last_length if is_last else self._segment_length
        data = memoryview(self._read_at(HEADER_BYTES + position * self._segment_length, length))
        if int.from_bytes(data[:LENGTH_BYTES], "big") != (length if is_last else NOT_LAST):
            raise FormatError(f"{self._what}: wrong length in front of segment {position}: truncated or damaged")
        nonce = data[LENGTH_BYTES : LENGTH_BYTES + NONCE_BYTES]
        segment_aad = position.to_bytes(8, "big") + (b"\x01" if is_last else b"\x00")
        try:
            return self._cipher_at(position).decrypt(nonce, data[LENGTH_BYTES + NONCE_BYTES :], segment_aad)
        except InvalidTag:
            raise AuthenticationError(f"{self._what}: segment {position}: wrong key, or damaged") from None

    def pieces(self) -> Iterator[bytes]:
        """Yield the plaintext, a segment at a time."""
        for position in range(self._segment_count):
            yield self.segment(position)

    def _floe_kdf(self, key: bytes, purpose: bytes, length: int) -> bytes:
        return _kdf(key, self._parameters_and_iv + purpose + self._aad, length)

    def _cipher_at(self, position: int) -> AESGCM:
        masked = position & ~(POSITIONS_PER_KEY - 1)
        if self._cipher is None or self._cipher[0] != masked:
            segment_key = self._floe_kdf(self._message_key, b"DEK:" + masked.to_bytes(8, "big"), KEY_BYTES)
            self._cipher = (masked, AESGCM(segment_key))
        return self._cipher[1]

    def _read_at(self, offset: int, length: int) -> bytes:
        self._stream.seek(offset)
        data = self._stream.read(length)
        if len(data) != length:
            raise FormatError(f"{self._what}: became shorter while it was read")
        return data


def floe_decrypt(key: bytes, aad: bytes, ciphertext: bytes) -> bytes:
    """Decrypt one whole FLOE ciphertext, with whatever segment length it has.

    Parameters
    ----------
    key
        The FLOE key, 32 bytes; another length is a `ValueError`.
    aad
        The FLOE AAD.
    ciphertext
        Header and all segments.

    Raises
    ------
    FormatError
        The bytes are not a FLOE ciphertext; `AuthenticationError` where a tag does not fit.
    """
    _require_key_length(key)
    any_segment_length = range(SEGMENT_OVERHEAD_BYTES + 1, NOT_LAST)
    return b"".join(_FloeFile(io.BytesIO(ciphertext), key, aad, "ciphertext", any_segment_length).pieces())


def _require_key_length(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}")


# CBOR (RFC 8949), as much as the key payload needs -------------------------------------------------------------------


class _CborReader:
    """A decoder of the one way in which section 4 allows each thing. Floats become None: no known key takes them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def whole(self) -> object:
        """Return the one item that the data hold."""
        item = self._item(1)
        if self._position != len(self._data):
            raise FormatError("bytes after the CBOR item")
        return item

    def _take(self, count: int) -> bytes:
        data = self._data[self._position : self._position + count]
        if len(data) != count:
            raise FormatError("the CBOR item is cut off")
        self._position += count
        return data

    def _head(self) -> tuple[int, int, int]:
        """Return major type, additional information and argument, which must be in its shortest form."""
        major, info = divmod(self._take(1)[0], 32)
        if info < 24:
            return major, info, info
        if info > 27:
            raise FormatError("a CBOR item has no definite length, or is not well-formed")
        argument = int.from_bytes(self._take(1 << (info - 24)), "big")
        # A float's argument is its bits, whatever they are.
        if argument < (24, 1 << 8, 1 << 16, 1 << 32)[info - 24] and not (major == 7 and info > 24):
            raise FormatError("a CBOR number or length is not in its shortest form")
        return major, info, argument

    def _item(self, depth: int) -> object:
        if depth > MAX_CBOR_DEPTH:
            raise FormatError("CBOR items are nested too deep")
        major, info, argument = self._head()
        match major:
            case 0:
                return argument
            case 1:
                return -1 - argument
            case 2:
                return self._take(argument)
            case 3:
                return self._text(argument)
            case 4:
                return [self._item(depth + 1) for _ in range(argument)]
            case 5:
                return self._map(argument, depth)
            case 7 if 20 <= info <= 22:
                return {20: False, 21: True, 22: None}[info]
            case 7 if info > 24:
                return None
        raise FormatError("a CBOR item has a tag, or a simple value other than false, true and null")

    def _map(self, count: int, depth: int) -> dict[str, object]:
        result: dict[str, object] = {}
        for _ in range(count):
            major, _, length = self._head()
            if major != 3:
                raise FormatError("a key of a CBOR map is not text")
            key = self._text(length)
            if key in result:
                raise FormatError(f"a CBOR map has the key {key!r} twice")
            result[key] = self._item(depth + 1)
        return result

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise FormatError("a CBOR text is not UTF-8") from None


# The key payload (section 4) -----------------------------------------------------------------------------------------


def _payload_fields(payload: bytes) -> dict[str, Any]:
    """Check the payload of the key metadata and return what is in it."""
    fields = _CborReader(payload).whole()
    if not isinstance(fields, dict) or fields.get("format") != "vmsnap-key":
        raise FormatError("the payload is not a vmsnap key")
    if type(fields.get("version")) is not int:  # a bool is an int too
        raise FormatError("'version' is missing or malformed")
    if fields["version"] != 1:
        raise FormatError(f"not supported: version {fields['version']}")
    requires = fields.get("requires")
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise FormatError("'requires' is missing or malformed")
    if requires:
        raise FormatError(f"not supported: the snapshot requires {', '.join(map(repr, requires))}")
    for name, length in (("snapshot_id", 16), ("data_key", KEY_BYTES)):
        value = fields.get(name)
        if not isinstance(value, bytes) or len(value) != length:
            raise FormatError(f"{name!r} is missing or malformed")
    if not isinstance(fields.get("sealed"), bool):
        raise FormatError("'sealed' is missing or malformed")
    return fields


def _unwrap_key_file(data: bytes, key: bytes) -> dict[str, Any]:
    """Open the contents of ``enc_metadata`` and return the data key."""
    for prefix, wrapping in UNSUPPORTED_KEY_FILES.items():
        if data.startswith(prefix):
            raise FormatError(f"{KEY_METADATA_NAME}: not supported: the data key is wrapped with {wrapping}")
    if not data.startswith(KEY_FILE_PREFIX):
        raise FormatError(f"{KEY_METADATA_NAME}: not a key file of vmsnap, or damaged")
    only = range(KEY_SEGMENT_LENGTH, KEY_SEGMENT_LENGTH + 1)
    payload = b"".join(_FloeFile(io.BytesIO(data), key, KEY_AAD, KEY_METADATA_NAME, only).pieces())
    try:
        return _payload_fields(payload)
    except FormatError as error:
        raise FormatError(f"{KEY_METADATA_NAME}: {error}") from None


# The manifest (section 5) --------------------------------------------------------------------------------------------


def _read_manifest(root: str, payload: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the manifest says, checked; None where there is none and none is needed."""
    with _opened(root, (), stat.S_IFDIR, f"snapshot {root!r}") as descriptor:
        if MANIFEST_NAME not in os.listdir(descriptor):
            if payload is not None and payload["sealed"]:
                raise FormatError(f"snapshot {root!r}: not complete, it has no {MANIFEST_NAME}")
            return None
    with (
        _opened(root, (MANIFEST_NAME,), stat.S_IFREG, MANIFEST_NAME) as descriptor,
        open(descriptor, "rb", closefd=False) as stream,
    ):
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError(f"{MANIFEST_NAME}: longer than {MAX_MANIFEST_BYTES} bytes")
    if payload is not None:
        only = range(MANIFEST_SEGMENT_LENGTH, MANIFEST_SEGMENT_LENGTH + 1)
        file = _FloeFile(io.BytesIO(data), payload["data_key"], MANIFEST_AAD, MANIFEST_NAME, only)
        data = b"".join(file.pieces())
    try:
        fields = _manifest_fields(data, encrypted=payload is not None)
    except FormatError as error:
        raise FormatError(f"{MANIFEST_NAME}: {error}") from None
    if payload is not None and fields["snapshot_id"] != payload["snapshot_id"]:
        raise FormatError(f"{MANIFEST_NAME}: another snapshot's")
    return fields


def _manifest_fields(data: bytes, *, encrypted: bool) -> dict[str, Any]:
    fields = _CborReader(data).whole()
    if not isinstance(fields, dict) or fields.get("format") != "vmsnap-manifest":
        raise FormatError("not a manifest")
    if type(fields.get("version")) is not int or fields["version"] != 1:
        raise FormatError(f"not supported: version {fields.get('version')}")
    if fields.get("requires") != []:
        raise FormatError(f"not supported: the snapshot requires {fields.get('requires')!r}")
    if fields.get("encrypted") is not encrypted or not isinstance(fields.get("snapshot_id"), bytes):
        raise FormatError("of another kind of snapshot, or malformed")
    namespaces, fragments = fields.get("namespaces"), fields.get("fragments")
    if not isinstance(namespaces, list) or not isinstance(fragments, dict):
        raise FormatError("'namespaces' or 'fragments' is missing or malformed")
    for path in (*namespaces, *fragments):
        for name in path.split("/"):
            _check_name(name, f"path {path!r}")
        if "/" in path and path.rpartition("/")[0] not in namespaces:
            raise FormatError(f"the namespace of {path!r} is not listed")
    proof = "floe_header_tag" if encrypted else "blake3"
    for path, entry in fragments.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(proof), bytes) or len(entry[proof]) != 32:
            raise FormatError(f"the entry of {path!r} is malformed")
        if any(type(entry.get(name)) is not int or entry[name] < 0 for name in ("size", "stored_size")):
            raise FormatError(f"the sizes of {path!r} are malformed")
    return fields


# Names and files (section 1) -----------------------------------------------------------------------------------------


def _printable(path: str) -> str:
    """Escape what a terminal would obey. Unambiguous: a backslash is in no name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def _utf8(name: bytes, what: str) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{what}: the name {name!r} is not UTF-8") from None


def _is_reserved(name: str) -> bool:
    raw = name.encode()  # bytes, whose lower() changes the ASCII letters only
    return raw.startswith(RESERVED_PREFIX) or raw.lower() in RESERVED_NAMES


def _check_name(name: str, what: str) -> None:
    refused = name in ("", ".", "..") or any(character in name for character in "/\\\0")
    if refused or len(name.encode()) > MAX_NAME_BYTES or _is_reserved(name):
        raise FormatError(f"{what}: {name!r} is not allowed as a name")


def _open_at(parent: int, name: str, kind: int, what: str) -> int:
    """Open one directory entry without following it; `kind` is what it must be: S_IFREG or S_IFDIR."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_DIRECTORY if kind == stat.S_IFDIR else 0)
    not_of_kind = FormatError(f"{what}: {name!r} is not a {'directory' if kind == stat.S_IFDIR else 'regular file'}")
    # Looked at before it is opened, because opening a device can do things; and after, because it may have changed.
    if stat.S_IFMT(os.stat(name.encode(), dir_fd=parent, follow_symlinks=False).st_mode) != kind:
        raise not_of_kind
    descriptor = os.open(name.encode(), flags, dir_fd=parent)
    if stat.S_IFMT(os.fstat(descriptor).st_mode) != kind:
        os.close(descriptor)
        raise not_of_kind
    return descriptor


@contextmanager
def _opened(root: str, names: Sequence[str], kind: int, what: str) -> Iterator[int]:
    """Open what lies at `names` below the root, each component without following links; OS errors get `what`."""
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for depth, name in enumerate(names, start=1):
                child = _open_at(descriptor, name, kind if depth == len(names) else stat.S_IFDIR, what)
                os.close(descriptor)
                descriptor = child
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FormatError(f"{what}: {error.strerror}") from error


# Snapshots -----------------------------------------------------------------------------------------------------------


class _PlainFile:
    """A fragment of a plain snapshot: the bytes themselves."""

    chunk_size = None

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size: int = stream.seek(0, os.SEEK_END)

    def pieces(self) -> Iterator[bytes]:
        """Yield the contents in pieces."""
        self._stream.seek(0)
        while piece := self._stream.read(PLAIN_READ_BYTES):
            yield piece


class Snapshot:
    """A snapshot opened for reading; made by `open_snapshot`."""

    def __init__(self, root: str, payload: dict[str, Any] | None) -> None:
        self._root = root
        self._data_key: bytes | None = None if payload is None else payload["data_key"]
        self._manifest = _read_manifest(root, payload)

    @property
    def sealed(self) -> bool:
        """Whether a manifest lists the fragments."""
        return self._manifest is not None

    @property
    def encrypted(self) -> bool:
        """Whether the fragments are encrypted."""
        return self._data_key is not None

    def fragments(self) -> list[str]:
        """List the fragments.

        Returns
        -------
        list of str
            Their paths from the root, sorted by their UTF-8 bytes.

        Raises
        ------
        FormatError
            An entry is a link or special file, or its name is not allowed.
        """
        if self._manifest is not None:
            return sorted(self._manifest["fragments"])
        paths: list[str] = []
        namespaces: list[tuple[str, ...]] = [()]
        while namespaces:
            namespace = namespaces.pop()
            what = f"namespace {'/'.join(namespace)!r}" if namespace else "the root"
            with _opened(self._root, namespace, stat.S_IFDIR, what) as descriptor:
                for entry in os.listdir(descriptor):
                    name = _utf8(os.fsencode(entry), what)
                    if _is_reserved(name):
                        continue
                    _check_name(name, what)
                    path = (*namespace, name)
                    mode = os.stat(name.encode(), dir_fd=descriptor, follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        namespaces.append(path)
                    elif stat.S_ISREG(mode):
                        paths.append("/".join(path))
                    else:
                        raise FormatError(f"{'/'.join(path)!r}: neither a regular file nor a directory")
        return sorted(paths)  # by code point, which is the order of the UTF-8 bytes

    def read(self, path: str) -> bytes:
        """Return the whole plaintext of the fragment at a path; errors as in `stream`."""
        return b"".join(self.stream(path))

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield the plaintext of a fragment, each piece after its tag was checked.

        Parameters
        ----------
        path
            The fragment's path from the root.

        Yields
        ------
        bytes
            The next piece. What came before an error is authentic, but only a part.

        Raises
        ------
        FormatError
            There is no such fragment, or it is refused; `AuthenticationError` where a tag does not fit.
        """
        with self._fragment(path) as fragment:
            yield from fragment.pieces()

    def size(self, path: str) -> int:
        """Return the size of a fragment's plaintext in bytes; it is authentic, the content is not checked yet."""
        with self._fragment(path) as fragment:
            return fragment.size

    def chunk_size(self, path: str) -> int | None:
        """Return the plaintext bytes in a segment of an encrypted fragment; None for a plain one."""
        with self._fragment(path) as fragment:
            return fragment.chunk_size

    def _check_listed(self, path: str, stream: BinaryIO) -> None:
        """Hold a file against what the manifest says of it; the BLAKE3 of a plain one is for `b3sum` to check."""
        if self._manifest is None:
            return
        entry = self._manifest["fragments"].get(path)
        if entry is None:
            raise FormatError(f"fragment {path!r}: not in the manifest")
        if os.fstat(stream.fileno()).st_size != entry["stored_size"]:
            raise FormatError(f"fragment {path!r}: has another size than in the manifest")
        if self._data_key is not None:
            if stream.read(74)[42:] != entry["floe_header_tag"]:
                raise FormatError(f"fragment {path!r}: is not the one in the manifest")
            stream.seek(0)

    @contextmanager
    def _fragment(self, path: str) -> Iterator[_FloeFile | _PlainFile]:
        what = f"fragment {path!r}"
        _utf8(path.encode(errors="surrogatepass"), what)  # an argument of the command line can be anything
        names = path.split("/")
        for name in names:
            _check_name(name, what)
        with (
            _opened(self._root, names, stat.S_IFREG, what) as descriptor,
            open(descriptor, "rb", closefd=False) as stream,
        ):
            self._check_listed(path, stream)
            if self._data_key is None:
                yield _PlainFile(stream)
            else:
                aad = FRAGMENT_AAD + path.encode()
                yield _FloeFile(stream, self._data_key, aad, what, FRAGMENT_SEGMENT_LENGTHS)


def open_snapshot(path: str | os.PathLike[str], key: bytes | None = None, *, payload: bytes | None = None) -> Snapshot:
    """Open a snapshot directory.

    Parameters
    ----------
    path
        The root.
    key
        The 32-byte key under which the data key is wrapped. With a key, a plain snapshot is refused.
    payload
        Instead of a key: the unwrapped key metadata, as ``age -d -i identity.txt enc_metadata`` prints it.

    Returns
    -------
    Snapshot
        The snapshot; of an encrypted one the key metadata was opened.

    Raises
    ------
    FormatError
        Not a snapshot, or none that this reader opens with what it was given; `AuthenticationError` where the key does
        not fit.
    ValueError
        The key is not 32 bytes long.
    """
    if key is not None:
        _require_key_length(key)
    root = os.path.abspath(path)
    with _opened(root, (), stat.S_IFDIR, f"snapshot {root!r}") as descriptor:
        encrypted = KEY_METADATA_NAME in os.listdir(descriptor)
    if not encrypted:
        if key is not None or payload is not None:
            raise FormatError(f"snapshot {root!r}: a key was given, but there is no {KEY_METADATA_NAME}: not encrypted")
        return Snapshot(root, None)
    if payload is not None:
        return Snapshot(root, _payload_fields(payload))
    if key is None:
        raise FormatError(f"snapshot {root!r}: encrypted, and no key was given")
    with (
        _opened(root, (KEY_METADATA_NAME,), stat.S_IFREG, KEY_METADATA_NAME) as descriptor,
        open(descriptor, "rb", closefd=False) as stream,
    ):
        data = stream.read(MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise FormatError(f"{KEY_METADATA_NAME}: longer than {MAX_KEY_FILE_BYTES} bytes")
    return Snapshot(root, _unwrap_key_file(data, key))


# The program ---------------------------------------------------------------------------------------------------------


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


def _list(snapshot: Snapshot) -> bool:
    """Print sizes and paths; tell whether all fragments opened."""
    refused = 0
    for path in snapshot.fragments():
        try:
            print(f"{snapshot.size(path):>16}  {_printable(path)}")
        except FormatError as error:
            refused += 1
            print(f"refused: {error}", file=sys.stderr)
    return refused == 0


def _cat(snapshot: Snapshot, path: str) -> bool:
    """Write a fragment's plaintext to the standard output."""
    for piece in snapshot.stream(path):
        sys.stdout.buffer.write(piece)
    return True


def _check(snapshot: Snapshot) -> bool:
    """Open every segment of every fragment, never stopping at the first error; tell whether all are good."""
    total = opened = 0
    paths = snapshot.fragments()
    for path in paths:
        try:
            total += sum(map(len, snapshot.stream(path)))
            opened += 1
        except FormatError as error:
            print(f"refused: {error}", file=sys.stderr)
    how = "every segment is authentic" if snapshot.encrypted else "plain, nothing proves that they are unchanged"
    print(f"{opened} of {len(paths)} fragments read, {total} bytes: {how if opened == len(paths) else 'damaged'}")
    return opened == len(paths)


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
    parser = argparse.ArgumentParser(description="Read a vmsnap snapshot.")
    parser.add_argument("snapshot", metavar="SNAPSHOT_DIR", help="the snapshot's root")
    key_options = parser.add_mutually_exclusive_group()
    key_options.add_argument("--key-file", metavar="FILE", help="the key: 32 bytes, or 64 hex digits")
    key_options.add_argument("--key-hex-env", metavar="VAR", help="an environment variable with the key, 64 hex digits")
    key_options.add_argument("--payload-file", metavar="FILE", help="what age -d made of enc_metadata; - for the input")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print size and path of every fragment")
    commands.add_parser("cat", help="write a fragment to the standard output").add_argument("path", metavar="PATH")
    commands.add_parser("check", help="open every segment of every fragment")
    arguments = parser.parse_args(argv)
    try:
        key, payload = _key(arguments), _payload(arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        snapshot = open_snapshot(arguments.snapshot, key, payload=payload)
        if arguments.command == "list":
            good = _list(snapshot)
        elif arguments.command == "cat":
            good = _cat(snapshot, arguments.path)
        else:
            good = _check(snapshot)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away; without this, Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FormatError, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
