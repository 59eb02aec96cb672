"""FLOE as vmsnap uses it: one ciphertext, opened and read a segment at a time. Section 2 of ``docs/format.md``."""

from __future__ import annotations

import hmac
import io
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32

# A header is 10 bytes of parameters, the IV, the header tag.
PARAMETERS = struct.Struct(">BBII")
FLOE_IV_BYTES = 32
HEADER_TAG_BYTES = 32
HEADER_BYTES = PARAMETERS.size + FLOE_IV_BYTES + HEADER_TAG_BYTES
# A segment is a length, a nonce, the ciphertext, a tag.
LENGTH_BYTES = 4
NONCE_BYTES = 12
TAG_BYTES = 16
SEGMENT_OVERHEAD_BYTES = LENGTH_BYTES + NONCE_BYTES + TAG_BYTES
NOT_LAST = 0xFFFFFFFF
MAX_SEGMENTS = 1 << 40
POSITIONS_PER_KEY = 1 << 20


class FormatError(Exception):
    """What is on disk is not a snapshot that this reader reads, or not the one that was asked for.

    Parameters
    ----------
    kind
        One of those in ``examples/readers/README.md``: ``"corrupt"``, ``"unsupported"``, ``"key"`` …
    text
        What is wrong, and where.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class AuthenticationError(FormatError):
    """A tag does not fit: the key is wrong, or the file was damaged, changed, moved or swapped."""

    def __init__(self, text: str) -> None:
        super().__init__("authentication", text)


def floe_kdf(key: bytes, parameters_and_iv: bytes, purpose: bytes, aad: bytes, length: int) -> bytes:
    """Derive a key or tag: HKDF-Expand-SHA-384 for at most 48 bytes, which is one HMAC (RFC 5869, section 2.3)."""
    return hmac.digest(key, parameters_and_iv + purpose + aad + b"\x01", "sha384")[:length]


def segment_aad(position: int, is_last: bool) -> bytes:
    """What binds a segment to its place."""
    return position.to_bytes(8, "big") + (b"\x01" if is_last else b"\x00")


class FloeFile:
    """One FLOE ciphertext whose header and last segment were found authentic.

    Parameters
    ----------
    stream
        The ciphertext, seekable.
    key
        The FLOE key, 32 bytes.
    aad
        The FLOE AAD.
    what
        How errors name the ciphertext.
    segment_lengths
        The segment lengths that are accepted.
    """

    def __init__(self, stream: BinaryIO, key: bytes, aad: bytes, what: str, segment_lengths: range) -> None:
        self._stream = stream
        self._what = what
        self._aad = aad
        self._cipher: tuple[int, AESGCM] | None = None

        file_size = stream.seek(0, os.SEEK_END)
        if file_size < HEADER_BYTES + SEGMENT_OVERHEAD_BYTES:
            raise FormatError("corrupt", f"{what}: too short for a FLOE ciphertext: truncated, or not encrypted")
        header = self._read_at(0, HEADER_BYTES)
        aead_id, kdf_id, self._segment_length, iv_length = PARAMETERS.unpack_from(header)
        if (aead_id, kdf_id, iv_length) != (0, 0, FLOE_IV_BYTES):
            raise FormatError("corrupt", f"{what}: no FLOE header: damaged, or not encrypted")
        if self._segment_length not in segment_lengths:
            raise FormatError("corrupt", f"{what}: segment length {self._segment_length} is not allowed here")

        self._parameters_and_iv, header_tag = header[:-HEADER_TAG_BYTES], header[-HEADER_TAG_BYTES:]
        if not hmac.compare_digest(self._kdf(key, b"HEADER_TAG:", HEADER_TAG_BYTES), header_tag):
            raise AuthenticationError(f"{what}: wrong key, or the header was damaged, or it is not in its own place")
        self._message_key = self._kdf(key, b"MESSAGE_KEY:", 48)

        body_size = file_size - HEADER_BYTES
        self._segment_count = -(-body_size // self._segment_length)
        self._last_length = body_size - (self._segment_count - 1) * self._segment_length
        if self._last_length < SEGMENT_OVERHEAD_BYTES or self._segment_count > MAX_SEGMENTS:
            raise AuthenticationError(f"{what}: no FLOE ciphertext has this length: truncated or extended")
        self.chunk_size: int = self._segment_length - SEGMENT_OVERHEAD_BYTES
        self.size: int = body_size - self._segment_count * SEGMENT_OVERHEAD_BYTES
        self.segment(self._segment_count - 1)

    def segment(self, position: int) -> bytes:
        """Return the plaintext of one segment, after its tag was checked."""
        is_last = position == self._segment_count - 1
        length = self._last_length if is_last else self._segment_length
        data = memoryview(self._read_at(HEADER_BYTES + position * self._segment_length, length))
        if int.from_bytes(data[:LENGTH_BYTES], "big") != (length if is_last else NOT_LAST):
            raise AuthenticationError(
                f"{self._what}: wrong length in front of segment {position}: truncated or damaged"
            )
        nonce, sealed = data[LENGTH_BYTES : LENGTH_BYTES + NONCE_BYTES], data[LENGTH_BYTES + NONCE_BYTES :]
        try:
            return self._cipher_at(position).decrypt(nonce, sealed, segment_aad(position, is_last))
        except InvalidTag:
            raise AuthenticationError(f"{self._what}: segment {position}: wrong key, or damaged") from None

    def pieces(self) -> Iterator[bytes]:
        """Yield the plaintext, a segment at a time."""
        for position in range(self._segment_count):
            yield self.segment(position)

    def _kdf(self, key: bytes, purpose: bytes, length: int) -> bytes:
        return floe_kdf(key, self._parameters_and_iv, purpose, self._aad, length)

    def _cipher_at(self, position: int) -> AESGCM:
        masked = position & ~(POSITIONS_PER_KEY - 1)
        if self._cipher is None or self._cipher[0] != masked:
            segment_key = self._kdf(self._message_key, b"DEK:" + masked.to_bytes(8, "big"), KEY_BYTES)
            self._cipher = (masked, AESGCM(segment_key))
        return self._cipher[1]

    def _read_at(self, offset: int, length: int) -> bytes:
        self._stream.seek(offset)
        data = self._stream.read(length)
        if len(data) != length:
            raise AuthenticationError(f"{self._what}: became shorter while it was read")
        return data


def floe_decrypt(key: bytes, aad: bytes, ciphertext: bytes) -> bytes:
    """Decrypt one whole FLOE ciphertext, with whatever segment length it has.

    Parameters
    ----------
    key
        The FLOE key, 32 bytes; another length is a `ValueError`.
    aad
        The FLOE AAD.
    ciphertext
        Header and all segments.

    Raises
    ------
    FormatError
        The bytes are not a FLOE ciphertext; `AuthenticationError` where a tag does not fit.
    """
    require_key_length(key)
    any_segment_length = range(SEGMENT_OVERHEAD_BYTES + 1, NOT_LAST)
    return b"".join(FloeFile(io.BytesIO(ciphertext), key, aad, "ciphertext", any_segment_length).pieces())


def require_key_length(key: bytes) -> None:
    """Refuse a key that is not 32 bytes long."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes, not {KEY_BYTES}")
