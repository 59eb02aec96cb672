"""A snapshot: its names, its key, its manifest, its fragments. Sections 1 and 3 to 5 of ``docs/format.md``."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO

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

FRAGMENT_AAD = b"vmsnap/1/fragment\x00"
FRAGMENT_CHUNK_SIZES = range(32, (64 << 20) + 1)

KEY_METADATA_NAME = "enc_metadata"
KEY_AAD = b"vmsnap/1/key"
KEY_CHUNK_SIZE = 1024
KEY_FILE_PREFIX = PARAMETERS.pack(0, 0, KEY_CHUNK_SIZE + SEGMENT_OVERHEAD_BYTES, FLOE_IV_BYTES)
OTHER_KEY_FILES = {b"age-encryption.org/": "age", b"\xd9\xd9\xf7": "a key service"}
MAX_KEY_FILE_BYTES = 1 << 20

MANIFEST_NAME = "vmsnap_manifest"
MANIFEST_AAD = b"vmsnap/1/manifest"
MANIFEST_CHUNK_SIZE = 1 << 16
MAX_MANIFEST_BYTES = 1 << 28

RESERVED_NAMES = (b"enc_metadata", b"vmsnap_manifest")
RESERVED_PREFIX = b".vmsnap"
MAX_NAME_BYTES = 255

PLAIN_READ_BYTES = 1 << 20


def _corrupt(text: str) -> FormatError:
    return FormatError("corrupt", text)


# Names and files (section 1) -----------------------------------------------------------------------------------------


def utf8(name: bytes, what: str) -> str:
    """Return a name as text; one that is not UTF-8 is none."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _corrupt(f"{what}: the name {name!r} is not UTF-8") from None


def is_reserved(name: str) -> bool:
    """Tell whether vmsnap keeps a name for itself."""
    raw = name.encode()  # bytes, whose lower() changes the ASCII letters only
    return raw.startswith(RESERVED_PREFIX) or raw.lower() in RESERVED_NAMES


def check_name(name: str, what: str) -> None:
    """Refuse a name that no fragment and no namespace can have."""
    refused = name in ("", ".", "..") or any(character in name for character in "/\\\0")
    if refused or len(name.encode()) > MAX_NAME_BYTES or is_reserved(name):
        raise _corrupt(f"{what}: {name!r} is not allowed as a name")


def _open_at(parent: int, name: str, kind: int, what: str) -> int:
    """Open one directory entry without following it; `kind` is what it must be: S_IFREG or S_IFDIR."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_DIRECTORY if kind == stat.S_IFDIR else 0)
    not_of_kind = _corrupt(f"{what}: {name!r} is not a {'directory' if kind == stat.S_IFDIR else 'regular file'}")
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
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise FormatError("missing" if missing else "io", f"{what}: {error.strerror}") from error


@contextmanager
def _opened_file(root: str, names: Sequence[str], what: str) -> Iterator[BinaryIO]:
    with (
        _opened(root, names, stat.S_IFREG, what) as descriptor,
        open(descriptor, "rb", closefd=False) as stream,
    ):
        yield stream


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


def _read_manifest(root: str, payload: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the manifest says, checked; None where there is none and none is needed."""
    with _opened(root, (), stat.S_IFDIR, f"snapshot {root!r}") as descriptor:
        if MANIFEST_NAME not in os.listdir(descriptor):
            if payload is not None and payload["sealed"]:
                raise _corrupt(f"snapshot {root!r}: not complete, it has no {MANIFEST_NAME}")
            return None
    with _opened_file(root, (MANIFEST_NAME,), MANIFEST_NAME) as stream:
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

    def __init__(self, root: str, payload: Mapping[str, Any] | None) -> None:
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
                    name = utf8(os.fsencode(entry), what)
                    if is_reserved(name):
                        continue
                    check_name(name, what)
                    path = (*namespace, name)
                    mode = os.stat(name.encode(), dir_fd=descriptor, follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        namespaces.append(path)
                    elif stat.S_ISREG(mode):
                        paths.append("/".join(path))
                    else:
                        raise _corrupt(f"{'/'.join(path)!r}: neither a regular file nor a directory")
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

    @contextmanager
    def _fragment(self, path: str) -> Iterator[FloeFile | _PlainFile]:
        what = f"fragment {path!r}"
        utf8(path.encode(errors="surrogatepass"), what)  # an argument of the command line can be anything
        names = path.split("/")
        for name in names:
            check_name(name, what)
        listed = None if self._manifest is None else self._manifest["fragments"].get(path)
        if self._manifest is not None and listed is None:
            raise FormatError("missing", f"{what}: not in the manifest")
        try:
            with _opened_file(self._root, names, what) as stream:
                if listed is not None:
                    self._check_listed(stream, listed, what)
                yield self._open(stream, path, what)
        except FormatError as error:
            if listed is not None and error.kind == "missing":
                raise _corrupt(f"{error}, and the manifest lists it") from None
            raise

    def _check_listed(self, stream: BinaryIO, listed: Mapping[str, Any], what: str) -> None:
        """Hold a file against the manifest, first of all: what grew is not what was sealed, whatever else is wrong."""
        if os.fstat(stream.fileno()).st_size != listed["stored_size"]:
            raise _corrupt(f"{what}: has another size than in the manifest")
        if self.encrypted and stream.read(HEADER_BYTES)[-HEADER_TAG_BYTES:] != listed["floe_header_tag"]:
            raise _corrupt(f"{what}: is not the one in the manifest")

    def _open(self, stream: BinaryIO, path: str, what: str) -> FloeFile | _PlainFile:
        if self._data_key is None:
            return _PlainFile(stream)
        chunks = FRAGMENT_CHUNK_SIZES
        segment_lengths = range(chunks.start + SEGMENT_OVERHEAD_BYTES, chunks.stop + SEGMENT_OVERHEAD_BYTES)
        return FloeFile(stream, self._data_key, FRAGMENT_AAD + path.encode(), what, segment_lengths)


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
        require_key_length(key)
    root = os.path.abspath(path)
    with _opened(root, (), stat.S_IFDIR, f"snapshot {root!r}") as descriptor:
        encrypted = KEY_METADATA_NAME in os.listdir(descriptor)
    if not encrypted:
        if key is not None or payload is not None:
            text = f"snapshot {root!r}: a key was given, but there is no {KEY_METADATA_NAME}: not encrypted"
            raise FormatError("not-encrypted", text)
        return Snapshot(root, None)
    if payload is not None:
        return Snapshot(root, payload_fields(payload))
    if key is None:
        raise FormatError("key", f"snapshot {root!r}: encrypted, and no key was given")
    with _opened_file(root, (KEY_METADATA_NAME,), KEY_METADATA_NAME) as stream:
        data = stream.read(MAX_KEY_FILE_BYTES + 1)
    if len(data) > MAX_KEY_FILE_BYTES:
        raise _corrupt(f"{KEY_METADATA_NAME}: longer than {MAX_KEY_FILE_BYTES} bytes")
    return Snapshot(root, unwrap_key_file(data, key))
