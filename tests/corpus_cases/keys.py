"""Key metadata: authentic and malformed, changed, another snapshot's, or opened with the wrong key."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import floe
import vmsnap
from floe import Raw
from make_golden import IDENTITY, KEY, PASSPHRASE

from .case import (
    AUTHENTICATION,
    CORRUPT,
    NO_KEY,
    NOT_ENCRYPTED,
    NOTE,
    OTHER_KEY,
    UNSUPPORTED,
    Case,
    Corpus,
    edited,
    flip,
    holds,
    instead_of,
    linked,
    refused,
    remove,
    seal_fragment,
    slug,
    write_payload,
)

UNUSUAL_PAYLOADS = (
    "the keys in another order",
    "unknown keys",
    "floats of all lengths",
    "nested 16 deep",
    "many kilobytes",
)

#: Of floe.MALFORMED_PAYLOADS, one of each kind.
MALFORMED_PAYLOADS = (
    "no data_key",
    "no requires",
    "version twice",
    "a key twice in a nested map",
    "another format",
    "version as text",
    "version as float",
    "short data_key",
    "data_key as text",
    "sealed as number",
    "requires as text",
    "a key of another kind",
    "a text that is not UTF-8",
    "nested 17 deep",
    "nested without end",
    "bytes after it",
    "cut off",
    "nothing",
    "a list",
    "a map without length",
    "a long version",
    "a data_key in parts",
    "a tag around it",
    "an unknown key with undefined",
    "an unknown key with a break",
    "an unknown key with a surrogate",
)

#: A length of 2^60, of which there is nothing.
ANNOUNCED = {
    "bytes that are only announced": floe.payload_with(hint=Raw(b"\x5b\x10" + bytes(7))),
    "an array that is only announced": floe.payload_with(hint=Raw(b"\x9b\x10" + bytes(7))),
}


#: A change of the key metadata of a snapshot.
key_file = partial(edited, "enc_metadata")


def add_payloads(corpus: Corpus) -> None:
    """Key metadata that are authentic."""
    fragments = {"note": holds(NOTE)}
    for name in UNUSUAL_PAYLOADS:
        root = corpus.add(
            f"payload-{slug(name)}", Case(f"key metadata, unusual but right: {name}", KEY, fragments=dict(fragments))
        )
        write_payload(root, floe.UNUSUAL_PAYLOADS[name])
        seal_fragment(root, "note", NOTE)
    malformed = {name: floe.MALFORMED_PAYLOADS[name] for name in MALFORMED_PAYLOADS} | ANNOUNCED
    for name, payload in malformed.items():
        write_payload(
            corpus.add(f"payload-{slug(name)}", Case(f"key metadata, malformed: {name}", KEY, error=CORRUPT)), payload
        )
    for name, payload in {
        "later-version": floe.payload_with(version=2, data_key=b"another length"),
        "later-feature": floe.payload_with(requires=["zstd"]),
    }.items():
        case = Case(f"key metadata of a later vmsnap: {name}", KEY, error=UNSUPPORTED)
        write_payload(corpus.add(f"payload-{name}", case), payload)
    case = Case("the key metadata say that it is sealed, and there is no manifest", KEY, error=CORRUPT)
    root = corpus.add("manifest-removed", case)
    write_payload(root, floe.payload_with(sealed=True))
    seal_fragment(root, "note", NOTE)


def add_key_files(corpus: Corpus) -> None:
    """Key metadata changed, and other keys than the right one."""
    base = Case("encrypted with a key: what the following begin with", KEY, fragments={"note": holds(NOTE)})
    root = corpus.add("small", base)
    with vmsnap.SnapshotWriter(root, key=KEY).raw_fragment("note", chunk_size_bytes=32) as fragment:
        fragment.write(NOTE)

    for name, about, change, key, error in (
        ("key-wrong", "opened with another key", lambda root: None, OTHER_KEY, AUTHENTICATION),
        ("key-none", "opened without a key", lambda root: None, None, NO_KEY),
        ("key-file-removed", "enc_metadata was removed", remove("enc_metadata"), KEY, NOT_ENCRYPTED),
        ("key-file-empty", "enc_metadata is empty", key_file(lambda _: b""), KEY, CORRUPT),
        ("key-file-text", "enc_metadata is a text", key_file(lambda _: b"no key at all\n" * 10), KEY, CORRUPT),
        ("key-file-aead", "enc_metadata has another AEAD", key_file(lambda data: b"\x01" + data[1:]), KEY, CORRUPT),
        (
            "key-file-segments",
            "enc_metadata has segments of another length",
            key_file(lambda data: data[:4] + b"\x08\x20" + data[6:]),
            KEY,
            CORRUPT,
        ),
        ("key-file-cut", "enc_metadata has 50 bytes left", key_file(lambda data: data[:50]), KEY, AUTHENTICATION),
        ("key-file-cut-tag", "enc_metadata lacks its last byte", key_file(lambda data: data[:-1]), KEY, AUTHENTICATION),
        (
            "key-file-longer",
            "enc_metadata has a byte too many",
            key_file(lambda data: data + b"\0"),
            KEY,
            AUTHENTICATION,
        ),
        (
            "key-file-changed",
            "a bit of enc_metadata is another",
            lambda root: flip(root / "enc_metadata", -1),
            KEY,
            AUTHENTICATION,
        ),
        ("key-file-link", "enc_metadata is a symbolic link", linked("enc_metadata"), KEY, CORRUPT),
        ("key-file-pipe", "enc_metadata is a pipe", instead_of("enc_metadata", os.mkfifo), KEY, CORRUPT),
        (
            "key-file-long",
            "enc_metadata has more than 1 MiB",
            key_file(lambda data: data + bytes(1 << 20)),
            KEY,
            CORRUPT,
        ),
        (
            "key-file-age-v2",
            "enc_metadata is of a later version of age",
            key_file(lambda _: b"age-encryption.org/v2\n"),
            KEY,
            UNSUPPORTED,
        ),
    ):
        corpus.damaged(name, "small", change, Case(about, key, error=error))

    def other_snapshot(root: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            vmsnap.SnapshotWriter(Path(folder, "vm"), key=KEY)
            shutil.copy(Path(folder, "vm/enc_metadata"), root / "enc_metadata")

    corpus.damaged(
        "key-file-of-another",
        "small",
        other_snapshot,
        Case("enc_metadata is another snapshot's", KEY, fragments={"note": refused(AUTHENTICATION)}, verifies=False),
    )
    case = Case("a key is given, and it is plain", KEY, error=NOT_ENCRYPTED)
    corpus.damaged("key-for-plain", "plain-json", lambda root: None, case)
    # One file is enough of it.
    for entry in (corpus.folder / "key-for-plain").iterdir():
        if entry.name != "clock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


#: For tests, in clear, as `IDENTITY`.
OTHER_IDENTITY = "AGE-SECRET-KEY-184JMZMVQH3E6U0PSL869004Y3U2NYV7R30EU99CSEDNPH02YUVFSZW44VU"


def _other_mac(data: bytes) -> bytes:
    """Another character in the line that ends the header."""
    at = data.index(b"\n--- ") + 10
    return data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]


def _slower(data: bytes) -> bytes:
    return re.sub(rb"(?m)^(-> scrypt \S+) \d+$", rb"\1 30", data, count=1)


def add_wrapped(corpus: Corpus) -> None:
    """Add cases with key metadata of age that is damaged, or opened with a key that does not fit."""

    nothing: Callable[[Path], object] = lambda root: None  # noqa: E731 (one of several)
    identity, passphrase = {"identity": IDENTITY}, {"passphrase": PASSPHRASE}
    for name, base, about, change, wrapping, error in (
        (
            "age-wrong-identity",
            "age",
            "opened with another identity",
            nothing,
            {"identity": OTHER_IDENTITY},
            AUTHENTICATION,
        ),
        (
            "age-wrong-passphrase",
            "passphrase",
            "opened with another passphrase",
            nothing,
            {"passphrase": "x"},
            AUTHENTICATION,
        ),
        (
            "age-changed",
            "age",
            "the last bit of what age encrypted is another",
            lambda root: flip(root / "enc_metadata", -1),
            identity,
            AUTHENTICATION,
        ),
        (
            "age-mac-changed",
            "age",
            "a bit of the header's MAC is another",
            key_file(_other_mac),
            identity,
            AUTHENTICATION,
        ),
        (
            "age-cut",
            "age",
            "what age encrypted lacks its last byte",
            key_file(lambda data: data[:-1]),
            identity,
            AUTHENTICATION,
        ),
        ("age-header-cut", "age", "the header is cut off", key_file(lambda data: data[:60]), identity, CORRUPT),
        (
            "age-header-damaged",
            "age",
            "a line of the header is none",
            key_file(lambda data: data.replace(b"-> ", b",> ", 1)),
            identity,
            CORRUPT,
        ),
        (
            "age-for-a-passphrase",
            "passphrase",
            "opened with an identity, and it has a passphrase",
            nothing,
            identity,
            NO_KEY,
        ),
        (
            "age-for-recipients",
            "age",
            "opened with a passphrase, and it is for recipients",
            nothing,
            passphrase,
            NO_KEY,
        ),
        ("age-work-factor", "passphrase", "a work factor that takes hours", key_file(_slower), passphrase, UNSUPPORTED),
    ):
        corpus.damaged(name, base, change, Case(about, wrapping=wrapping, error=error))
