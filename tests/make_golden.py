"""Write the golden snapshots of this version, once, with their contents in expected.json.

    python tests/make_golden.py

creates ``tests/golden/<version>/`` with the installed vmsnap. Golden snapshots of a release are never written again:
later versions must read them (`test_golden.py`), and get a directory of their own if they write something new.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import vmsnap
from support import pattern

GOLDEN = Path(__file__).resolve().parent / "golden"

#: A key for tests, in clear.
KEY = bytes(range(32))

# The snapshots -------------------------------------------------------------------------------------------------------

#: Lengths by the size of the chunk: around one chunk, several, and no more than a repository should carry.
RAW_LENGTHS = {
    32: (0, 1, 31, 32, 33, 64, 65, 1000),
    4096: (4095, 4096, 4097),
    65536: (1, 65537),
}
#: A plain file knows no chunks.
PLAIN_LENGTHS = {4096: (0, 1, 4097)}

NAMES = ["name with spaces", "żółć ☃ 𝄞", "dots.and-dashes_", "..twice", "n" * 100, "it's $HOME & more"]


@dataclass(frozen=True)
class Golden:
    """A snapshot to make."""

    key: bytes | None
    format: str
    raw_lengths: dict[int, tuple[int, ...]]


SNAPSHOTS = {
    "plain": Golden(None, "cbor", PLAIN_LENGTHS),
    "plain-json": Golden(None, "json", {}),
    "encrypted": Golden(KEY, "cbor", RAW_LENGTHS),
    "encrypted-json": Golden(KEY, "json", {}),
}

# Other wrappings of the key of "encrypted" ---------------------------------------------------------------------------

#: For tests, in clear.
IDENTITY = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"
PASSPHRASE = "golden"


class Mask:
    """A key service that protects nothing."""

    name = "golden-mask"

    def wrap(self, payload: bytes) -> bytes:
        return bytes(byte ^ 0xA5 for byte in payload)

    unwrap = wrap


#: Arguments of `rekey`, and the arguments that open the snapshot afterwards.
WRAPPINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "age": ({"recipients": vmsnap.recipients_of(IDENTITY)}, {"identities": IDENTITY}),
    "passphrase": ({"new_passphrase": PASSPHRASE}, {"passphrase": PASSPHRASE}),
    "key-provider": ({"new_key_provider": Mask()}, {"key_provider": Mask()}),
}


def make_wrappings(folder: Path, encrypted: Path) -> None:
    """Write an ``enc_metadata`` of each kind for a snapshot that is encrypted with `KEY`."""
    folder.mkdir()
    for name, (new, _) in WRAPPINGS.items():
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copy(encrypted / "enc_metadata", temporary)
            vmsnap.rekey(temporary, key=KEY, **new)
            shutil.copy(Path(temporary, "enc_metadata"), folder / name)


# The values ----------------------------------------------------------------------------------------------------------


class Mode(Enum):
    LONG = "long"


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Vcpu:
    index: int
    mode: Mode
    registers: list[int] = field(default_factory=lambda: [0, 1, 2**64 - 1])


@dataclass(frozen=True)
class Value:
    """A written value, and the value read in each format; None if the format cannot express it."""

    written: Any
    cbor: Any
    json: Any


def same(value: Any) -> Value:
    return Value(value, value, value)


def cbor_only(value: Any, read: Any = None) -> Value:
    return Value(value, value if read is None else read, None)


INTS = [0, 1, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
UUIDS = [UUID(int=0), UUID("12345678-1234-5678-1234-567812345678")]
MOMENTS = [
    datetime(2026, 8, 21, 12, 34, 56, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=timezone(timedelta(hours=5, minutes=45))),
]
DTYPES = [
    "|u1",
    "|i1",
    *(order + kind for kind in ("u2", "u4", "u8", "i2", "i4", "i8", "f2", "f4", "f8") for order in "<>"),
]
ARRAYS = {
    **{dtype: np.array([0, 1, 2, 100], dtype=dtype) for dtype in DTYPES},
    "signed": np.array([-1, -128], dtype="<i8"),
    "special": np.array([math.nan, math.inf, -math.inf, -0.0], dtype="<f8"),
    "empty": np.array([], dtype="<f4"),
    "rows": np.arange(6, dtype="<u2").reshape(2, 3),
    "cube": np.arange(24, dtype=">f4").reshape(2, 3, 4),
}


def nested(levels: int) -> Any:
    return [] if levels == 0 else {"deeper": [nested(levels - 1)]} if levels % 2 else [nested(levels - 1), levels]


VALUES = {
    "none": same(None),
    "true": same(True),
    "false": same(False),
    "ints": same(INTS + [-1 - number for number in INTS if number < 2**63]),
    "wide ints": cbor_only([-(2**63) - 1, -(2**64), -(2**64) - 1, 2**64, 2**127, -(2**200)]),
    "floats": same([0.0, -0.0, 1.0, 1.5, 0.1, 1 / 3, 65504.0, 65505.0, 2.0**53, 1e300, -1e-300, 5e-324]),
    "special floats": cbor_only([math.nan, math.inf, -math.inf]),
    "texts": same(["", "plain", "żółć ☃ 𝄞 e\u0301", '\0\x1f\x7f\u2028"\\\n', "a" * 23, "b" * 24, "c" * 256]),
    "bytes": Value(
        [b"", bytearray(b"\x00\xff"), memoryview(b"view"), pattern(300)],
        [b"", b"\x00\xff", b"view", pattern(300)],
        [[], [0, 255], list(b"view"), list(pattern(300))],
    ),
    "lists": same([[], [[]], [1, ["two", [None, True]]]]),
    "tuples": Value([(), (1, "a"), Point(3, -4)], [[], [1, "a"], [3, -4]], [[], [1, "a"], [3, -4]]),
    "dicts": same({"": 0, "b": {"z": 1, "a": 2}, "ключ": {}, "a": [{"k": None}]}),
    "keys": cbor_only({0: "zero", -1: "negative", 2**64: "wide", b"\x00": "bytes", (1, "a"): "tuple", True: "bool"}),
    "number keys": Value(
        {7: "seven", 1000: {-1: "negative"}},
        {7: "seven", 1000: {-1: "negative"}},
        {"7": "seven", "1000": {"-1": "negative"}},
    ),
    "sets": Value(
        [set(), {3, 1, 2}, frozenset({"b", "a"})], [set(), {3, 1, 2}, {"b", "a"}], [[], [1, 2, 3], ["a", "b"]]
    ),
    "mixed set": cbor_only({1, "one", b"one", (1, 2), None}),
    "uuids": Value(UUIDS, UUIDS, [str(uuid) for uuid in UUIDS]),
    "moments": Value(MOMENTS, MOMENTS, [moment.isoformat() for moment in MOMENTS]),
    "dates": Value([date(2026, 8, 21)], [date(2026, 8, 21)], ["2026-08-21"]),
    "record": Value(
        {"vcpus": [Vcpu(0, Mode.LONG)], "image": PurePosixPath("/var/lib/vm")},
        *2 * [{"vcpus": [{"index": 0, "mode": "long", "registers": [0, 1, 2**64 - 1]}], "image": "/var/lib/vm"}],
    ),
    "numpy scalars": Value([np.uint8(5), np.float32(0.5), np.bool_(True)], *2 * [[5, 0.5, True]]),
    "arrays": cbor_only(ARRAYS),
    "number arrays": Value(
        {name: ARRAYS[name] for name in ("<u8", "rows", "empty")},
        {name: ARRAYS[name] for name in ("<u8", "rows", "empty")},
        {name: ARRAYS[name].tolist() for name in ("<u8", "rows", "empty")},
    ),
    "nested": same(nested(60)),
}


def described(value: Any) -> Any:
    """Return a value that was read in JSON's terms, where every two that are not the same differ.

    A value that JSON cannot express is an object with one key that begins with ``$``.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else {"$int": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) and str(value) != "-0.0" else {"$float": str(value)}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: described(item) for key, item in value.items()}
        return {"$map": [[described(key), described(item)] for key, item in value.items()]}
    if isinstance(value, (set, frozenset)):
        return {"$set": sorted(map(described, value), key=json.dumps)}
    if isinstance(value, UUID):
        return {"$uuid": str(value)}
    if isinstance(value, datetime):
        return {"$datetime": value.isoformat()}
    if isinstance(value, date):
        return {"$date": value.isoformat()}
    if isinstance(value, np.ndarray):
        return {"$array": {"dtype": value.dtype.str, "values": described(value.tolist()), "shape": list(value.shape)}}
    raise TypeError(f"{type(value)} is in no golden snapshot")


# Making them ---------------------------------------------------------------------------------------------------------


def written_values(format: str) -> dict[str, tuple[Any, Any]]:
    """Return the written and the read values that a format can express, by name."""
    return {
        name: (value.written, getattr(value, format))
        for name, value in VALUES.items()
        if format == "cbor" or name == "none" or value.json is not None
    }


def make(root: Path, golden: Golden) -> dict[str, Any]:
    """Write a snapshot, and return its entry for expected.json."""
    fragments: dict[str, Any] = {}

    def raw(writer: vmsnap.SnapshotWriter, name: str, data: bytes, chunk_size_bytes: int = 4096) -> None:
        with writer.raw_fragment(name, chunk_size_bytes=chunk_size_bytes) as fragment:
            fragment.write(data)
        path = "/".join(filter(None, [writer.namespace_path, name]))
        fragments[path] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if golden.key is not None:
            fragments[path]["chunk_size_bytes"] = chunk_size_bytes

    writer = vmsnap.SnapshotWriter(root, key=golden.key, format=golden.format)
    for chunk_size_bytes, lengths in golden.raw_lengths.items():
        namespace = writer.add_namespace(f"chunks of {chunk_size_bytes}")
        for length in lengths:
            raw(namespace, f"{length} bytes", pattern(length, chunk_size_bytes), chunk_size_bytes)
    namespace = writer
    # Names that also other systems can check out; those at the limits are tested elsewhere.
    for depth, name in enumerate(NAMES):
        raw(namespace, name, name.encode())
        namespace = namespace.add_namespace(f"{name} namespace {depth}")
    raw(namespace, "empty", b"")

    values = writer.add_namespace("values")
    for name, (written, _) in written_values(golden.format).items():
        values.write_fragment(name, written)
        data = vmsnap.serialization.encode(written, format=golden.format)
        fragments[f"values/{name}"] = {
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            **({} if golden.key is None else {"chunk_size_bytes": 4096}),
        }
    return {
        "key": None if golden.key is None else golden.key.hex(),
        "format": golden.format,
        "fragments": dict(sorted(fragments.items())),
    }


def as_text(expected: dict[str, Any]) -> str:
    """Return JSON with a line for each fragment and each value."""
    dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)

    def table(entries: dict[str, Any]) -> str:
        return "{\n" + ",\n".join(f"   {dump(key)}: {dump(entry)}" for key, entry in entries.items()) + "\n  }"

    values = ",\n".join(f"  {dump(format)}: {table(entries)}" for format, entries in expected["values"].items())
    snapshots = ",\n".join(
        f"""  {dump(name)}: {{"key": {dump(holds["key"])}, "format": {dump(holds["format"])}, "fragments": """
        f"""{table(holds["fragments"])}}}"""
        for name, holds in expected["snapshots"].items()
    )
    return f'{{\n "values": {{\n{values}\n }},\n "snapshots": {{\n{snapshots}\n }}\n}}\n'


def main() -> None:
    folder = GOLDEN / vmsnap.__version__
    if folder.exists():
        sys.exit(f"{folder} exists: golden snapshots are never written again")
    folder.mkdir(parents=True)
    expected = {
        "values": {
            format: {name: described(read) for name, (_, read) in written_values(format).items()}
            for format in ("cbor", "json")
        },
        "snapshots": {name: make(folder / name, golden) for name, golden in SNAPSHOTS.items()},
    }
    make_wrappings(folder / "wrappings", folder / "encrypted")
    (folder / "expected.json").write_text(as_text(expected), encoding="utf-8")
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
