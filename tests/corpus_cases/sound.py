"""Cases that vmsnap writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vmsnap
from make_golden import IDENTITY, KEY, PASSPHRASE, Mask
from support import pattern

from .case import OTHER_KEY, Case, Corpus, Result, holds

NAMES = ["name with spaces", "żółć ☃ 𝄞", "..dots", "-dash", "it's $HOME & more", "tab\tand\x1b[2J", "e\u0301", "☃" * 85]


def write_tree(writer: vmsnap.SnapshotWriter, case: Case) -> None:
    """Names of many kinds, a namespace in each other, values, an empty fragment."""

    def raw(writer: vmsnap.SnapshotWriter, name: str, data: bytes) -> None:
        with writer.raw_fragment(name) as fragment:
            fragment.write(data)
        case.fragments["/".join(filter(None, [writer.namespace_path, name]))] = holds(data)

    namespace = writer
    for depth, name in enumerate(NAMES):
        raw(namespace, name, name.encode())
        namespace = namespace.add_namespace(f"{depth} {name[:20]}")
    raw(namespace, "empty", b"")
    clock: dict[str, Any] = {"ns": 12, "names": ["a", None, True, 1.5], "wide": 2**64 - 1}
    writer.write_fragment("clock", clock)
    case.fragments["clock"] = holds(vmsnap.serialization.encode(clock, format=writer.format))


CHUNK_LENGTHS = {32: (0, 1, 31, 32, 33, 64, 65, 1000), 33: (100,), 4096: (4095, 4096, 4097), 65536: (70000,)}


def write_chunks(writer: vmsnap.SnapshotWriter, case: Case) -> None:
    """Lengths around one chunk and several, in chunks of many sizes."""
    for chunk, lengths in CHUNK_LENGTHS.items():
        namespace = writer.add_namespace(f"chunks of {chunk}")
        for length in lengths:
            data = bytes(length) if chunk == 65536 else pattern(length, chunk)
            with namespace.raw_fragment(f"{length} bytes", chunk_size_bytes=chunk) as fragment:
                fragment.write(data)
            case.fragments[f"chunks of {chunk}/{length} bytes"] = holds(data)


PAGE = 4096
TEXT = b"".join(b"line %d of the kernel's log\n" % number for number in range(2800))[: 17 * PAGE].ljust(17 * PAGE, b".")
#: By guest-physical address. Holes, a page that does not shrink, more than one block of 64 KiB, an address above 2^63.
MEMORY = {
    0x0000_0000_0000_0000: bytes(PAGE) + TEXT + bytes(3 * PAGE) + pattern(PAGE, 7) + bytes(PAGE),
    0x0000_0001_0000_0000: bytes(2 * PAGE),
    0xFFFF_FFFF_FFFF_E000: b"\x01" * PAGE,
}


def write_memory(writer: vmsnap.SnapshotWriter, case: Case, **options: Any) -> None:
    regions = [vmsnap.GuestRegion(base, memory) for base, memory in MEMORY.items()]
    writer.write_memory(regions, **options)
    case.memory[writer.namespace_path] = memory_of(MEMORY)


def memory_of(memory: Mapping[int, bytes]) -> Result:
    return {"regions": {f"{base:016x}": holds(data) for base, data in memory.items()}}


def read_back(root: Path, case: Case, **credentials: Any) -> None:
    """Return the contents of the fragments of guest memory, which only the writer knows."""
    reader = vmsnap.open(root, **credentials)
    for name in ("mem", "mem_metadata"):
        with reader.raw_fragment(name) as fragment:
            case.fragments[name] = holds(fragment.read())


def add_sound(corpus: Corpus) -> None:
    """Add the cases that vmsnap writes."""
    for format in ("cbor", "json"):
        case = Case(f"plain, not sealed, values as {format.upper()}: names of all kinds, namespaces in namespaces")
        name = "plain" if format == "cbor" else "plain-json"
        write_tree(vmsnap.SnapshotWriter(corpus.add(name, case), format=format), case)

    case = Case("plain and sealed, with a namespace that holds nothing")
    with vmsnap.create(corpus.add("plain-sealed", case)) as writer:
        writer.add_namespace("holds nothing")
        write_tree(writer, case)

    case = Case("encrypted with a key, not sealed: lengths around chunks of 32 bytes to 64 KiB", KEY)
    write_chunks(vmsnap.SnapshotWriter(corpus.add("encrypted", case), key=KEY), case)

    case = Case("encrypted with a key, and sealed", KEY)
    with vmsnap.create(corpus.add("encrypted-sealed", case), key=KEY) as writer:
        write_tree(writer, case)

    case = Case("sealed with nothing in it", KEY)
    with vmsnap.create(corpus.add("sealed-empty", case), key=KEY):
        pass

    case = Case("its key was wrapped anew", OTHER_KEY, fragments=corpus.cases["encrypted-sealed"].fragments)
    corpus.damaged("rekeyed", "encrypted-sealed", lambda root: vmsnap.rekey(root, key=KEY, new_key=OTHER_KEY), case)

    small = {"note": holds(b"for its recipients")}
    for name, wrapping, credentials in (
        ("age", {"identity": IDENTITY}, {"recipients": vmsnap.recipients_of(IDENTITY)}),
        ("passphrase", {"passphrase": PASSPHRASE}, {"passphrase": PASSPHRASE}),
        ("key-provider", {"key_provider": Mask.name}, {"key_provider": Mask()}),
    ):
        case = Case(f"encrypted, the key wrapped by {name}", wrapping=wrapping, fragments=dict(small))
        with vmsnap.create(corpus.add(name, case), **credentials) as writer, writer.raw_fragment("note") as fragment:
            fragment.write(b"for its recipients")

    for name, about, key, options in (
        ("memory", "guest memory", None, {}),
        ("memory-lz4", "guest memory, compressed", None, {"compress": "lz4", "block_size_bytes": 65536}),
        ("memory-encrypted", "guest memory, encrypted and sealed", KEY, {}),
        ("memory-lz4-encrypted", "guest memory, compressed, encrypted and sealed", KEY, {"compress": "lz4"}),
    ):
        case = Case(about, key)
        root = corpus.add(name, case)
        with vmsnap.create(root, key=key) if key else _unsealed(root) as writer:
            write_memory(writer, case, **options)
        read_back(root, case, key=key)
    case = Case("guest memory whose metadata are JSON, as crosvm wrote them before March 2025")
    root = corpus.add("memory-json", case)
    # JSON's numbers are exact to 2^53 in some languages.
    memory = {base: data for base, data in MEMORY.items() if base < 1 << 53}
    writer = vmsnap.SnapshotWriter(root, format="json")
    writer.write_memory([vmsnap.GuestRegion(base, data) for base, data in memory.items()])
    case.memory[""] = memory_of(memory)
    read_back(root, case)


class _unsealed:  # noqa: N801 (used like `vmsnap.create`)
    """A snapshot written in place, in a `with` as others are."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __enter__(self) -> vmsnap.SnapshotWriter:
        return vmsnap.SnapshotWriter(self._root)

    def __exit__(self, *_: object) -> None:
        pass
