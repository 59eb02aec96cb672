"""Values from untrusted sources: for any bytes, an error with place and reason, in bounded time and memory."""

import json
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import numpy as np
import pytest
import vmsnap
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import Place, run_python, write
from vmsnap.serialization import decode, encode

Format = Literal["cbor", "json"]


def refusal(data: bytes, type: Any = None, format: Format | None = None) -> str:
    """Return the text of the error: short, and nothing in it that a terminal would obey."""
    with pytest.raises(vmsnap.CorruptSnapshotError) as raised:
        decode(data, type, format=format)
    text = str(raised.value)
    assert len(text) < 1000
    assert text.isprintable()
    return text


def array(items: list[bytes]) -> bytes:
    return b"\x9a" + struct.pack(">I", len(items)) + b"".join(items)


def text(content: str) -> bytes:
    return b"\x7a" + struct.pack(">I", len(content.encode())) + content.encode()


# The kinds ---------------------------------------------------------------------------------------------------

SET = b"\xd9\x01\x02"
NAN = b"\xfb\x7f\xf8" + bytes(6)

#: Bytes, the reason, and the offset.
CBOR: dict[str, tuple[bytes, str, int]] = {
    "nested lists": (b"\x81" * 127 + b"\x80", "deeper than 127 levels", 127),
    "nested without lengths": (b"\x9f" * 100_000, "deeper than 127 levels", 127),
    "nested maps": (b"\xa1\x00" * 127 + b"\xa0", "deeper than 127 levels", 254),
    "nested sets": ((SET + b"\x81") * 64 + b"\x00", "deeper than 127 levels", 63 * 4 + 3),
    "nested keys": (b"\xa1" + b"\x81" * 127 + b"\x00\x00", "deeper than 127 levels", 127),
    "a huge list": (b"\x82\x00\x9b" + b"\xff" * 8, "declares 18446744073709551615 items, but only 0 bytes are left", 2),
    "a huge map": (b"\xbb" + b"\xff" * 8 + b"\x00", "declares 18446744073709551615 pairs", 0),
    "a huge set": (SET + b"\x9b\x00\xff" + bytes(6), "declares 71776119061217280 items", 3),
    "a huge text": (b"\x81\x7b\x7f" + b"\xff" * 7, "declares 9223372036854775807 bytes, but only 0 are left", 1),
    "huge bytes": (b"\x5a\xff\xff\xff\xff1", "declares 4294967295 bytes, but only 1 are left", 0),
    "a huge piece": (b"\x5f\x41a\x5b" + b"\xff" * 8, "declares 18446744073709551615 bytes", 3),
    "a cut number": (b"\x81\x19\x01", "truncated", 3),
    "a cut list": (b"\x9f\x01", "truncated", 2),
    "cut pieces": (b"\x7f\x61a", "truncated", 3),
    "a cut tag": (b"\xc1", "truncated", 1),
    "nothing": (b"", "truncated", 0),
    "trailing bytes": (b"\x81\x00\x00", "bytes follow its end", 2),
    "a key twice": (b"\xa2\x01\x00\x01\x00", "a key of a map comes twice", 5),
    "a key as int and float": (b"\xa2\x01\x00\xf9\x3c\x00\x00", "a key of a map comes twice", 7),
    "a key as int and bool": (b"\x81\xbf\x01\x00\xf5\x00\xff", "a key of a map comes twice", 6),
    "a member twice": (SET + b"\x82\x01\x01", "a member of a set comes twice", 6),
    "a member as int and big number": (SET + b"\x82\x01\xc2\x41\x01", "a member of a set comes twice", 8),
    "a cyclic reference": (b"\xd8\x1c\x81\xd8\x1d\x00", "tag 28", 0),
    "a shared reference": (b"\x81\xd8\x1d\x00", "tag 29", 1),
    "a decimal": (b"\xc4\x82\x1b\x7f" + b"\xff" * 7 + b"\x01", "tag 4", 0),
    "a big float": (b"\xc5\x82\x1a\x7f\xff\xff\xff\x01", "tag 5", 0),
    "a rational": (b"\xd8\x1e\x82\x01\x00", "tag 30", 0),
    "a regular expression": (b"\x81\xd8\x23\x65(a+)+", "tag 35", 1),
    "a MIME part": (b"\xd8\x24\x60", "tag 36", 0),
    "a string reference": (b"\xd9\x01\x00\x82\x63aaa\xd8\x19\x00", "tag 256", 0),
    "self-described": (b"\xd9\xd9\xf7\x00", "tag 55799", 0),
    "the largest tag": (b"\xdb" + b"\xff" * 8 + b"\x00", "tag 18446744073709551615", 0),
    "a lone surrogate": (b"\x81\x63\xed\xa0\x80", "not UTF-8", 1),
    "a lone surrogate in a key": (b"\xa1\x63\xed\xbf\xbf\x00", "not UTF-8", 1),
    "half a character in a piece": (b"\x7f\x61\xc3\x61\xa9\xff", "not UTF-8", 1),
    "NaN as a key": (b"\xa1" + NAN + b"\x00", "not a number (NaN)", 1),
    "a short NaN as a key": (b"\xa1\xf9\x7e\x01\x00", "not a number (NaN)", 1),
    "NaN in a key": (b"\xa1\x81\xfa\xff\xc0\x00\x00\x00", "not a number (NaN)", 2),
    "NaN in a set": (SET + b"\x82\x00" + NAN, "not a number (NaN)", 5),
    "a map as a key": (b"\xa1\xa0\x00", "a key is a map", 1),
    "a map in a set": (SET + b"\x81\x81\xa0", "a key is a map", 5),
    "an array as a key": (b"\xa1\xd8\x40\x41\x00\x00", "a key has tag 64", 1),
    "a break in a list": (b"\x81\xff", "a break is at the wrong place", 1),
    "a key without a value": (b"\xbf\x01\xff", "a break is at the wrong place", 2),
    "undefined": (b"\xf7", "not false, true or null", 0),
    "a reserved head": (b"\x1c", "the byte 0x1c does not begin an item", 0),
    "a number without a length": (b"\x1f", "the byte 0x1f does not begin an item", 0),
    "a date that is none": (b"\x82\x00\xd9\x03\xec\x6a2024-02-30", "error decoding string-form date", 16),
    "a date in the terminal": (b"\xc0\x65\x1b[2J\x07", "Invalid isoformat string", 7),
    "a moment beyond time": (b"\xc1\xfb\x7e\x37\xe4\x3c\x88\x00\x75\x9c", "error decoding epoch-form datetime", 10),
    "a shape of 2^64 elements": (
        b"\xd8\x28\x82\x82\x1b\x00\x00\x00\x01\x00\x00\x00\x00\x1b\x00\x00\x00\x01\x00\x00\x00\x00\xd8\x40\x40",
        "cannot reshape",
        25,
    ),
    "endless rows": (b"\xd8\x28\x82\x82\x1b\x40" + bytes(7) + b"\x00\xd8\x40\x40", "4611686018427387904 rows", 3),
    "a shape beyond size_t": (b"\xd8\x28\x82\x81\x1b\x80" + bytes(7) + b"\xd8\x40\x41\x00", "error decoding", 17),
    "too many dimensions": (b"\xd8\x28\x82\x98\x80" + b"\x01" * 128 + b"\xd8\x40\x41\x00", "error decoding", 137),
    "a negative dimension": (b"\xd8\x28\x82\x81\x20\xd8\x40\x40", "a dimension is not an unsigned integer", 4),
    "half an element": (b"\xd8\x45\x43\x00\x00\x00", "elements of 2 bytes", 0),
}

JSON: dict[str, tuple[bytes, str, int | tuple[int, int]]] = {
    "nested lists": (b"[" * 128 + b"]" * 128, "recursion limit", 127),
    "nested without an end": (b"[" * 100_000, "recursion limit", 127),
    "nested maps": (b'{"":' * 128, "recursion limit", 127 * 4),
    "a cut list": (b"[1,\n2", "EOF", 5),
    "a cut text": (b'["a', "EOF", 3),
    "a cut word": (b"[tru", "EOF", 4),
    "trailing bytes": (b"[1]\n x", "trailing characters", 5),
    "two values": (b"{}{}", "trailing characters", 2),
    "a key twice": (b'{"a":1,\n"a":2}', "a key of a map comes twice", 10),
    "a key twice, once escaped": (rb'{"a":1,"\u0061":2}', "a key of a map comes twice", 14),
    "a lone surrogate": (rb'["\ud800"]', "hex escape", 8),
    "a lone surrogate at the end of a pair": (rb'["\udc00"]', "surrogate", 7),
    "a lone surrogate in a key": (rb'{"\ud800x":1}', "hex escape", 8),
    "NaN": (b"[NaN]", "expected value", 1),
    "infinity": (b"[-Infinity]", "invalid number", 2),
    "a huge number": (b"[1e400]", "number out of range", 5),
    "a number of many digits": (b"[" + b"1" * 100_000 + b"]", "number out of range", 100_000),
    "a control character": (b'["\x1b"]', "control character", 2),
    # Before 1.0.153, serde_json told where such a text ends.
    "no UTF-8": (b'["\xff"]', "unicode", (2, 3)),
    "a comment": (b"[1,//\n2]", "expected value", 3),
}


@pytest.mark.parametrize("kind", CBOR)
def test_hostile_cbor_is_refused_with_fragment_and_offset(place: Place, kind: str) -> None:
    data, reason, offset = CBOR[kind]
    check_both_levels(place, data, reason, offset)


@pytest.mark.parametrize("kind", JSON)
def test_hostile_json_is_refused_with_fragment_and_offset(place: Place, kind: str) -> None:
    data, reason, offset = JSON[kind]
    check_both_levels(place, data, reason, offset)


def check_both_levels(place: Place, data: bytes, reason: str, offset: int | tuple[int, int]) -> None:
    offsets = (offset,) if isinstance(offset, int) else offset
    ends = tuple(f", {where} byte {offset}" for offset in offsets for where in ("at", "before"))
    root = place.create()
    write(root, "state", data)
    write(root.add_namespace("pci").add_namespace("00:1f.2"), "state", data)
    reader = place.open()
    namespace = reader.namespace("pci").namespace("00:1f.2")
    for level, name in (reader, '"state"'), (namespace, '"state" in namespace "pci/00:1f.2"'):
        with pytest.raises(vmsnap.CorruptSnapshotError) as raised:
            level.read_fragment("state")
        message = str(raised.value)
        assert message.startswith(f"fragment {name} of {place.location} does not contain a serialized value: ")
        assert reason in message
        assert message.endswith(ends)
        assert len(message) < 500
        assert message.isprintable()


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf[]", "[1]".encode("utf-16"), "[1]".encode("utf-16-le"), b"1\x00"])
def test_json_is_utf_8_without_a_mark(data: bytes) -> None:
    refusal(data)
    refusal(data, format="json")


# Errors --------------------------------------------------------------------------------------------------------------

LONG = 300_000


@pytest.mark.parametrize(
    ("data", "type"),
    [
        (b"\xa2" + 2 * (text("\x1b\u202e" * LONG) + b"\x00"), None),
        (b"\xa2" + 2 * (array([b"\x00"] * LONG) + b"\x00"), None),
        (b"\xa2" + 2 * (b"\xc2\x5a" + struct.pack(">I", LONG) + b"\xff" * LONG + b"\x00"), None),
        (b"\xd9\x03\xec" + text("\x1b" * LONG), None),
        (b"\xc0" + text("\u202e" * LONG), None),
        (b'{"%b":1,"%b":2}' % (2 * ("\u202e".encode() * LONG,)), None),
        (b"\xa1" + text("a" * LONG) + b"\x60", dict[Any, int]),
        (b"\xa1" + text("\u202e" * LONG) + b"\x60", dict[Any, int]),
        (b"\xa1\x5a" + struct.pack(">I", LONG) + bytes(LONG) + b"\x60", dict[Any, int]),
        (b"\xa1\xc2\x5a" + struct.pack(">I", LONG) + b"\xff" * LONG + b"\x60", dict[Any, int]),
    ],
)
def test_an_error_quotes_little_of_what_was_read(data: bytes, type: Any) -> None:
    refusal(data, type)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyboardInterrupt])
def test_an_error_that_is_not_the_bytes_fault_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def frombuffer(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(np, "frombuffer", frombuffer)
    with pytest.raises(error):
        decode(b"\xd8\x40\x41\x00")


def test_a_numpy_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(vmsnap.UnsupportedFormatError, match="need numpy"):
        decode(b"\xd8\x40\x41\x00")


# Types ---------------------------------------------------------------------------------------------------------------


@dataclass
class Linked:
    next: "Linked | None"


@dataclass
class Itself:
    me: "Itself | Linked"


@pytest.mark.parametrize("type", [Linked, Itself, Linked | int | Itself, list[Itself]])
@pytest.mark.parametrize("value", [1.5, "x", [1.5], [[]], {"x": {}}, {"next": 5}, {"me": {}}, {"next": {"x": 1.5}}])
def test_a_type_whose_only_field_is_itself_is_built_or_refused(type: Any, value: Any) -> None:
    with suppress(vmsnap.CorruptSnapshotError):
        assert decode(encode(value), type) is not None


def test_a_record_nests_as_deep_as_values_may() -> None:
    value = None
    for _ in range(126):
        value = Linked(value)
    assert decode(encode(value), Linked) == value


@pytest.mark.parametrize("type", [set, frozenset[Any], set[tuple[Any, ...]], dict[tuple[Any, ...], Any]])
def test_what_cannot_be_hashed_is_no_member_and_no_key(type: Any) -> None:
    for data in (b"\x81\x81\xa0", b"\x81\x81\x80", b"\x81\xa0"):
        refusal(data, type)


def test_an_unhashable_key_is_refused() -> None:
    assert "a list, which is not hashable" in refusal(b"\xa1\x81\x00\x00", dict[list[int], int])
    assert "NaN" in refusal(b"\x81" + NAN, set[float])


@pytest.mark.parametrize("data", [b"\xd8\x40\x42\x00\x00", b"\xd8\x40\x40", b"\xd8\x40\x41\x00"])
def test_an_array_is_not_nothing(data: bytes) -> None:
    assert "expected null, found ndarray" in refusal(data, type(None))


@pytest.mark.parametrize("kind", [np.ndarray, np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[np.str_]]])
def test_a_long_text_does_not_make_all_texts_of_an_array_as_long(kind: Any) -> None:
    refusal(encode(["a" * 10_000, *"b" * 10_000]), kind)
    refusal(encode([[b"a" * 10_000], [[b"b"]] * 10_000]), kind)


@pytest.mark.parametrize("kind", [np.ndarray, np.ndarray[Any, np.dtype[Any]], np.ndarray[Any, np.dtype[np.floating]]])
def test_an_array_of_any_kind_is_built(kind: Any) -> None:
    for value in ([[1.0, 2.0]], [[1, 2.0]], np.ones((1, 2), "<f4")):
        assert decode(encode(value), kind).shape == (1, 2)


#: Hash values of ints, and of UUIDs, are equal where these differ by a multiple of it.
MODULUS = sys.hash_info.modulus


@pytest.mark.parametrize(
    ("value", "type"),
    [
        ({str(UUID(int=n * MODULUS)): 0 for n in range(1000)}, dict[UUID, int]),
        ([n * MODULUS for n in range(1000)], set[int]),
        ([n * MODULUS for n in range(1000)], frozenset),
        ({str(n * MODULUS): 0 for n in range(1000)}, dict[int, int]),
        ([[n * MODULUS, 0] for n in range(1000)], set[tuple[int, ...]]),
    ],
)
def test_keys_that_share_a_hash_value_are_refused(value: Any, type: Any) -> None:
    assert "the same hash value" in refusal(encode(value), type)


def keys_that_meet(bits: int = 13) -> list[int]:
    """Return numbers with different hash values for which a dict of so many bits looks at thousands of slots each."""
    slots = 1 << bits
    # One third of the slots, in an order in which a dict goes on when a hash value has no more bits to offer ...
    taken, slot = [], 0
    for _ in range(slots // 3):
        taken.append(slot)
        slot = (slot * 5 + 1) % slots
    found, occupied = list(taken), set(taken)

    # ... and numbers whose own ways lead through these only, until they too have no more bits.
    def extend(number: int, known: int, slot: int, step: int) -> None:
        if slot not in occupied or len(found) >= slots // 3 * 2:
            return
        if step == 12:
            found.append(number)
            return
        for more in range(32 if known < 58 else 1):
            longer = number | more << known
            extend(longer, known + 5, (slot * 5 + 1 + (longer >> 5 * (step + 1))) % slots, step + 1)

    for start in taken:
        extend(start, bits, start, 0)
    assert len(set(map(hash, found))) > slots // 2
    return found


def test_keys_that_meet_in_a_dict_are_refused() -> None:
    keys = keys_that_meet()
    numbers = [b"\x1b" + key.to_bytes(8, "big") for key in keys]
    for data in (SET + array(numbers), b"\xba" + array(numbers)[1:5] + b"\0".join(numbers) + b"\0"):
        assert "hash values collide" in refusal(data)
    for value, type in ([keys, set[int]], [keys, frozenset], [{str(key): 0 for key in keys}, dict[int, int]]):
        assert "hash values that collide" in refusal(encode(value, format="json"), type)
    # A value that could not be read is not written.
    with pytest.raises(vmsnap.SerializationError, match=r"could not be read back: .*collide"):
        encode(dict.fromkeys(keys))


@pytest.mark.parametrize("shift", range(0, 52, 3))
def test_addresses_are_good_keys(shift: int) -> None:
    pages = {page << shift: page for page in range(5000)}
    assert decode(encode(pages)) == pages
    assert decode(encode({float(page): 0 for page in pages})) == dict.fromkeys(pages, 0)
    assert decode(encode(list(pages)), set[int]) == set(pages)


def test_a_list_of_many_equal_members_is_a_small_set() -> None:
    assert decode(encode([1, 2, 1.0] * 1000), set) == {1, 2}
    assert decode(encode([[1], [2]] * 1000), set[tuple[int, ...]]) == {(1,), (2,)}


def test_keys_of_a_map_that_share_a_hash_value_are_refused() -> None:
    keys = [b"\xc2\x4a" + (n * MODULUS).to_bytes(10, "big") for n in range(60_000)]
    assert "too many" in refusal(SET + array(keys))


# Arbitrary bytes ------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    [None, True, False, 0, -1, 2**64, -(2**80), 1.5, float("inf"), "täxt", b"bytes", [], {}],
    {"a": {1: [], (2, "x"): {}}, b"k": {1.5: frozenset({1, (2, 3)})}, "u": {UUID(int=7)}},
    [np.arange(3, dtype="<u4"), np.zeros((2, 0, 3)), np.array(1.5, "<f2"), np.ones((2, 2), ">i8")],
]
TEXTS: list[Any] = [[None, True, 0, -1.5, "t\u00e4xt\n\u2028", [], {}, {"a": {"b": [1, 2**63, 1e-300]}}], {"x": [[]]}]
ENCODED: list[tuple[bytes, Format]] = [
    *((encode(value), "cbor") for value in VALUES),
    *((encode(value, format="json"), "json") for value in TEXTS),
    *((json.dumps(value, indent=1).encode(), "json") for value in TEXTS),
]


def check(data: bytes, format: Format | None = None) -> None:
    """Decode a value that can be encoded again, or raise the one exception."""
    try:
        value = decode(data, format=format)
    except vmsnap.CorruptSnapshotError:
        refusal(data, format=format)
        return
    again = encode(value)
    assert encode(decode(again, format="cbor")) == again


@pytest.mark.parametrize(("data", "format"), ENCODED)
def test_a_value_that_is_cut_anywhere_is_refused(data: bytes, format: Format) -> None:
    for length in range(len(data)):
        refusal(data[:length], format=format)


@pytest.mark.parametrize(("data", "format"), ENCODED)
def test_any_bit_may_be_another(data: bytes, format: Format) -> None:
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        check(bytes(changed), format)


@settings(max_examples=500)
@given(st.binary(max_size=200), st.sampled_from([None, "cbor", "json"]))
@example(b"\xc0\x78\x19" + b"0001-01-01T00:00:00+23:59", "cbor")
def test_arbitrary_bytes(data: bytes, format: Format | None) -> None:
    check(data, format)


@settings(max_examples=500)
@given(st.data())
def test_spliced_values(data: st.DataObject) -> None:
    (one, format), (other, _) = data.draw(st.sampled_from(ENCODED)), data.draw(st.sampled_from(ENCODED))
    start, end = sorted(data.draw(st.tuples(*2 * [st.integers(0, len(one))])))
    first, last = sorted(data.draw(st.tuples(*2 * [st.integers(0, len(other))])))
    check(one[:start] + other[first:last] + one[end:], data.draw(st.sampled_from([None, format])))


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text()), inner)
            | st.frozensets(st.integers() | st.text() | st.frozensets(st.text()))
        ),
        max_leaves=20,
    )
)
def test_what_was_written_reads_back(value: Any) -> None:
    data = encode(value)
    again = decode(data, format="cbor")
    # As text, for NaN is not equal to itself.
    assert repr_of(again) == repr_of(value)
    assert encode(again) == data


def repr_of(value: Any) -> str:
    """Return a text that is the same for equal values."""
    if isinstance(value, dict):
        return str([(repr_of(key), repr_of(item)) for key, item in value.items()])
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(repr_of, value)))
    return str(list(map(repr_of, value))) if isinstance(value, list) else repr(value)


def test_a_set_in_a_set_is_written_alike_in_every_process() -> None:
    script = """
from vmsnap.serialization import encode
sets = [frozenset({"abc"[n:], "x" * n, b"y" * n}) for n in range(10)]
print(encode({frozenset(sets): 1, (sets[0],): set(sets)}).hex())
"""
    results = {run_python(script, PYTHONHASHSEED=str(seed)).stdout for seed in range(4)}
    assert len(results) == 1
    assert len(results.pop()) > 100


@settings(max_examples=400)
@given(st.binary(min_size=10, max_size=300))
def test_the_fuzz_target_finds_nothing(recipe: bytes) -> None:
    fuzz_target()(recipe)


def fuzz_target() -> Callable[[bytes], None]:
    """Return the function that `make fuzz` calls."""
    folder = str(Path(__file__).resolve().parents[1] / "fuzz")
    if folder not in sys.path:
        sys.path.append(folder)
    from values import try_recipe

    return try_recipe


# Memory --------------------------------------------------------------------------------------------------------------


def test_memory_is_in_proportion_to_what_was_read(tmp_path: Path) -> None:
    script = """
import resource, struct, sys
import numpy as np, vmsnap
from vmsnap.serialization import decode

def list_of(items, n):
    return b"\\x9a" + struct.pack(">I", n) + items * n

n = 200_000
inputs = [
    list_of(b"\\x80", n), list_of(b"\\xa0", n), list_of(b"\\xa1\\x00\\x80", n), list_of(b"\\xd9\\x01\\x02\\x80", n),
    list_of(b"\\xd8\\x40\\x40", n), list_of(b"\\x60", n),
    b"\\x5f" + b"\\x40" * n + b"\\xff", b"\\x7f" + b"\\x61a" * n + b"\\xff",
    list_of(b"\\x81" * 120 + b"\\x80", n // 120), b"[" + b"[]," * n + b"[]]", b"[" + b'{"":[]},' * n + b"[]]",
    b"\\x9b\\x00\\x00\\x00\\xff" + bytes(4), b"\\xbb" + b"\\x7f" * 8, b"\\x7b\\x00\\x00\\x01" + bytes(5),
    b"\\x9f" * (1 << 20), b"[" * (1 << 20), b'{"":' * (1 << 18),
    b"\\xd8\\x28\\x82\\x82\\x00\\x1b\\x3f" + b"\\xff" * 7 + b"\\xd8\\x40\\x40",
    b"\\xd8\\x28\\x82" + list_of(b"\\x01", n) + b"\\xd8\\x40\\x41\\x00",
    b"\\xa2" + 2 * (b"\\x7a" + struct.pack(">I", n) + b"\\x1b" * n + b"\\x00"),
]
decode(b"\\xd8\\x40\\x40")
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (in_use + (150 << 20),))
refused = 0
for data in inputs:
    for type in (None, np.ndarray):
        try:
            decode(data, type)
        except vmsnap.CorruptSnapshotError:
            refused += 1
texts = b"\\x82" + b"\\x79\\xff\\xff" + b"a" * 65535 + list_of(b"\\x61b", n)
for data in (texts, texts[3:]):
    try:
        decode(data, list[np.ndarray])
    except vmsnap.CorruptSnapshotError:
        refused += 1

# More than there is memory, and on disk not there at all.
with vmsnap.SnapshotWriter(sys.argv[1]).raw_fragment("ram") as fragment:
    fragment.write(b"x")
with open(sys.argv[1] + "/ram", "r+b") as file:
    file.truncate(1 << 40)
try:
    vmsnap.SnapshotReader(sys.argv[1]).read_fragment("ram")
except vmsnap.CorruptSnapshotError as error:
    assert "1099511627776 bytes are too many" in str(error), error
    refused += 1
print(refused)
"""
    result = run_python(script, tmp_path / "vm1")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_a_fragment_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "vm1"
    write(vmsnap.SnapshotWriter(root), "state", encode([0] * 1000))
    with vmsnap.SnapshotReader(root).raw_fragment("state") as fragment:
        (root / "state").write_bytes(b"")
        with pytest.raises(vmsnap.CorruptSnapshotError):
            fragment.read()


# Two decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "value"),
    [
        # As ciborium and serde_json write them: map keys in the order of fields, floats as short as they can be.
        (
            "a2646e616d6564637075306472656773831901001bffffffffffffffff20",
            {"name": "cpu0", "regs": [256, 2**64 - 1, -1]},
        ),
        ("a16556616c7565f93e00", {"Value": 1.5}),
        ("84f6f5fa47c35000fb3ff199999999999a", [None, True, 100000.0, 1.1]),
        ("c249010000000000000000", 2**64),
        ("9f0102ff", [1, 2]),
        (b'{"name":"cpu0","regs":[256,18446744073709551615,-1],"f":1.5e300}'.hex(), None),
        (b'["\\ud83d\\ude00","\\u0000",-0.0,1E+2]'.hex(), ["\U0001f600", "\0", -0.0, 100.0]),
    ],
)
def test_what_serde_writes_is_read(data: str, value: Any) -> None:
    raw = bytes.fromhex(data)
    assert decode(raw) == (json.loads(raw) if value is None else value)
