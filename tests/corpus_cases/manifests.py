"""Manifests, and fragments that are not as a manifest says."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import floe
import vmsnap
from floe import Pairs, Raw, cbor
from make_golden import KEY
from support import HEADER_BYTES

from .case import (
    AUTHENTICATION,
    CORRUPT,
    NOTE,
    UNSUPPORTED,
    Case,
    Corpus,
    edit,
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
from .fragments import CHUNK


def manifest_of(root: Path, paths: list[str]) -> dict[str, Any]:
    """The manifest of fragments that `seal_fragment` wrote, one key each that a case may change."""
    fragments = {}
    for path in sorted(paths):
        file = (root / path).read_bytes()
        segments = -(-(len(file) - HEADER_BYTES) // (CHUNK + 32))
        fragments[path] = {
            "size": len(file) - HEADER_BYTES - 32 * segments,
            "stored_size": len(file),
            "chunk_size": CHUNK,
            "floe_header_tag": file[42:HEADER_BYTES],
        }
    return {
        "format": "vmsnap-manifest",
        "version": 1,
        "snapshot_id": floe.SNAPSHOT_ID,
        "created": "2026-11-26T12:00:00Z",
        "generator": "by hand",
        "encrypted": True,
        "requires": [],
        "namespaces": ["place"],
        "fragments": fragments,
    }


def sealed_by_hand(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A sealed snapshot with two fragments, its manifest changed, which `change` may also return whole."""
    write_payload(root, floe.payload_with(sealed=True))
    seal_fragment(root, "note", NOTE)
    seal_fragment(root, "place/note", NOTE)
    manifest = manifest_of(root, ["note", "place/note"])
    changed = change(manifest)
    item = changed if isinstance(changed, bytes) else cbor(manifest if changed is None else changed)
    (root / "vmsnap_manifest").write_bytes(floe.seal(floe.DATA_KEY, b"vmsnap/1/manifest", item, 65536))


def _set(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: {**manifest, **changes}


def _entry(**changes: object) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        entry = {**manifest["fragments"]["note"], **changes}
        manifest["fragments"]["note"] = {key: value for key, value in entry.items() if value is not None}

    return change


MALFORMED_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": _set(format="vmsnap-key"),
    "another snapshot's id": _set(snapshot_id=bytes(16)),
    "encrypted false": _set(encrypted=False),
    "created yesterday": _set(created="yesterday"),
    "created with an offset": _set(created="2026-11-26T12:00:00+00:00"),
    "created in month 13": _set(created="2026-13-26T12:00:00Z"),
    "generator missing": lambda manifest: {key: value for key, value in manifest.items() if key != "generator"},
    "namespace twice": _set(namespaces=["place", "place"]),
    "namespace not listed": _set(namespaces=[]),
    "namespace above not listed": _set(namespaces=["place", "a/b"]),
    "fragment and namespace": _set(namespaces=["place", "note"]),
    "path upwards": _set(namespaces=["place", ".."]),
    "path absolute": _set(namespaces=["place", "/etc"]),
    "path empty": _set(namespaces=["place", ""]),
    "path reserved": _set(namespaces=["place", "Enc_Metadata"]),
    "sizes do not fit": _entry(size=41),
    "size negative": _entry(size=-1),
    "size missing": _entry(size=None),
    "chunk size of no fragment": _entry(chunk_size=31),
    "chunk size missing": _entry(chunk_size=None),
    "header tag short": _entry(floe_header_tag=bytes(31)),
    "blake3 in it": _entry(blake3=bytes(32)),
    "blake3 null": _entry(blake3=Raw(b"\xf6")),
    "fragments a list": _set(fragments=[]),
    "without length": lambda manifest: (
        b"\xbf" + b"".join(cbor(key) + cbor(value) for key, value in manifest.items()) + b"\xff"
    ),
    "key twice": lambda manifest: Pairs([*manifest.items(), ("version", 1)]),
    "bytes after it": lambda manifest: cbor(manifest) + b"\0",
}


def add_manifests(corpus: Corpus) -> None:
    """Manifests that are authentic, and files that are not as they say."""
    fragments = {"note": holds(NOTE), "place/note": holds(NOTE)}

    def right(manifest: dict[str, Any]) -> object:
        entries = {path: {"hint": 1, **entry} for path, entry in manifest["fragments"].items()}
        return dict(reversed((manifest | {"hint": [1.5], "fragments": entries}).items())) | {
            "hint": Raw(b"\xf9\x3c\x00")
        }

    case = Case("a manifest in another order, with keys that nobody knows", KEY, fragments=dict(fragments))
    sealed_by_hand(corpus.add("manifest-unusual", case), right)
    for name, change in MALFORMED_MANIFESTS.items():
        case = Case(f"a malformed manifest: {name}", KEY, error=CORRUPT)
        root = corpus.add(f"manifest-{slug(name).replace(chr(39), '')}", case)
        sealed_by_hand(root, change)
        # It is refused before any of them is looked for.
        (root / "note").unlink()
        shutil.rmtree(root / "place")
    for name, change in {
        "later-version": _set(version=2, fragments=[]),
        "later-feature": _set(requires=["zstd"]),
    }.items():
        case = Case(f"a manifest of a later vmsnap: {name}", KEY, error=UNSUPPORTED)
        sealed_by_hand(corpus.add(f"manifest-{name}", case), change)

    case = Case("encrypted and sealed: what the following begin with", KEY, fragments=dict(fragments))
    with vmsnap.create(corpus.add("small-sealed", case), key=KEY) as writer:
        for namespace in (writer, writer.add_namespace("place")):
            with namespace.raw_fragment("note", chunk_size_bytes=32) as fragment:
                fragment.write(NOTE)

    manifest = partial(edited, "vmsnap_manifest")

    def of_another(root: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with vmsnap.create(Path(folder, "vm"), key=KEY) as writer:
                writer.write_fragment("note", 1)
            shutil.copy(Path(folder, "vm/vmsnap_manifest"), root)

    for name, about, change, error in (
        (
            "manifest-changed",
            "a bit of the manifest is another",
            lambda root: flip(root / "vmsnap_manifest", 200),
            AUTHENTICATION,
        ),
        ("manifest-cut", "the manifest lacks its last byte", manifest(lambda data: data[:-1]), AUTHENTICATION),
        ("manifest-of-another", "the manifest is another snapshot's", of_another, AUTHENTICATION),
        ("manifest-empty", "the manifest is empty", manifest(lambda _: b""), AUTHENTICATION),
        (
            "manifest-plain",
            "the manifest is not encrypted",
            manifest(lambda _: cbor({"format": "vmsnap-manifest"}) * 10),
            AUTHENTICATION,
        ),
        ("manifest-removed-later", "the manifest was removed", remove("vmsnap_manifest"), CORRUPT),
        ("manifest-link", "the manifest is a symbolic link", linked("vmsnap_manifest"), CORRUPT),
    ):
        corpus.damaged(name, "small-sealed", change, Case(about, KEY, error=error))

    case = Case(
        "an authentic fragment, not the one in the manifest", KEY, fragments=fragments | {"note": refused(CORRUPT)}
    )
    case.verifies = False
    root = corpus.add("not-the-listed-fragment", case)
    sealed_by_hand(root, lambda manifest: None)
    # As if it had been written once more with the same data key.
    seal_fragment(root, "note", NOTE)

    for name, about, change, note in (
        ("listed-fragment-missing", "a fragment was removed after sealing", remove("note"), refused(CORRUPT)),
        (
            "listed-fragment-longer",
            "a fragment grew after sealing",
            lambda root: edit(root / "note", lambda data: data + b"\0"),
            refused(CORRUPT),
        ),
        (
            "listed-fragment-cut",
            "a fragment was cut after sealing",
            lambda root: edit(root / "note", lambda data: data[:110]),
            refused(CORRUPT),
        ),
        (
            "listed-fragment-changed",
            "a bit of a fragment is another",
            lambda root: flip(root / "note", 95),
            refused(AUTHENTICATION),
        ),
        (
            "listed-fragment-tag",
            "the header tag of a fragment is another",
            lambda root: flip(root / "note", 50),
            refused(CORRUPT),
        ),
        (
            "listed-fragment-iv",
            "the IV of a fragment is another",
            lambda root: flip(root / "note", 20),
            refused(AUTHENTICATION),
        ),
        ("listed-fragment-link", "a fragment is a link to itself elsewhere", linked("note"), refused(CORRUPT)),
        (
            "unlisted-fragment",
            "a fragment was added after sealing",
            lambda root: shutil.copy(root / "note", root / "more"),
            holds(NOTE),
        ),
    ):
        case = Case(about, KEY, fragments=fragments | {"note": note}, verifies=False)
        corpus.damaged(name, "small-sealed", change, case)

    case = Case("plain and sealed: what the following begin with", fragments={"note": holds(NOTE)})
    with vmsnap.create(corpus.add("small-plain-sealed", case)) as writer, writer.raw_fragment("note") as fragment:
        fragment.write(NOTE)
    changed = NOTE[:-1] + b"!"
    for name, about, change, note in (
        (
            "plain-changed",
            "a plain fragment has other bytes, which BLAKE3 alone tells",
            lambda root: (root / "note").write_bytes(changed),
            holds(changed),
        ),
        (
            "plain-longer",
            "a plain fragment grew after sealing",
            lambda root: (root / "note").write_bytes(NOTE * 2),
            refused(CORRUPT),
        ),
        ("plain-missing", "a plain fragment was removed after sealing", remove("note"), refused(CORRUPT)),
    ):
        corpus.damaged(name, "small-plain-sealed", change, Case(about, fragments={"note": note}, verifies=False))
    for name, about, change in (
        ("plain-manifest-cut", "the manifest of a plain snapshot lacks its last byte", lambda data: data[:-1]),
        ("plain-manifest-text", "the manifest of a plain snapshot is a text", lambda _: b"note"),
        (
            "plain-manifest-floe",
            "the manifest of a plain snapshot is encrypted",
            lambda _: (corpus.folder / "small-sealed/vmsnap_manifest").read_bytes(),
        ),
        (
            "plain-manifest-null",
            "the manifest of a plain snapshot has a key of encrypted ones, whose value is null",
            lambda data: data.replace(b"\xa3\x64size", b"\xa4\x6achunk_size\xf6\x64size"),
        ),
    ):
        corpus.damaged(name, "small-plain-sealed", manifest(change), Case(about, error=CORRUPT))


def add_beside(corpus: Corpus) -> None:
    """Add sealed snapshots with foreign files beside the fragments, or instead of them."""
    fragments = {"note": holds(NOTE), "place/note": holds(NOTE)}
    beside: dict[str, Callable[[Path], object]] = {
        "link": lambda root: (root / "link").symlink_to("/etc/passwd"),
        "pipe": lambda root: os.mkfifo(root / "place/pipe"),
        "name-without-utf-8": lambda root: Path(os.fsdecode(bytes(root) + b"/caf\xe9")).write_bytes(b""),
        "folder": lambda root: (root / "more/and more").mkdir(parents=True),
    }
    for name, change in beside.items():
        case = Case(f"sealed, and beside it something that is not listed: a {name}", KEY, fragments=dict(fragments))
        case.verifies = False
        corpus.damaged(f"unlisted-{name}", "small-sealed", change, case)

    for name, change in {"link": linked("place"), "pipe": instead_of("place", os.mkfifo)}.items():
        case = Case(f"a listed namespace is a {name}", KEY, fragments=fragments | {"place/note": refused(CORRUPT)})
        case.verifies = False
        corpus.damaged(f"listed-namespace-{name}", "small-sealed", change, case)

    case = Case("a manifest of more than one segment", KEY, fragments=dict(fragments))
    sealed_by_hand(corpus.add("manifest-long", case), _set(hint=bytes(70_000)))

    case = Case("guest memory of which a segment was changed", KEY, verifies=False)
    base = corpus.cases["memory-lz4-encrypted"]
    case.fragments = base.fragments | {"mem": refused(AUTHENTICATION)}
    case.memory = {"": refused(AUTHENTICATION)}
    corpus.damaged("memory-changed", "memory-lz4-encrypted", lambda root: flip(root / "mem", 300), case)
