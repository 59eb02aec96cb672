"""Damaged fragments, and entries that no snapshot can have."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import floe
import vmsnap
from make_golden import KEY
from support import HEADER_BYTES, pattern, segment_offset

from .case import AUTHENTICATION, CORRUPT, NOTE, Case, Corpus, edit, holds, refused, seal_fragment, write_payload

DATA = pattern(100, 3)  # four segments of 32, 32, 32 and 4 bytes
CHUNK = 32
LAST = segment_offset(3, CHUNK)


def _swapped(data: bytes) -> bytes:
    first, second, third = (segment_offset(index, CHUNK) for index in range(3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def _put(offset: int, replacement: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + replacement + data[offset + len(replacement) :]


def _flipped(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


#: By the name of the fragment: the change of its file, and the kind of error.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another AEAD": (_put(0, b"\x01"), CORRUPT),
    "another KDF": (_put(1, b"\x01"), CORRUPT),
    "segments of no length": (_put(2, bytes(4)), CORRUPT),
    "segments of 63 bytes": (_put(2, (63).to_bytes(4, "big")), CORRUPT),
    "segments over 64 MiB": (_put(2, ((64 << 20) + 33).to_bytes(4, "big")), CORRUPT),
    "segments of 4 GiB": (_put(2, b"\xff" * 4), CORRUPT),
    "another length of the IV": (_put(6, (31).to_bytes(4, "big")), CORRUPT),
    "segments of 65 bytes": (_put(2, (65).to_bytes(4, "big")), AUTHENTICATION),
    "segments of 64 MiB": (_put(2, ((64 << 20) + 32).to_bytes(4, "big")), AUTHENTICATION),
    "IV changed": (_flipped(10), AUTHENTICATION),
    "header tag changed": (_flipped(HEADER_BYTES - 1), AUTHENTICATION),
    "word before a segment changed": (_put(HEADER_BYTES, b"\x00\x00\x00\x40"), AUTHENTICATION),
    "word before the last changed": (_flipped(LAST + 3), AUTHENTICATION),
    "last marked as not the last": (_put(LAST, b"\xff" * 4), AUTHENTICATION),
    "nonce changed": (_flipped(segment_offset(1, CHUNK) + 4), AUTHENTICATION),
    "ciphertext changed": (_flipped(segment_offset(1, CHUNK) + 20), AUTHENTICATION),
    "tag of the first changed": (_flipped(segment_offset(1, CHUNK) - 1), AUTHENTICATION),
    "tag of the last changed": (_flipped(-1 + LAST + 36), AUTHENTICATION),
    "cut within the last segment": (lambda data: data[:-1], AUTHENTICATION),
    "cut to no segment's length": (lambda data: data[: LAST + 20], AUTHENTICATION),
    "cut after a segment": (lambda data: data[:LAST], AUTHENTICATION),
    "a segment removed": (lambda data: data[:HEADER_BYTES] + data[segment_offset(1, CHUNK) :], AUTHENTICATION),
    "a segment repeated": (lambda data: data[: segment_offset(1, CHUNK)] + data[HEADER_BYTES:], AUTHENTICATION),
    "segments swapped": (_swapped, AUTHENTICATION),
    "a byte more": (lambda data: data + b"\0", AUTHENTICATION),
    "a segment more": (lambda data: data + data[LAST:], AUTHENTICATION),
    "zeros at the end": (lambda data: data + bytes(64), AUTHENTICATION),
    "the header alone": (lambda data: data[:HEADER_BYTES], CORRUPT),
    "105 bytes": (lambda data: data[:105], CORRUPT),
    "five bytes": (lambda data: data[:5], CORRUPT),
    "empty": (lambda data: b"", CORRUPT),
    "plain": (lambda data: DATA * 2, CORRUPT),
    "plain zeros": (lambda data: bytes(500), CORRUPT),
}


def add_fragments(corpus: Corpus) -> None:
    """One encrypted snapshot with a fragment for each kind of damage, and listings that are refused."""
    case = Case("fragments damaged, moved and swapped beside sound ones", KEY, verifies=False)
    root = corpus.add("damaged-fragments", case)
    writer = vmsnap.SnapshotWriter(root, key=KEY)

    def write(writer: vmsnap.SnapshotWriter, name: str, data: bytes = DATA) -> None:
        with writer.raw_fragment(name, chunk_size_bytes=CHUNK) as fragment:
            fragment.write(data)

    for name, (damage, kind) in DAMAGE.items():
        write(writer, name)
        edit(root / name, damage)
        case.fragments[name] = refused(kind)
    for name in ("renamed from", "moved", "swapped", "swapped back", "sound"):
        write(writer, name)
        case.fragments[name] = refused(AUTHENTICATION)
    case.fragments["sound"] = holds(DATA)
    write(writer.add_namespace("place"), "sound", DATA[:50])
    case.fragments["place/sound"] = holds(DATA[:50])
    (root / "renamed from").rename(root / "renamed")
    (root / "moved").rename(root / "place/moved")
    case.fragments["renamed"] = case.fragments.pop("renamed from")
    case.fragments["place/moved"] = case.fragments.pop("moved")
    (root / "swapped").rename(root / "other")
    (root / "swapped back").rename(root / "swapped")
    (root / "other").rename(root / "swapped back")
    with tempfile.TemporaryDirectory() as folder:
        write(vmsnap.SnapshotWriter(Path(folder, "vm"), key=KEY), "of another snapshot")
        shutil.copy(Path(folder, "vm/of another snapshot"), root)
    case.fragments["of another snapshot"] = refused(AUTHENTICATION)

    case = Case("an empty last segment after full ones, which no writer makes", KEY)
    root = corpus.add("empty-last-segment", case)
    write_payload(root, floe.payload_fields())
    for length in (32, 96):
        seal_fragment(root, f"{length} bytes", pattern(length), empty_last_segment=True)
        case.fragments[f"{length} bytes"] = holds(pattern(length))

    case = Case(
        "names that are reserved are in no list, whatever they are", fragments={"note": holds(NOTE)}, verifies=False
    )
    root = corpus.add("reserved-names", case)
    root.mkdir()
    (root / "note").write_bytes(NOTE)
    for name in (".vmsnap-0123456789abcdef", "ENC_METADATA", "Vmsnap_Manifest"):
        (root / name).write_bytes(b"whatever")
    (root / ".vmsnap").symlink_to("note")
    (root / "place").mkdir()
    (root / "place/enc_metadata").write_bytes(b"whatever")

    entries: dict[str, Callable[[Path], object]] = {
        "link-to-fragment": lambda root: (root / "link").symlink_to("note"),
        "link-to-nothing": lambda root: (root / "link").symlink_to("nothing"),
        "link-to-folder": lambda root: (root / "link").symlink_to(".."),
        "pipe": lambda root: os.mkfifo(root / "pipe"),
        "backslash-in-name": lambda root: (root / "back\\slash").write_bytes(b""),
        "name-without-utf-8": lambda root: Path(os.fsdecode(bytes(root) + b"/caf\xe9")).write_bytes(b""),
    }
    for name, change in entries.items():
        for base, key, suffix in (("small", KEY, ""), ("reserved-names", None, "-plain")):
            about = f"an entry that no snapshot can have: {name.replace('-', ' ')}"
            corpus.damaged(f"{name}{suffix}", base, change, Case(about, key, error=CORRUPT))
