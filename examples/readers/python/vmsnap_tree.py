"""The tree: names, and a snapshot's directory. Section 1 of ``docs/format.md``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from vmsnap_floe import FormatError

KEY_METADATA_NAME = "enc_metadata"
MANIFEST_NAME = "vmsnap_manifest"
RESERVED_NAMES = (b"enc_metadata", b"vmsnap_manifest")
RESERVED_PREFIX = b".vmsnap"
MAX_NAME_BYTES = 255


def _corrupt(text: str) -> FormatError:
    return FormatError("corrupt", text)


# Names ---------------------------------------------------------------------------------------------------------------


def utf8(name: bytes, what: str) -> str:
    """Return a name as text. Refuse a name that is not UTF-8."""
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


# Files ---------------------------------------------------------------------------------------------------------------


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


class Directory:
    """A snapshot that is a directory."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.what = f"snapshot {root!r}"

    def has(self, name: str) -> bool:
        """Tell whether the root has an entry of this name."""
        with _opened(self._root, (), stat.S_IFDIR, self.what) as descriptor:
            return name in os.listdir(descriptor)

    def sealed_by(self, manifest: Mapping[str, object]) -> None:
        """Take a manifest. A directory does not depend on it."""

    @contextmanager
    def file(self, names: Sequence[str], what: str) -> Iterator[BinaryIO]:
        """Open the file at a path."""
        with (
            _opened(self._root, names, stat.S_IFREG, what) as descriptor,
            open(descriptor, "rb", closefd=False) as stream,
        ):
            yield stream

    def fragments(self) -> list[str]:
        """Return the paths of all fragments, sorted by their UTF-8 bytes."""
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
