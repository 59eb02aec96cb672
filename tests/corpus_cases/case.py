"""A case of the corpus, and helpers to create several kinds of cases."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import floe
from make_golden import KEY

OTHER_KEY = KEY[::-1]

#: Kinds of errors, as in examples/readers/README.md.
AUTHENTICATION, CORRUPT, UNSUPPORTED = "authentication", "corrupt", "unsupported"
NO_KEY, NOT_ENCRYPTED, MISSING = "key", "not-encrypted", "missing"

Result = dict[str, Any]


def holds(data: bytes) -> Result:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def refused(kind: str) -> Result:
    return {"error": kind}


@dataclass
class Case:
    """A snapshot and its key, with the results of reading: `fragments` has one each, `error` is that of opening."""

    about: str
    key: bytes | None = None
    wrapping: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    fragments: dict[str, Result] = field(default_factory=dict)
    memory: dict[str, Result] = field(default_factory=dict)
    verifies: bool = True

    def as_index(self) -> Result:
        index: Result = {"about": self.about}
        if self.key is not None:
            index["key"] = self.key.hex()
        index |= self.wrapping
        index["result"] = refused(self.error) if self.error else {"fragments": dict(sorted(self.fragments.items()))}
        if self.memory:
            index["memory"] = dict(sorted(self.memory.items()))
        index["verifies"] = self.verifies and not self.error
        return index


class Corpus:
    """The cases created so far, in a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: dict[str, Case] = {}

    def add(self, name: str, case: Case) -> Path:
        """Return the path for the snapshot of a new case."""
        assert name not in self.cases, name
        self.cases[name] = case
        return self.folder / name

    def damaged(self, name: str, base: str, change: Callable[[Path], object], case: Case) -> None:
        """A copy of another case's snapshot, changed."""
        root = self.add(name, case)
        shutil.copytree(self.folder / base, root, symlinks=True)
        change(root)


# Sealed by hand ------------------------------------------------------------------------------------------------------


def seal_fragment(root: Path, path: str, data: bytes, chunk: int = 32, **options: Any) -> bytes:
    """Write a fragment of a snapshot whose data key is floe.DATA_KEY; returns the file."""
    sealed = floe.seal(floe.DATA_KEY, floe.fragment_aad(path), data, chunk, **options)
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(sealed)
    return sealed


def write_payload(root: Path, payload: object) -> None:
    root.mkdir(exist_ok=True)
    (root / "enc_metadata").write_bytes(floe.key_metadata(KEY, payload))


NOTE = b"forty bytes that are in chunks of 32 ..."
assert len(NOTE) == 40


# Changes -------------------------------------------------------------------------------------------------------------


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Return the function that changes a file of a snapshot."""
    return lambda root: edit(root / name, change)


def instead_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return the function that replaces a file or directory, which it moves to `elsewhere`."""

    def change(root: Path) -> None:
        (root / name).rename(root / "elsewhere")
        make(root / name)

    return change


def linked(name: str) -> Callable[[Path], object]:
    return instead_of(name, lambda path: path.symlink_to("elsewhere"))


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def slug(text: str) -> str:
    return text.replace(" ", "-").replace("_", "-").lower()
