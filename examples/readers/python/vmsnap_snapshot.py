"""A snapshot: its key, its manifest, its fragments. Sections 3 to 5 of ``docs/format.md``."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO

import vmsnap_cbor
from vmsnap_floe import (
    FLOE_IV_BYTES,
    HEADER_BYTES,
    HEADER_TAG_BYTES,
    KEY_BYTES,
    PARAMETERS,
    SEGMENT_OVERHEAD_BYTES,
    AuthenticationError,
    FloeFile,
    FormatError,
    require_key_length,
)
from vmsnap_tree import KEY_METADATA_NAME, MANIFEST_NAME, Directory, check_name, utf8

if TYPE_CHECKING:
    from vmsnap_archive import Archive

FRAGMENT_AAD = b"vmsnap/1/fragment\x00"
FRAGMENT_CHUNK_SIZES = range(32, (64 << 20) + 1)

KEY_AAD = b"vmsnap/1/key"
KEY_CHUNK_SIZE = 1024
KEY_FILE_PREFIX = PARAMETERS.pack(0, 0, KEY_CHUNK_SIZE + SEGMENT_OVERHEAD_BYTES, FLOE_IV_BYTES)
OTHER_KEY_FILES = {b"age-encryption.org/": "age", b"\xd9\xd9\xf7": "a key service"}
MAX_KEY_FILE_BYTES = 1 << 20

MANIFEST_AAD = b"vmsnap/1/manifest"
MANIFEST_CHUNK_SIZE = 1 << 16
MAX_MANIFEST_BYTES = 1 << 28

PLAIN_READ_BYTES = 1 << 20


def _corrupt(text: str) -> FormatError:
    return FormatError("corrupt", text)


# The head of the key metadata and of the manifest (section 4) --------------------------------------------------------


def _fields(data: bytes, file_format: str, what: str) -> dict[str, Any]:
    """Decode a map of ours, of this version; the other keys are for the caller to check."""
    try:
        fields = vmsnap_cbor.decode(data)
        if not isinstance(fields, dict) or fields.get("format") != file_format:
            raise _corrupt(f"is no {file_format}")
        version, requires = fields.get("version"), fields.get("requires")
        if not _is_unsigned(version):
            raise _corrupt("'version' is missing or malformed")
        if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
            raise _corrupt("'requires' is missing or malformed")
    except FormatError as error:
        raise _corrupt(f"{what}: {error}") from None
    if version != 1:
        raise FormatError("unsupported", f"{what}: version {version} is not supported")
    if requires:
        raise FormatError("unsupported", f"{what}: requires {', '.join(map(repr, requires))}, which is not supported")
    return fields


def _is_unsigned(value: object) -> bool:
    return type(value) is int and value >= 0  # a bool is an int too


def _is_bytes(value: object, length: int) -> bool:
    return isinstance(value, bytes) and len(value) == length


# The key payload (section 4) -----------------------------------------------------------------------------------------


def payload_fields(payload: bytes) -> dict[str, Any]:
    """Check the payload of the key metadata and return what is in it."""
    fields = _fields(payload, "vmsnap-key", KEY_METADATA_NAME)
    for name, length in (("snapshot_id", 16), ("data_key", KEY_BYTES)):
        if not _is_bytes(fields.get(name), length):
            raise _corrupt(f"{KEY_METADATA_NAME}: {name!r} is missing or malformed")
    if not isinstance(fields.get("sealed"), bool):
        raise _corrupt(f"{KEY_METADATA_NAME}: 'sealed' is missing or malformed")
    return fields


def _open_whole(data: bytes, key: bytes, aad: bytes, what: str, chunk_size: int) -> bytes:
    """Open a FLOE file of ours that is no fragment: of the right first bytes, whatever is wrong was changed."""
    only = range(chunk_size + SEGMENT_OVERHEAD_BYTES, chunk_size + SEGMENT_OVERHEAD_BYTES + 1)
    try:
        return b"".join(FloeFile(io.BytesIO(data), key, aad, what, only).pieces())
    except FormatError as error:
        raise AuthenticationError(str(error)) from None


def unwrap_key_file(data: bytes, key: bytes) -> dict[str, Any]:
    """Open the contents of ``enc_metadata`` and return the fields of the payload."""
    for prefix, wrapping in OTHER_KEY_FILES.items():
        if data.startswith(prefix):
            text = f"{KEY_METADATA_NAME}: the key is wrapped with {wrapping}, which is not supported: unwrap it first"
            raise FormatError("unsupported", text)
    if not data.startswith(KEY_FILE_PREFIX):
        raise _corrupt(f"{KEY_METADATA_NAME}: not a key file of vmsnap, or damaged")
    return payload_fields(_open_whole(data, key, KEY_AAD, KEY_METADATA_NAME, KEY_CHUNK_SIZE))


# The manifest (section 5) --------------------------------------------------------------------------------------------


def _read_manifest(store: Directory | Archive, payload: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the manifest says, checked; None where there is none and none is needed."""
    if not store.has(MANIFEST_NAME):
        if payload is not None and payload["sealed"]:
            raise _corrupt(f"{store.what}: not complete, it has no {MANIFEST_NAME}")
        return None
    with store.file((MANIFEST_NAME,), MANIFEST_NAME) as stream:
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise _corrupt(f"{MANIFEST_NAME}: longer than {MAX_MANIFEST_BYTES} bytes")
    if payload is not None:
        data = _open_whole(data, payload["data_key"], MANIFEST_AAD, MANIFEST_NAME, MANIFEST_CHUNK_SIZE)
    fields = _fields(data, "vmsnap-manifest", MANIFEST_NAME)
    try:
        _check_manifest(fields, encrypted=payload is not None)
    except FormatError as error:
        raise _corrupt(f"{MANIFEST_NAME}: {error}") from None
    if payload is not None and fields["snapshot_id"] != payload["snapshot_id"]:
        raise _corrupt(f"{MANIFEST_NAME}: another snapshot's")
    store.sealed_by(fields)
    return fields


def _check_manifest(fields: Mapping[str, Any], *, encrypted: bool) -> None:
    if fields.get("encrypted") is not encrypted or not _is_bytes(fields.get("snapshot_id"), 16):
        raise _corrupt("of another kind of snapshot, or malformed")
    if not _is_moment(fields.get("created")) or not isinstance(fields.get("generator"), str):
        raise _corrupt("'created' or 'generator' is missing or malformed")
    namespaces, fragments = fields.get("namespaces"), fields.get("fragments")
    if not isinstance(namespaces, list) or not all(isinstance(path, str) for path in namespaces):
        raise _corrupt("'namespaces' is missing or malformed")
    if not isinstance(fragments, dict) or not all(isinstance(entry, dict) for entry in fragments.values()):
        raise _corrupt("'fragments' is missing or malformed")
    known = set(namespaces)
    if len(known) != len(namespaces) or known & fragments.keys():
        raise _corrupt("a path is listed twice")
    for path in (*namespaces, *fragments):
        for name in path.split("/"):
            check_name(name, f"path {path!r}")
        if "/" in path and path.rpartition("/")[0] not in known:
            raise _corrupt(f"the namespace of {path!r} is not listed")
    for path, entry in fragments.items():
        if not (_fits_encrypted(entry) if encrypted else _fits_plain(entry)):
            raise _corrupt(f"the entry of {path!r} is malformed")


def _is_moment(value: object) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value, re.ASCII):
        return False
    try:
        datetime.strptime(value[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return False
    return True


def _fits_plain(entry: Mapping[str, Any]) -> bool:
    size = entry.get("size")
    return (
        _is_bytes(entry.get("blake3"), 32)
        and not {"chunk_size", "floe_header_tag"} & entry.keys()
        and _is_unsigned(size)
        and _is_unsigned(entry.get("stored_size"))
        and entry["stored_size"] == size
    )


def _fits_encrypted(entry: Mapping[str, Any]) -> bool:
    size, chunk_size, stored_size = entry.get("size"), entry.get("chunk_size"), entry.get("stored_size")
    if not (
        _is_bytes(entry.get("floe_header_tag"), 32)
        and "blake3" not in entry
        and all(map(_is_unsigned, (size, chunk_size, stored_size)))
        and chunk_size in FRAGMENT_CHUNK_SIZES
    ):
        return False
    segments = (stored_size - HEADER_BYTES - size) // SEGMENT_OVERHEAD_BYTES
    # An empty last segment after full ones is allowed.
    allowed = {max(1, -(-size // chunk_size)), size // chunk_size + 1}
    return stored_size == HEADER_BYTES + size + SEGMENT_OVERHEAD_BYTES * segments and segments in allowed


# Fragments (section 3) -----------------------------------------------------------------------------------------------


class _PlainFile:
    """A fragment of a plain snapshot: the bytes themselves."""

    chunk_size = None

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size: int = stream.seek(0, os.SEEK_END)

    def pieces(self) -> Iterator[bytes]:
        self._stream.seek(0)
        while piece := self._stream.read(PLAIN_READ_BYTES):
            yield piece


class Snapshot:
    """A snapshot opened for reading; made by `open_snapshot`."""

    def __init__(self, store: Directory | Archive, payload: Mapping[str, Any] | None) -> None:
        self._store = store
        self._data_key: bytes | None = None if payload is None else payload["data_key"]
        self.manifest = _read_manifest(store, payload)

    @property
    def sealed(self) -> bool:
        """Whether a manifest lists the fragments."""
        return self.manifest is not None

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
        if self.manifest is not None:
            return sorted(self.manifest["fragments"])
        return self._store.fragments()

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

    def metadata(self, name: str) -> bytes | None:
        """Return the stored bytes of ``enc_metadata`` or ``vmsnap_manifest``; None if there is no such file."""
        if not self._store.has(name):
            return None
        with self._store.file((name,), name) as stream:
            return stream.read(MAX_MANIFEST_BYTES)

    @contextmanager
    def stored(self, path: str) -> Iterator[BinaryIO]:
        """Open the stored bytes of a fragment, after its size and header tag were compared with the manifest."""
        what = f"fragment {path!r}"
        utf8(path.encode(errors="surrogatepass"), what)  # an argument of the command line can be anything
        names = path.split("/")
        for name in names:
            check_name(name, what)
        listed = None if self.manifest is None else self.manifest["fragments"].get(path)
        if self.manifest is not None and listed is None:
            raise FormatError("missing", f"{what}: not in the manifest")
        try:
            with self._store.file(names, what) as stream:
                if listed is not None:
                    self._check_listed(stream, listed, what)
                yield stream
        except FormatError as error:
            if listed is not None and error.kind == "missing":
                raise _corrupt(f"{error}, and the manifest lists it") from None
            raise

    @contextmanager
    def _fragment(self, path: str) -> Iterator[FloeFile | _PlainFile]:
        with self.stored(path) as stream:
            yield self._open(stream, path, f"fragment {path!r}")

    def _check_listed(self, stream: BinaryIO, listed: Mapping[str, Any], what: str) -> None:
        """Hold a file against the manifest, first of all: what grew is not what was sealed, whatever else is wrong."""
        if stream.seek(0, os.SEEK_END) != listed["stored_size"]:
            raise _corrupt(f"{what}: has another size than in the manifest")
        stream.seek(0)
        if self.encrypted and stream.read(HEADER_BYTES)[-HEADER_TAG_BYTES:] != listed["floe_header_tag"]:
            raise _corrupt(f"{what}: is not the one in the manifest")

    def _open(self, stream: BinaryIO, path: str, what: str) -> FloeFile | _PlainFile:
        if self._data_key is None:
            return _PlainFile(stream)
        chunks = FRAGMENT_CHUNK_SIZES
        segment_lengths = range(chunks.start + SEGMENT_OVERHEAD_BYTES, chunks.stop + SEGMENT_OVERHEAD_BYTES)
        return FloeFile(stream, self._data_key, FRAGMENT_AAD + path.encode(), what, segment_lengths)


def open_snapshot(path: str | os.PathLike[str], key: bytes | None = None, *, payload: bytes | None = None) -> Snapshot:
    """Open a snapshot.

    Parameters
    ----------
    path
        The root, or an archive.
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
        require_key_length(key)
    store = _store(os.path.abspath(path))
    if not store.has(KEY_METADATA_NAME):
        if key is not None or payload is not None:
            text = f"{store.what}: a key was given, but there is no {KEY_METADATA_NAME}: not encrypted"
            raise FormatError("not-encrypted", text)
        return Snapshot(store, None)
    if payload is not None:
        return Snapshot(store, payload_fields(payload))
    if key is None:
        raise FormatError("key", f"{store.what}: encrypted, and no key was given")
    with store.file((KEY_METADATA_NAME,), KEY_METADATA_NAME) as stream:
        data = stream.read(MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise _corrupt(f"{KEY_METADATA_NAME}: longer than {MAX_KEY_FILE_BYTES} bytes")
    return Snapshot(store, unwrap_key_file(data, key))


def _store(root: str) -> Directory | Archive:
    if not os.path.isfile(root):
        return Directory(root)
    import vmsnap_archive  # here, for whoever copied what reads directories alone

    return vmsnap_archive.Archive(root)
