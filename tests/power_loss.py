"""A model of a disk after a power failure: it loses the changes that POSIX allows it to lose, and nothing else.

A sync of a file keeps all earlier writes to it, and a sync of a directory keeps the names in it. Any other operation
may have reached the disk or not, independently of earlier ones. A write may have changed only the length of the file,
or only half of the bytes.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Options of strace: the system calls to record, with paths, and every byte in hexadecimal.
STRACE = [
    "-y",
    "-xx",
    "-s",
    "1000000",
    "-e",
    "trace=openat,mkdir,mkdirat,pwrite64,write,ftruncate,fallocate,fchmod,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir",
]


@dataclass(frozen=True)
class Make:
    folder: int
    name: bytes
    inode: int
    is_folder: bool
    mode: int


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Mode:
    inode: int
    mode: int


@dataclass(frozen=True)
class Rename:
    folder: int
    old: bytes
    new: bytes


@dataclass(frozen=True)
class Remove:
    folder: int
    name: bytes


@dataclass(frozen=True)
class Sync:
    inode: int


Operation = Make | Write | Mode | Rename | Remove | Sync

# Relative paths, with contents and mode; None for a directory.
Tree = dict[bytes, tuple[bytes, int] | None]

ROOT = 0


class Disk:
    """The contents of the disk after some operations."""

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        self.names: dict[int, dict[bytes, int]] = {ROOT: {}}
        self.contents: dict[int, bytearray] = {}
        self.modes: dict[int, int] = {}
        for operation in operations:
            self.apply(operation)

    def apply(self, operation: Operation) -> None:
        match operation:
            case Make(folder, name, inode, is_folder, mode):
                self.names.setdefault(folder, {})[name] = inode
                self.modes.setdefault(inode, mode)
                if is_folder:
                    self.names.setdefault(inode, {})
                else:
                    self.contents.setdefault(inode, bytearray())
            case Write(inode, offset, data):
                held = self.contents.setdefault(inode, bytearray())
                held.extend(bytes(max(0, offset + len(data) - len(held))))
                held[offset : offset + len(data)] = data
            case Mode(inode, mode):
                self.modes[inode] = mode
            case Rename(folder, old, new):
                names = self.names.setdefault(folder, {})
                if old in names:  # else the operation that created it was lost
                    names[new] = names.pop(old)
            case Remove(folder, name):
                self.names.setdefault(folder, {}).pop(name, None)

    def inode_at(self, path: bytes) -> int:
        inode = ROOT
        for name in path.split(b"/"):
            if name not in (b"", b"."):
                inode = self.names[inode][name]
        return inode

    def tree(self, inode: int = ROOT, prefix: bytes = b"") -> Tree:
        found: Tree = {}
        for name, inner in self.names[inode].items():
            path = prefix + name
            if inner in self.names:
                found[path] = None
                found |= self.tree(inner, path + b"/")
            else:
                found[path] = bytes(self.contents[inner]), self.modes[inner]
        return found


def _unhex(text: str) -> bytes:
    return re.sub(rb"\\x(..)", lambda match: bytes.fromhex(match[1].decode()), text.encode())


def recorded_operations(log: str, folder: Path) -> list[Operation]:
    """Read the strace record of a process without threads, limited to operations below a directory."""
    top = bytes(folder)
    disk = Disk()
    operations: list[Operation] = []
    numbers = itertools.count(ROOT + 1)

    def below(path: bytes) -> bytes | None:
        return path[len(top) :].lstrip(b"/") if path == top or path.startswith(top + b"/") else None

    for line in log.splitlines():
        called = re.fullmatch(r"(?:\d+ +)?(\w+)\((.*)\) += (\d+)(?:<.*>)?", line)
        if called is None:  # it failed
            continue
        name, text, _ = called.groups()
        paths = [_unhex(path) for path in re.findall(r"<([^>]*)>", text)]
        texts = [_unhex(quoted) for quoted in re.findall(r'"([^"]*)"', text)]
        if name == "openat" and "O_CREAT" not in text:
            continue
        full = paths[0] if paths else b""
        if name in ("openat", "mkdirat", "unlinkat", "renameat2"):
            full = texts[0] if texts[0].startswith(b"/") else full + b"/" + texts[0]
        path = below(full)
        if path is None:
            continue
        parent, _, own = path.rpartition(b"/")
        operation: Operation
        match name:
            case "openat" | "mkdirat":
                mode = int(text.rsplit(", ", 1)[1], 8)
                operation = Make(disk.inode_at(parent), own, next(numbers), name == "mkdirat", mode)
            case "pwrite64":
                operation = Write(disk.inode_at(path), int(text.rsplit(", ", 1)[1]), texts[0])
            case "fchmod":
                operation = Mode(disk.inode_at(path), int(text.rsplit(", ", 1)[1], 8))
            case "renameat2":
                assert paths[0] == paths[1], line
                operation = Rename(disk.inode_at(parent), own, texts[1])
            case "unlinkat":
                operation = Remove(disk.inode_at(parent), own)
            case "fsync":
                operation = Sync(disk.inode_at(path))
            case _:
                raise AssertionError(f"the model does not know {line[:200]}")
        disk.apply(operation)
        operations.append(operation)
    return operations


def _kept_by(operation: Operation) -> int:
    """Return the inode whose sync keeps it."""
    return operation.inode if isinstance(operation, Write | Mode | Sync) else operation.folder


def _variants(operation: Operation) -> list[Operation | None]:
    if isinstance(operation, Write) and operation.data:
        half = Write(operation.inode, operation.offset, operation.data[: len(operation.data) // 2])
        return [None, Write(operation.inode, operation.offset, bytes(len(operation.data))), half, operation]
    return [None, operation]


def after_power_loss(done: Sequence[Operation], most: int) -> Iterator[Tree]:
    """List the possible contents of the disk if the power fails after these operations.

    These are all combinations, if there are at most `most`. Otherwise all or none of the operations that were not
    synced have reached the disk, except for one.
    """
    synced: set[int] = set()
    loose = []
    for number in reversed(range(len(done))):
        operation = done[number]
        if isinstance(operation, Sync):
            synced.add(operation.inode)
        elif _kept_by(operation) not in synced:
            loose.append(number)
    choices = [_variants(done[number]) for number in loose]
    combinations: Iterable[Sequence[Operation | None]]
    count = 1
    for variants in choices:
        count *= len(variants)
    if count <= most:
        combinations = itertools.product(*choices)
    else:
        uniform = [[variants[end] for variants in choices] for end in (0, -1)]
        combinations = uniform + [
            [*base[:place], variant, *base[place + 1 :]]
            for base in uniform
            for place, variants in enumerate(choices)
            for variant in variants
        ]
    for combination in combinations:
        chosen: list[Operation | None] = list(done)
        for number, operation in zip(loose, combination, strict=True):
            chosen[number] = operation
        yield Disk(operation for operation in chosen if operation is not None).tree()


def put(tree: Tree, folder: Path) -> None:
    """Create the files and directories of `tree` below an existing directory."""
    for path, held in tree.items():
        place = folder / path.decode()
        if held is None:
            place.mkdir(mode=0o700)
        else:
            place.write_bytes(held[0])
            place.chmod(held[1])
