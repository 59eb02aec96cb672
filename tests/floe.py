"""Encrypted files made by hand, from docs/format.md alone: files that vmsnap must read, and files that it must refuse.

The opposite of examples/readers/python, and as independent of the library.
"""

import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

IV_BYTES = 32
NONCE_BYTES = 12
OVERHEAD_BYTES = 32
NOT_LAST = b"\xff\xff\xff\xff"

KEY_AAD = b"vmsnap/1/key"
KEY_CHUNK_BYTES = 1024


def fragment_aad(path: str) -> bytes:
    return b"vmsnap/1/fragment\x00" + path.encode()


def seal(
    key: bytes,
    aad: bytes,
    plaintext: bytes,
    chunk_size_bytes: int,
    *,
    iv: bytes | None = None,
    counted_nonces: bool = False,
    empty_last_segment: bool = False,
    one_nonce: bool = False,
) -> bytes:
    """Seal a message: section 2.

    `one_nonce`: for all segments, which protects nothing: repeated plaintext gives a file that can be compressed.
    `empty_last_segment`: one after full ones, which no writer should make and every reader accepts.
    """
    parameters = b"\x00\x00" + (chunk_size_bytes + OVERHEAD_BYTES).to_bytes(4, "big") + IV_BYTES.to_bytes(4, "big")
    iv = secrets.token_bytes(IV_BYTES) if iv is None else iv

    def kdf(secret: bytes, purpose: bytes, length: int) -> bytes:
        return hmac.digest(secret, parameters + iv + purpose + aad + b"\x01", "sha384")[:length]

    chunks = [plaintext[at : at + chunk_size_bytes] for at in range(0, len(plaintext), chunk_size_bytes)]
    if empty_last_segment or not chunks:
        chunks.append(b"")
    message_key = kdf(key, b"MESSAGE_KEY:", 48)
    segment_key = AESGCM(kdf(message_key, b"DEK:" + bytes(8), 32))  # for the first 2^20 positions
    segments = []
    for position, chunk in enumerate(chunks):
        last = position == len(chunks) - 1
        nonce = position.to_bytes(NONCE_BYTES, "big") if counted_nonces else secrets.token_bytes(NONCE_BYTES)
        nonce = bytes(NONCE_BYTES) if one_nonce else nonce
        length = (len(chunk) + OVERHEAD_BYTES).to_bytes(4, "big") if last else NOT_LAST
        segment_aad = position.to_bytes(8, "big") + (b"\x01" if last else b"\x00")
        segments.append(length + nonce + segment_key.encrypt(nonce, chunk, segment_aad))
    return parameters + iv + kdf(key, b"HEADER_TAG:", 32) + b"".join(segments)


# CBOR, as much as a payload can be made of ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """An item already encoded."""

    item: bytes


@dataclass(frozen=True)
class Pairs:
    """A map whose keys may come twice."""

    pairs: Sequence[tuple[object, object]]


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for info, length in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << 8 * length:
            return bytes([major << 5 | info]) + argument.to_bytes(length, "big")
    raise ValueError(argument)


def cbor(value: object) -> bytes:
    """Encode an item: section 4, definite lengths and shortest encodings."""
    match value:
        case Raw(item):
            return item
        case bool():
            return b"\xf5" if value else b"\xf4"
        case int() if value >= 0:
            return _head(0, value)
        case int():
            return _head(1, -1 - value)
        case bytes():
            return _head(2, len(value)) + value
        case str():
            return _head(3, len(value.encode())) + value.encode()
        case list():
            return _head(4, len(value)) + b"".join(map(cbor, value))
        case Pairs(pairs):
            return _head(5, len(pairs)) + b"".join(cbor(key) + cbor(item) for key, item in pairs)
        case Mapping():
            return cbor(Pairs(list(value.items())))
    raise TypeError(type(value))


DATA_KEY = bytes(range(100, 132))
SNAPSHOT_ID = bytes(range(16))


def payload_fields() -> dict[str, object]:
    """The fields of a payload that is as it should be, with DATA_KEY."""
    return {
        "format": "vmsnap-key",
        "version": 1,
        "snapshot_id": SNAPSHOT_ID,
        "data_key": DATA_KEY,
        "sealed": False,
        "requires": [],
    }


def key_metadata(key: bytes, payload: object) -> bytes:
    """The contents of ``enc_metadata``: section 4."""
    return seal(key, KEY_AAD, payload if isinstance(payload, bytes) else cbor(payload), KEY_CHUNK_BYTES)


# Payloads, authentic each of them ------------------------------------------------------------------------------------


def payload_with(**changes: object) -> dict[str, object]:
    return payload_fields() | changes


def payload_without(name: str) -> dict[str, object]:
    return {key: value for key, value in payload_fields().items() if key != name}


_PAIRS = b"".join(cbor(key) + cbor(value) for key, value in payload_fields().items())

MALFORMED_PAYLOADS: dict[str, object] = {
    **{f"no {name}": payload_without(name) for name in payload_fields()},
    **{f"{name} twice": Pairs([*payload_fields().items(), (name, value)]) for name, value in payload_fields().items()},
    "unknown key twice": Pairs([*payload_fields().items(), ("hint", 1), ("hint", 2)]),
    "another format": payload_with(format="vmsnap-manifest"),
    "format as bytes": payload_with(format=b"vmsnap-key"),
    "version as text": payload_with(version="1"),
    "version below zero": payload_with(version=-1),
    "version as float": payload_with(version=Raw(b"\xf9\x3c\x00")),
    "version tagged": payload_with(version=Raw(b"\xd8\x63\x01")),
    "version as bignum": payload_with(version=Raw(b"\xc2\x41\x01")),
    "short snapshot_id": payload_with(snapshot_id=bytes(15)),
    "snapshot_id as text": payload_with(snapshot_id="x" * 16),
    "short data_key": payload_with(data_key=bytes(31)),
    "long data_key": payload_with(data_key=bytes(33)),
    "data_key as text": payload_with(data_key="x" * 32),
    "data_key as numbers": payload_with(data_key=[1] * 32),
    "sealed as number": payload_with(sealed=0),
    "sealed as null": payload_with(sealed=Raw(b"\xf6")),
    "requires as text": payload_with(requires="zstd"),
    "requires numbers": payload_with(requires=[1]),
    "requires as empty bytes": payload_with(requires=b""),
    "requires as empty text": payload_with(requires=""),
    "requires as a map": payload_with(requires={}),
    "requires null": payload_with(requires=Raw(b"\xf6")),
    "a key of another kind": Pairs([*payload_fields().items(), (1, 2)]),
    "a text that is not UTF-8": payload_with(hint=Raw(b"\x61\xff")),
    "a key twice in a nested map": payload_with(hint=Pairs([("a", 1), ("a", 2)])),
    "a key of another kind in a nested map": payload_with(hint=[Pairs([(1, 2)])]),
    "nested 17 deep": payload_with(hint=Raw(b"\x81" * 15 + b"\x80")),
    "nested without end": payload_with(hint=Raw(b"\x81" * 100_000 + b"\x80")),
    "bytes after it": cbor(payload_fields()) + b"\x00",
    "cut off": cbor(payload_fields())[:-1],
    "nothing": b"",
    "a list": list(payload_fields().values()),
    "reserved head": payload_with(hint=Raw(b"\x1c")),
    "a map without length": Raw(b"\xbf" + _PAIRS + b"\xff"),
    "a long length of the map": Raw(b"\xb8" + len(payload_fields()).to_bytes(1, "big") + _PAIRS),
    "a long version": payload_with(version=Raw(b"\x18\x01")),
    "a data_key in parts": payload_with(data_key=Raw(b"\x5f" + cbor(DATA_KEY[:5]) + cbor(DATA_KEY[5:]) + b"\xff")),
    "a data_key with a long length": payload_with(data_key=Raw(b"\x59\x00\x20" + DATA_KEY)),
    "a format in parts": payload_with(format=Raw(b"\x7f" + cbor("vmsnap") + cbor("-key") + b"\xff")),
    "a key in parts": Pairs([(Raw(b"\x7f" + cbor("hi") + cbor("nt") + b"\xff"), 1), *payload_fields().items()]),
    "a key with a long length": Pairs([(Raw(b"\x78\x04hint"), 1), *payload_fields().items()]),
    "requires without length": payload_with(requires=Raw(b"\x9f\xff")),
    "a tag around it": Raw(b"\xc0" + cbor(payload_fields())),
    "a tag on a key": Pairs([(Raw(b"\xc0" + cbor("hint")), 1), *payload_fields().items()]),
    **{
        f"an unknown key with {what}": payload_with(hint=[{"deep": Raw(item)}])
        for what, item in {
            "a tag": b"\xc1\x00",
            "a long number": b"\x19\x00\xff",
            "a long negative number": b"\x38\x17",
            "an array without length": b"\x9f\xff",
            "a map without length": b"\xbf\xff",
            "bytes in parts": b"\x5f\xff",
            "undefined": b"\xf7",
            "an unknown simple value": b"\xe0",
            "a long simple value": b"\xf8\xff",
            "false in two bytes": b"\xf8\x14",
            "a break": b"\xff",
            "a text that is no UTF-8": b"\x62\xc0\x80",
            "a surrogate": b"\x63\xed\xa0\x80",
        }.items()
    },
}

# Unusual, and yet to be accepted.
UNUSUAL_PAYLOADS: dict[str, object] = {
    "the keys in another order": dict(reversed(payload_fields().items())),
    "unknown keys": payload_with(hint=[1, -1, {"a": [True, False, Raw(b"\xf6")]}, b"", ""], comment="more"),
    "an empty key": payload_with(**{"": 1}),
    "a key that is not ASCII": payload_with(**{"das Größte": 1}),
    "floats of all lengths": payload_with(
        hint=[Raw(b"\xf9\x3c\x00"), Raw(b"\xfa" + bytes(4)), Raw(b"\xfb" + bytes(8))]
    ),
    "not a number": payload_with(hint=Raw(b"\xf9\x7e\x00")),
    "large numbers": payload_with(
        hint=[23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -24, -25, -(2**64)]
    ),
    "the same key in two nested maps": payload_with(hint=[{"a": 1}, {"a": 2}]),
    "a known key in a nested map": payload_with(hint={"version": 2, "data_key": b""}),
    "nested 16 deep": payload_with(hint=Raw(b"\x81" * 14 + b"\x80")),
    "many kilobytes": payload_with(comment="x" * 5000, blob=bytes(5000)),
    "a hundred unknown keys": payload_with(**{f"hint {number}": number for number in range(100)}),
}
