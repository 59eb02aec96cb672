"""Archives, sound and damaged. They are packed by the Python reader, of the snapshots of other cases."""

import tarfile
import tempfile
from pathlib import Path

import floe
import vmsnap
from floe import cbor
from independent import vmsnap_packer, vmsnap_reader
from make_golden import KEY

from .archive_changes import (
    BLOCK,
    FIELDS,
    FIRST_FIELDS,
    GLOBAL_HEADER_BYTES,
    PAX,
    WHOLE,
    Change,
    exchanged,
    in_data,
    in_header,
    in_padding,
    in_pax,
    members_of,
)
from .case import (
    AUTHENTICATION,
    CORRUPT,
    NO_KEY,
    NOT_ENCRYPTED,
    NOTE,
    OTHER_KEY,
    Case,
    Corpus,
    Result,
    holds,
    refused,
    seal_fragment,
    slug,
)
from .manifests import manifest_of, sealed_by_hand
from .sound import write_memory

#: The base of most damaged archives: small-sealed, whose fragments `note` and `place/note` are one block each.
ENCRYPTED, PLAIN, WITH_PAX = "archive-encrypted", "archive-plain", "archive-pax"


def pack(archive: Path, root: Path, key: bytes | None) -> None:
    """Make an archive. Keys of other kinds are unwrapped by hand."""
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(root, key), archive)


# Cases ---------------------------------------------------------------------------------------------------------------


def add_archives(corpus: Corpus) -> None:
    """Archives of the snapshots of other cases, and of some that show the layout; then damaged ones."""
    for name, base in (
        (ENCRYPTED, "small-sealed"),
        (PLAIN, "small-plain-sealed"),
        ("archive-names", "plain-sealed"),
        ("archive-names-encrypted", "encrypted-sealed"),
        ("archive-rekeyed", "rekeyed"),
        ("archive-without-fragments", "sealed-empty"),
        ("archive-memory-encrypted", "memory-lz4-encrypted"),
        ("archive-manifest-unusual", "manifest-unusual"),
        ("archive-manifest-long", "manifest-long"),
    ):
        before = corpus.cases[base]
        case = Case(f"an archive of {base}", before.key, fragments=before.fragments, memory=before.memory)
        pack(corpus.add(name, case), corpus.folder / base, before.key)
    for name, about, base, key, error in (
        ("no-key", "encrypted, opened without a key", ENCRYPTED, None, NO_KEY),
        ("wrong-key", "opened with another key", ENCRYPTED, OTHER_KEY, AUTHENTICATION),
        ("not-encrypted", "plain, opened with a key", PLAIN, KEY, NOT_ENCRYPTED),
    ):
        _changed(corpus, f"archive-{name}", base, lambda data: data, Case(about, key, error=error))

    _add_layouts(corpus)
    _add_key_metadata(corpus)
    _add_made_by_hand(corpus)
    _add_damaged(corpus)
    _add_cut(corpus)


def _add_layouts(corpus: Corpus) -> None:
    """Sizes around the alignment, and paths around the length of a name and of a pax header."""
    sizes = {f"{size} bytes": b"x" * size for size in (0, 1, 511, 512, 513, 65535, 65536, 65537, 70000)}
    _add_packed(corpus, "archive-sizes", "fragments around the size from which on data are aligned", None, sizes)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "vm")
        # The largest has 65,536 bytes in 1,023 segments. Its plaintext is half of that.
        fragments = {"a": bytes(1022 * 32 + 22), "b": bytes(1022 * 32 + 21), "note": NOTE, "place/note": NOTE}
        sealed_by_hand(root, lambda manifest: {**manifest, "fragments": _sealed_fragments(root, fragments)})
        case = Case("encrypted fragments of 65,536 and 65,535 stored bytes", KEY)
        case.fragments = {path: holds(data) for path, data in fragments.items()}
        pack(corpus.add("archive-sizes-encrypted", case), root, KEY)
    # 99, 100 and 101 bytes, also with the slash of a namespace; non-ASCII ones of fewer characters than bytes.
    paths = {"n" * length: b"n" for length in (99, 100, 101, 255)}
    paths |= {f"{'s' * (length - 1)}/f": b"" for length in (99, 100, 101, 255)}
    paths |= {"é" * 50: b"", "ż" * 127 + "x": b"", f"{'é' * 40}/é": b"", "vmsnap": b"v", "vmsnap.pax": b"p"}
    _add_packed(corpus, "archive-paths", "paths around 100 bytes, which a header holds", None, paths)
    # With `NNN path=` and a newline, such a path has 10 bytes more: a comment has to fit behind it, or nothing.
    paths = {}
    for length in (482, 483, 484, 501, 502, 503):
        for size in (1, 65536):
            path = f"{'a' * 255}/{str(size).ljust(length - 256, 'b')}"
            paths[path] = b"x" * size
    _add_packed(corpus, "archive-pax-lengths", "paths that fill a pax header to a few bytes", None, paths)
    fragments = {"note": NOTE, "large": b"x" * 65536, "żółć": NOTE, "empty": b""}
    _add_packed(corpus, WITH_PAX, "plain, with fragments that have a pax header", None, fragments)

    case = Case("plain guest memory")
    with tempfile.TemporaryDirectory() as folder:
        with vmsnap.create(Path(folder, "vm")) as writer:
            write_memory(writer, case)
        for name in ("mem", "mem_metadata"):
            case.fragments[name] = holds(Path(folder, "vm", name).read_bytes())
        pack(corpus.add("archive-memory", case), Path(folder, "vm"), None)


def _sealed_fragments(root: Path, fragments: dict[str, bytes]) -> object:
    for path, data in fragments.items():
        seal_fragment(root, path, data, one_nonce=True)
    return manifest_of(root, list(fragments))["fragments"]


def _add_packed(corpus: Corpus, name: str, about: str, key: bytes | None, fragments: dict[str, bytes]) -> None:
    case = Case(about, key, fragments={path: holds(data) for path, data in fragments.items()})
    with tempfile.TemporaryDirectory() as folder:
        with vmsnap.create(Path(folder, "vm"), key=key) as root:
            namespaces = {"": root}
            for path, data in fragments.items():
                namespace, _, fragment_name = path.rpartition("/")
                writer = namespaces.get(namespace) or root.add_namespace(namespace)
                namespaces[namespace] = writer
                with writer.raw_fragment(fragment_name) as fragment:
                    fragment.write(data)
        pack(corpus.add(name, case), Path(folder, "vm"), key)


def _add_key_metadata(corpus: Corpus) -> None:
    """Lengths of `enc_metadata`, which decide where the data of the manifest begin."""
    fragments = {"note": holds(NOTE), "place/note": holds(NOTE)}
    # The first two fill a block and begin another. The data of the manifest begin at 65,536, also where the third
    # leaves no room for a pax header; and at 131,072 where the last leaves 512 bytes, which are too few.
    for name, about, size in (
        ("512", "enc_metadata of 512 bytes", 512),
        ("513", "enc_metadata of 513 bytes, as after rekeying", 513),
        ("63488", "enc_metadata of 62 KiB: the manifest follows without a pax header", 63_488),
        ("62976", "enc_metadata of 61.5 KiB: the data of the manifest begin at 131,072", 62_976),
    ):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "vm")
            sealed_by_hand(root, lambda manifest: None)
            (root / "enc_metadata").write_bytes(_key_metadata_of(size))
            case = Case(about, KEY, fragments=dict(fragments))
            pack(corpus.add(f"archive-key-metadata-{name}", case), root, KEY)


def _key_metadata_of(size: int) -> bytes:
    """Return key metadata of this length."""
    hint = size
    while True:
        payload = cbor(floe.payload_with(sealed=True, hint=bytes(hint)))
        data = floe.seal(KEY, floe.KEY_AAD, payload, floe.KEY_CHUNK_BYTES, one_nonce=True)
        if len(data) == size:
            return data
        hint -= len(data) - size


def _add_made_by_hand(corpus: Corpus) -> None:
    """Manifests that vmsnap does not write, in archives."""
    fragments = {"note": holds(NOTE), "place/note": holds(NOTE)}
    for created in ("9999-12-31T23:59:59.999Z", "2242-03-16T12:56:31Z", "2242-03-16T12:56:32Z", "1970-01-01T00:00:00Z"):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "vm")
            sealed_by_hand(root, lambda manifest, created=created: {**manifest, "created": created})  # type: ignore[misc]
            case = Case(f"created {created}", KEY, fragments=dict(fragments))
            pack(corpus.add(f"archive-created-{slug(created[:19]).replace(':', '-')}", case), root, KEY)

    manifest_at = 65536
    base = (corpus.folder / PLAIN).read_bytes()
    size = members_of(base)["vmsnap_manifest"].size
    manifest = base[manifest_at : manifest_at + size]
    endless = {
        "format": "vmsnap-manifest",
        "version": 1,
        "snapshot_id": bytes(16),
        "created": "2026-11-26T12:00:00Z",
        "generator": "by hand",
        "encrypted": False,
        "requires": [],
        "namespaces": [],
        "fragments": {
            name: {"size": (1 << 64) - 1, "stored_size": (1 << 64) - 1, "blake3": bytes(32)} for name in "abc"
        },
    }
    later = {"format": "vmsnap-manifest", "version": 2, "requires": []}
    for name, about, data, error in (
        ("endless", "sizes whose sum is above 2^64", cbor(endless), CORRUPT),
        ("later-version", "a manifest of a later vmsnap", cbor(later), "unsupported"),
        ("encrypted-true", "says encrypted, without enc_metadata", _as_encrypted(manifest), CORRUPT),
        ("not-cbor", "the manifest is text", b"note", CORRUPT),
        ("no-manifest", "the manifest is empty", b"", CORRUPT),
    ):

        def change(archive: bytes, data: bytes = data) -> bytes:
            resized = in_header("vmsnap_manifest", (124, b"%011o" % len(data)))(archive)
            end = manifest_at + size + -size % BLOCK
            return resized[:manifest_at] + data + bytes(-len(data) % BLOCK) + resized[end:]

        _changed(corpus, f"archive-manifest-{name}", PLAIN, change, Case(about, error=error))


def _as_encrypted(manifest: bytes) -> bytes:
    changed = manifest.replace(b"\x69encrypted\xf4", b"\x69encrypted\xf5")
    assert changed != manifest
    return changed


def _changed(corpus: Corpus, name: str, base: str, change: Change, case: Case) -> None:
    before = (corpus.folder / base).read_bytes()
    changed = change(before)
    assert changed != before or case.key != corpus.cases[base].key, name
    corpus.add(name, case).write_bytes(changed)


def _add_damaged(corpus: Corpus) -> None:
    both = corpus.cases[ENCRYPTED].fragments

    def damaged(name: str, about: str, change: Change, error: str | None = None, **fragments: Result) -> None:
        case = Case(about, KEY, error=error, verifies=False)
        if error is None:
            case.fragments = both | fragments
        _changed(corpus, f"archive-{slug(name)}", ENCRYPTED, change, case)

    for name, fields in FIELDS.items():
        change = in_header("note", *fields)
        damaged(f"fragment {name}", f"header of a fragment changed: {name}", change, note=refused(CORRUPT))
    sizes = {path: member.size for path, member in members_of((corpus.folder / ENCRYPTED).read_bytes()).items()}
    for path, table in FIRST_FIELDS.items():
        for name, fields in table.items():
            damaged(f"{path} {name}", f"header of {path} changed: {name}", in_header(path, *fields), CORRUPT)
        for name, size in (("1 more", sizes[path] + 1), ("1 less", sizes[path] - 1)):
            change = in_header(path, (124, b"%011o" % size))
            damaged(f"{path} size {name}", f"header of {path} changed: size {name}", change, AUTHENTICATION)
    change = in_pax("vmsnap_manifest", b"  \n", b" x\n")
    damaged("manifest comment", "pax header of the manifest changed", change, CORRUPT)
    for name, change in WHOLE.items():
        damaged(f"whole {name}", f"an archive changed: {name}", change, CORRUPT)
    swapped = {"note": refused(CORRUPT), "place/note": refused(CORRUPT)}
    damaged("members swapped", "two fragments in the other order", exchanged("note", "place/note"), **swapped)
    change = exchanged("note", "place/note", BLOCK)
    damaged("data swapped", "the data of two fragments swapped", change, **swapped)

    # Nothing reads these bytes, but for `verify`.
    for path in ("note", "vmsnap_manifest", "enc_metadata"):
        damaged(f"padding of {path}", f"a byte that is not zero after the data: {path}", in_padding(path))
    damaged("end block", "a byte that is not zero in the end blocks", lambda archive: archive[:-1] + b"x")
    damaged("namespace header", "header of a namespace changed", in_header("place", (100, b"0000755")))

    for name, at in (("changed", 95), ("tag", 50)):
        case = Case(f"a bit of the file of a fragment changed: {name}", KEY, verifies=False)
        case.fragments = both | {"note": refused(AUTHENTICATION if name == "changed" else CORRUPT)}
        _changed(corpus, f"archive-data-{name}", ENCRYPTED, in_data("note", at), case)

    whole = corpus.cases[WITH_PAX].fragments
    for name, (path, change) in PAX.items():
        case = Case(f"pax header of a fragment changed: {name}", fragments=whole | {path: refused(CORRUPT)})
        case.verifies = False
        _changed(corpus, f"archive-pax-{slug(name)}", WITH_PAX, change, case)

    foreign = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
    for name, format in foreign.items():
        case = Case(f"another program's, of the format {name}", KEY, error=CORRUPT)
        archive = corpus.add(f"archive-of-tar-{name}", case)
        with tarfile.open(archive, "w", format=format) as tar:
            for path in ("enc_metadata", "vmsnap_manifest", "place", "note", "place/note"):
                tar.add(corpus.folder / "small-sealed" / path, path, recursive=False)
    data = (corpus.folder / "archive-of-tar-ustar").read_bytes()
    about = "another program's, behind the global header"
    begun = corpus.add("archive-of-tar-begun", Case(about, KEY, error=CORRUPT))
    begun.write_bytes((corpus.folder / ENCRYPTED).read_bytes()[:GLOBAL_HEADER_BYTES] + data)


def _add_cut(corpus: Corpus) -> None:
    """Archives that end within each part."""
    data = (corpus.folder / ENCRYPTED).read_bytes()
    lengths = {"global header": 100, "comment": BLOCK, "after the global header": GLOBAL_HEADER_BYTES}
    for path, member in members_of(data).items():
        name = path.replace("/", " ")
        if member.offset != GLOBAL_HEADER_BYTES:
            lengths[f"before {name}"] = member.offset
        lengths[f"header of {name}"] = member.offset + 300
        if member.offset_data - member.offset > BLOCK:
            lengths[f"pax data of {name}"] = member.offset + 3 * BLOCK
            lengths[f"second header of {name}"] = member.offset_data - 100
        if member.size:
            lengths[f"data of {name}"] = member.offset_data + member.size // 2
            lengths[f"padding of {name}"] = member.offset_data + member.size
    for name, length in lengths.items():
        case = Case(f"cut off: {name}", KEY, error=CORRUPT)
        _changed(corpus, f"archive-cut-{slug(name)}", ENCRYPTED, lambda archive, length=length: archive[:length], case)  # type: ignore[misc]
