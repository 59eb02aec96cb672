"""A model of a disk after a power failure: it loses the changes that POSIX allows it to lose, and nothing else.

A sync of a file keeps all earlier writes to it, and a sync of a directory keeps the names in it. Any other operation
may have reached the disk or not, independently of earlier ones. A write may have changed only the length of the file,
or only half of the bytes.
"""

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Options of strace: the system calls to record, with paths, and every byte in hexadecimal.
STRACE = [
    "-y",
    "-xx",
    "-s",
    "4000000",
    "-e",
    "trace=openat,mkdir,mkdirat,pwrite64,write,ftruncate,fallocate,copy_file_range,fchmod,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir",
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
class Resize:
    inode: int
    size: int


@dataclass(frozen=True)
class Insert:
    """Room in front of all bytes."""

    inode: int
    size: int


@dataclass(frozen=True)
class Mode:
    inode: int
    mode: int


@dataclass(frozen=True)
class Rename:
    """It is atomic, as in every file system with a journal: the file has one of both names."""

    folder: int
    old: bytes
    target: int
    new: bytes
    inode: int


@dataclass(frozen=True)
class Remove:
    folder: int
    name: bytes


@dataclass(frozen=True)
class Sync:
    inode: int


Operation = Make | Write | Resize | Insert | Mode | Rename | Remove | Sync

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
            case Resize(inode, size):
                held = self.contents.setdefault(inode, bytearray())
                held.extend(bytes(max(0, size - len(held))))
                del held[size:]
            case Insert(inode, size):
                self.contents.setdefault(inode, bytearray())[:0] = bytes(size)
            case Rename(folder, old, target, new, _):
                names = self.names.setdefault(folder, {})
                if old in names:  # else the operation that created it was lost
                    self.names.setdefault(target, {})[new] = names.pop(old)
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


def existing(folder: Path) -> list[Operation]:
    """Return the operations that made the files in a directory, all of them synced."""
    operations: list[Operation] = []
    for number, path in enumerate(sorted(folder.iterdir()), ROOT + 1):
        operations += [Make(ROOT, bytes(path.name, "utf-8"), number, is_folder=False, mode=0o600)]
        operations += [Write(number, 0, path.read_bytes()), Sync(number)]
    return [*operations, Sync(ROOT)]


def recorded_operations(log: str, folder: Path, before: Sequence[Operation] = ()) -> list[Operation]:
    """Read the strace record of a process without threads, limited to operations below a directory."""
    top = bytes(folder)
    disk = Disk(before)
    operations = list(before)
    numbers = itertools.count(ROOT + 1 + len(before))

    def below(path: bytes) -> bytes | None:
        return path[len(top) :].lstrip(b"/") if path == top or path.startswith(top + b"/") else None

    for line in log.splitlines():
        called = re.fullmatch(r"(?:\d+ +)?(\w+)\((.*)\) += (\d+)(?:<.*>)?", line)
        if called is None:  # it failed
            continue
        name, text, result = called.groups()
        paths = [_unhex(path) for path in re.findall(r"<([^>]*)>", text)]
        texts = [_unhex(quoted) for quoted in re.findall(r'"([^"]*)"', text)]
        if name == "openat" and "O_CREAT" not in text:
            continue
        full = paths[0] if paths else b""
        if name in ("openat", "mkdirat", "unlinkat", "rmdir", "renameat", "renameat2"):
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
            case "ftruncate":
                operation = Resize(disk.inode_at(path), int(text.rsplit(", ", 1)[1]))
            case "fallocate":
                assert "FALLOC_FL_INSERT_RANGE, 0, " in text, line[:200]
                operation = Insert(disk.inode_at(path), int(text.rsplit(", ", 1)[1]))
            case "copy_file_range":
                # Newer versions of strace show the offsets after the call, too.
                start, offset = map(int, re.findall(r"(?<!=> )\[(\d+)\]", text))
                target = below(paths[1])
                assert target is not None, line[:200]
                data = bytes(disk.contents[disk.inode_at(path)][start : start + int(result)])
                operation = Write(disk.inode_at(target), offset, data)
            case "renameat" | "renameat2":
                target = below(paths[1])
                assert target is not None, line
                operation = Rename(disk.inode_at(parent), own, disk.inode_at(target), texts[1], disk.inode_at(path))
            case "unlinkat" | "rmdir":
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
    match operation:
        case Rename():
            return operation.target
        case Make() | Remove():
            return operation.folder
        case _:
            return operation.inode


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
    # A synced directory has the names of its files, also of those that were created in another one.
    moved: set[int] = set()
    loose = []
    for number in reversed(range(len(done))):
        operation = done[number]
        if isinstance(operation, Sync):
            synced.add(operation.inode)
        elif _kept_by(operation) in synced:
            if isinstance(operation, Rename):
                moved.add(operation.inode)
        elif not (isinstance(operation, Make) and operation.inode in moved):
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


def outcomes(
    operations: Sequence[Operation],
    folder: Path,
    judge: Callable[[Path], str],
    most: int,
    *,
    start: int = 0,
    only_at_the_end: bool = False,
) -> tuple[Counter[str], Counter[str]]:
    """Let the power fail after each operation, and after the last: count what `judge` says of each of both.

    The first `start` operations are over.
    """
    known: dict[str, str] = {}

    def outcome_of(tree: Tree) -> str:
        # What is in a hidden directory is removed, so its contents do not matter.
        parts = ((path, held if held is None or not path.startswith(b".") else held[1]) for path, held in tree.items())
        digest = repr(sorted((path, hash(held)) for path, held in parts))
        if digest not in known:
            place = folder / str(len(known))
            place.mkdir()
            put(tree, place)
            known[digest] = judge(place)
            shutil.rmtree(place)
        return known[digest]

    end = Counter(map(outcome_of, after_power_loss(operations, most)))
    before: Counter[str] = Counter()
    for count in range(start, start if only_at_the_end else len(operations)):
        before.update(map(outcome_of, after_power_loss(operations[:count], most)))
    return before, end
