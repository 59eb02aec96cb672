"""Guest memory by hand, sound and damaged."""

from collections.abc import Mapping
from typing import Any

from floe import Pairs, Raw, cbor

from .case import CORRUPT, MISSING, Case, Corpus, holds, refused
from .sound import memory_of

SMALL_MEMORY = b"guest memory " * 8  # 104 bytes
BLOCK_HEADER = bytes.fromhex("04224d186040 82")
END_MARK = bytes(4)


def region(base: int = 0x1000, size: int = 4096, *ranges: tuple[int, int]) -> dict[str, Any]:
    return {"guest_base": base, "size": size, "data_ranges": [{"start": start, "end": end} for start, end in ranges]}


ONE = region(0x1000, 4096, (16, 120))


def block(stored: bytes, raw: bool = False) -> bytes:
    return (len(stored) | (1 << 31 if raw else 0)).to_bytes(4, "little") + stored


#: LZ4's block format: 13 literals, a match of 86 at 13 back, five literals.
SQUEEZED = b"\xdf" + SMALL_MEMORY[:13] + b"\x0d\x00" + bytes([86 - 4 - 15]) + b"\x50" + SMALL_MEMORY[-5:]


def lz4_index(*lengths: int, block_size: int = 65536) -> dict[str, Any]:
    return {"block_size": block_size, "block_lengths": b"".join(length.to_bytes(4, "little") for length in lengths)}


def metadata(*regions: dict[str, Any], compressed: bool = False, **more: Any) -> dict[str, Any]:
    return {"regions": list(regions), "compressed": compressed, **more}


PACKED = metadata(ONE, compressed=True)
INDEXED = metadata(ONE, compressed=True, lz4=lz4_index(len(SQUEEZED)))
FRAME = BLOCK_HEADER + block(SQUEEZED) + END_MARK
AS_JSON = '{"regions":[{"guest_base":4096,"size":4096,"data_ranges":[{"start":16,"end":120}]}],"compressed":false}'
TOUCHING = metadata(region(0x1000, 64, (0, 30), (30, 64)), region(0x1040, 40, (0, 40)))
TOUCHED = {0x1000: SMALL_MEMORY[:64], 0x1040: SMALL_MEMORY[64:]}
TURNED = {0x2000: SMALL_MEMORY[:52] + bytes(12), 0x1000: SMALL_MEMORY[52:] + bytes(12)}
RESTORED = {0x1000: bytes(16) + SMALL_MEMORY + bytes(4096 - 120)}


def _frame(squeezed: bytes) -> bytes:
    return BLOCK_HEADER + block(squeezed) + END_MARK


#: By the name of the namespace: `mem_metadata`, `mem` (None: no such file), and the restored memory or kind of error.
MEMORIES: dict[str, tuple[object, bytes | None, Mapping[int, bytes] | str]] = {
    "plain": (metadata(ONE), SMALL_MEMORY, RESTORED),
    "nothing": (metadata(), b"", {}),
    "all zero": (metadata(region()), b"", {0x1000: bytes(4096)}),
    "an exabyte over another region": (metadata(region(0, 1 << 60, (0, 104)), region()), SMALL_MEMORY, CORRUPT),
    "keys that nobody knows": (metadata(ONE, hint={"a": [1]}), SMALL_MEMORY, RESTORED),
    "a block as it is": (PACKED, BLOCK_HEADER + block(SMALL_MEMORY, raw=True) + END_MARK, RESTORED),
    "compressed": (PACKED, FRAME, RESTORED),
    "compressed, with an index": (INDEXED, FRAME, RESTORED),
    "compressed, of nothing": (metadata(region(), compressed=True), BLOCK_HEADER + END_MARK, {0x1000: bytes(4096)}),
    "a null index": (metadata(ONE, lz4=Raw(b"\xf6")), SMALL_MEMORY, RESTORED),
    "an index, and not compressed": (metadata(ONE, lz4=lz4_index(104)), SMALL_MEMORY, RESTORED),
    "ranges and regions that touch": (TOUCHING, SMALL_MEMORY, TOUCHED),
    "regions in any order": (metadata(region(0x2000, 64, (0, 52)), region(0x1000, 64, (0, 52))), SMALL_MEMORY, TURNED),
    "blocks of 256 KiB": (PACKED, FRAME.replace(BLOCK_HEADER, bytes.fromhex("04224d186050fb")), RESTORED),
    "blocks of 4 MiB": (PACKED, FRAME.replace(BLOCK_HEADER, bytes.fromhex("04224d18607073")), RESTORED),
    "a raw block in an index": (
        metadata(ONE, compressed=True, lz4=lz4_index(104)),
        BLOCK_HEADER + block(SMALL_MEMORY, raw=True) + END_MARK,
        RESTORED,
    ),
    "in JSON": (AS_JSON.encode(), SMALL_MEMORY, RESTORED),
    "in JSON, compressed, with an index": (
        AS_JSON.replace("false", f'true,"lz4":{{"block_size":65536,"block_lengths":[{len(SQUEEZED)},0,0,0]}}').encode(),
        FRAME,
        RESTORED,
    ),
    "in JSON, an index of other numbers": (
        AS_JSON.replace("false", 'true,"lz4":{"block_size":65536,"block_lengths":[256,0,0,0]}').encode(),
        FRAME,
        CORRUPT,
    ),
    "in JSON, a base beyond 64 bits": (
        AS_JSON.replace("4096,", "18446744073709551616,", 1).encode(),
        SMALL_MEMORY,
        CORRUPT,
    ),
    "in JSON, a size with a point": (AS_JSON.replace('"size":4096', '"size":4096.5').encode(), SMALL_MEMORY, CORRUPT),
    "in JSON, a key twice": (AS_JSON.replace("false", 'false,"compressed":false').encode(), SMALL_MEMORY, CORRUPT),
    "in JSON, cut": (AS_JSON[:-1].encode(), SMALL_MEMORY, CORRUPT),
    "in JSON, and more": (f"{AS_JSON}x".encode(), SMALL_MEMORY, CORRUPT),
    "in JSON, and no UTF-8": (AS_JSON.encode().replace(b"regions", b"region\xff"), SMALL_MEMORY, CORRUPT),
    "a key twice": (Pairs([*metadata(ONE).items(), ("compressed", False)]), SMALL_MEMORY, CORRUPT),
    "a range with another key": (
        metadata(ONE | {"data_ranges": [{"start": 16, "end": 120, "hint": 1}]}),
        SMALL_MEMORY,
        CORRUPT,
    ),
    "mem missing": (metadata(ONE), None, MISSING),
    "mem_metadata missing": (None, SMALL_MEMORY, MISSING),
    "mem too short": (metadata(ONE), SMALL_MEMORY[:-1], CORRUPT),
    "mem too long": (metadata(ONE), SMALL_MEMORY + b"\0", CORRUPT),
    "mem_metadata cut": (cbor(metadata(ONE))[:-1], SMALL_MEMORY, CORRUPT),
    "mem_metadata and more": (cbor(metadata(ONE)) + b"\0", SMALL_MEMORY, CORRUPT),
    "mem_metadata a list": ([ONE], SMALL_MEMORY, CORRUPT),
    "mem_metadata empty": (b"", SMALL_MEMORY, CORRUPT),
    "no word of compression": ({"regions": [ONE]}, SMALL_MEMORY, CORRUPT),
    "size as text": (metadata(ONE | {"size": "4096"}), SMALL_MEMORY, CORRUPT),
    "size below zero": (metadata(ONE | {"size": -1}), SMALL_MEMORY, CORRUPT),
    "regions that overlap": (metadata(ONE, region(0x1FFF)), SMALL_MEMORY, CORRUPT),
    "a region around another": (metadata(region(0x1100, 16), ONE), SMALL_MEMORY, CORRUPT),
    "a region to 2^64": (metadata(ONE | {"guest_base": 2**64 - 4096}), SMALL_MEMORY, CORRUPT),
    "a region beyond 64 bits": (metadata(ONE | {"guest_base": 2**64 - 100}), SMALL_MEMORY, CORRUPT),
    "a base beyond 64 bits": (metadata(ONE | {"guest_base": Raw(b"\xc2\x49\x01" + bytes(8))}), SMALL_MEMORY, CORRUPT),
    "a range beyond its region": (metadata(region(0, 100, (0, 104))), SMALL_MEMORY, CORRUPT),
    "a range of nothing": (metadata(region(0, 4096, (0, 104), (200, 200))), SMALL_MEMORY, CORRUPT),
    "a range backwards": (metadata(region(0, 4096, (104, 0))), SMALL_MEMORY, CORRUPT),
    "ranges that overlap": (metadata(region(0, 4096, (0, 60), (50, 94))), SMALL_MEMORY, CORRUPT),
    "ranges in another order": (metadata(region(0, 4096, (200, 204), (0, 100))), SMALL_MEMORY, CORRUPT),
    "another header": (PACKED, FRAME.replace(BLOCK_HEADER, bytes.fromhex("04224d186440a7")), CORRUPT),
    "another magic number": (PACKED, b"\x05" + FRAME[1:], CORRUPT),
    "no frame": (PACKED, SMALL_MEMORY, CORRUPT),
    "an empty mem": (PACKED, b"", CORRUPT),
    "an index of two": (metadata(ONE, compressed=True, lz4=lz4_index(20, 9)), FRAME, CORRUPT),
    "an index of none": (metadata(ONE, compressed=True, lz4=lz4_index()), FRAME, CORRUPT),
    "an index of odd length": (
        metadata(ONE, compressed=True, lz4=lz4_index() | {"block_lengths": b"abc"}),
        FRAME,
        CORRUPT,
    ),
    "an index that lies": (metadata(ONE, compressed=True, lz4=lz4_index(len(SQUEEZED) - 1)), FRAME, CORRUPT),
    "an index of other blocks": (
        metadata(ONE, compressed=True, lz4=lz4_index(len(SQUEEZED), block_size=1 << 20)),
        FRAME,
        CORRUPT,
    ),
    "blocks of 100 bytes": (metadata(ONE, compressed=True, lz4=lz4_index(20, 9, block_size=100)), FRAME, CORRUPT),
    "a block cut": (PACKED, FRAME[:-8], CORRUPT),
    "a block of 2 GiB": (PACKED, BLOCK_HEADER + (2**31 - 1).to_bytes(4, "little") + SQUEEZED + END_MARK, CORRUPT),
    "a raw block too short": (PACKED, BLOCK_HEADER + block(SMALL_MEMORY[:-1], raw=True) + END_MARK, CORRUPT),
    "a block that holds less": (PACKED, _frame(b"\x50guest"), CORRUPT),
    "a block that holds more": (PACKED, _frame(SQUEEZED[:16] + b"\xff\x00" + SQUEEZED[-6:]), CORRUPT),
    "a block of zeros without end": (PACKED, _frame(b"\x1f\0\x01\0" + b"\xff" * 400), CORRUPT),
    "an offset of zero": (PACKED, _frame(SQUEEZED.replace(b"\x0d\x00", b"\x00\x00")), CORRUPT),
    "an offset before the block": (PACKED, _frame(SQUEEZED.replace(b"\x0d\x00", b"\x0e\x00")), CORRUPT),
    "a sequence cut": (PACKED, _frame(SQUEEZED[:15]), CORRUPT),
    "literals cut": (PACKED, _frame(SQUEEZED[:-2]), CORRUPT),
    "a block more": (PACKED, BLOCK_HEADER + block(SQUEEZED) * 2 + END_MARK, CORRUPT),
    "no end mark": (PACKED, FRAME[:-4], CORRUPT),
    "an end mark too early": (PACKED, BLOCK_HEADER + END_MARK + block(SQUEEZED) + END_MARK, CORRUPT),
    "bytes after the frame": (PACKED, FRAME + b"\0", CORRUPT),
    "a second frame": (PACKED, FRAME * 2, CORRUPT),
}


def add_memories(corpus: Corpus) -> None:
    """One plain snapshot with a namespace for each kind of guest memory."""
    case = Case("guest memory by hand, sound and damaged")
    root = corpus.add("memories", case)
    for name, (metadata, mem, expected) in MEMORIES.items():
        (root / name).mkdir(parents=True)
        item = metadata if isinstance(metadata, bytes) or metadata is None else cbor(metadata)
        for file, data in (("mem_metadata", item), ("mem", mem)):
            if data is not None:
                (root / name / file).write_bytes(data)
                case.fragments[f"{name}/{file}"] = holds(data)
        case.memory[name] = refused(expected) if isinstance(expected, str) else memory_of(expected)
