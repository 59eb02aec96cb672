"""Changes of an archive that a reader must refuse. The positions are those that Python's tarfile finds."""

import io
import tarfile
from collections.abc import Callable

BLOCK = 512
GLOBAL_HEADER_BYTES = 1024
END_BYTES = 1024

#: The change of an archive's bytes.
Change = Callable[[bytes], bytes]


def members_of(archive: bytes) -> dict[str, tarfile.TarInfo]:
    """Return the members by their paths: `offset` is the first header, `offset_data` the data."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar.getmembers()}


def span(archive: bytes, path: str) -> slice:
    """Return where all blocks of a member are."""
    member = members_of(archive)[path]
    return slice(member.offset, member.offset_data + member.size + -member.size % BLOCK)


def put(at: int, data: bytes) -> Change:
    return lambda archive: archive[:at] + data + archive[at + len(data) :]


def with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    return header[:148] + b"%06o\0 " % total + header[156:]


def in_header(path: str, *fields: tuple[int, bytes], pax: bool = False) -> Change:
    """Return the change of fields of the header of a member, or of its pax header; the checksum is right."""

    def change(archive: bytes) -> bytes:
        member = members_of(archive)[path]
        at = member.offset if pax else member.offset_data - BLOCK
        header = archive[at : at + BLOCK]
        for offset, value in fields:
            header = put(offset, value)(header)
        return put(at, header if any(148 <= offset < 156 for offset, _ in fields) else with_checksum(header))(archive)

    return change


def in_pax(path: str, old: bytes, new: bytes) -> Change:
    """Return the change of the records of a member's pax header. Spaces at their end make up for the length."""

    def change(archive: bytes) -> bytes:
        member = members_of(archive)[path]
        start, end = member.offset + BLOCK, member.offset_data - BLOCK
        changed = archive[start:end].replace(old, new, 1)
        assert changed != archive[start:end]
        assert len(changed) == end - start
        return archive[:start] + changed + archive[end:]

    return change


def in_padding(path: str) -> Change:
    def change(archive: bytes) -> bytes:
        blocks = span(archive, path)
        return put(blocks.stop - 1, b"x")(archive)

    return change


def in_data(path: str, offset: int) -> Change:
    """Return the change of a bit of the data of a member."""

    def change(archive: bytes) -> bytes:
        at = members_of(archive)[path].offset_data + offset
        return put(at, bytes([archive[at] ^ 1]))(archive)

    return change


def exchanged(first: str, second: str, header_bytes: int = 0) -> Change:
    """Return the exchange of two members of equal length, or of their blocks after the headers."""

    def change(archive: bytes) -> bytes:
        one, other = (
            slice(blocks.start + header_bytes, blocks.stop) for blocks in (span(archive, first), span(archive, second))
        )
        return put(one.start, archive[other])(put(other.start, archive[one])(archive))

    return change


def doubled(path: str, *, at_end: bool = False) -> Change:
    def change(archive: bytes) -> bytes:
        blocks = span(archive, path)
        at = len(archive) - END_BYTES if at_end else blocks.stop
        return archive[:at] + archive[blocks] + archive[at:]

    return change


def removed(path: str) -> Change:
    return lambda archive: archive[: span(archive, path).start] + archive[span(archive, path).stop :]


def moved_first(path: str) -> Change:
    """Return the move of a member behind the global header."""

    def change(archive: bytes) -> bytes:
        rest = removed(path)(archive)
        return rest[:GLOBAL_HEADER_BYTES] + archive[span(archive, path)] + rest[GLOBAL_HEADER_BYTES:]

    return change


#: By the name of the field: offsets and values that differ from those in the header of the fragment `note`.
FIELDS: dict[str, list[tuple[int, bytes]]] = {
    "name": [(0, b"nota")],
    "name after its end": [(50, b"x")],
    "name upwards": [(0, b"../note")],
    "mode": [(100, b"0000644")],
    "uid": [(108, b"0001750")],
    "gid": [(116, b"0001750")],
    "size": [(124, b"00000000263")],
    "size in base 256": [(124, b"\x80" + (178).to_bytes(11, "big"))],
    "size with a space": [(135, b" ")],
    "mtime": [(136, b"00000000001")],
    "chksum": [(148, b"000000\0 ")],
    "chksum in another form": [(154, b" \0")],
    "typeflag NUL": [(156, b"\0")],
    "typeflag of a namespace": [(156, b"5")],
    "typeflag of a pax header": [(156, b"x")],
    "a symbolic link": [(156, b"2"), (157, b"/etc/passwd"), (124, b"00000000000")],
    "a hard link": [(156, b"1"), (157, b"place/note")],
    "a GNU sparse file": [(156, b"S")],
    "linkname": [(157, b"place/note")],
    "magic": [(257, b"ustar ")],
    "magic of GNU": [(257, b"ustar  \0")],
    "version": [(263, b"01")],
    "uname": [(265, b"root")],
    "gname": [(297, b"root")],
    "devmajor": [(329, b"0000001")],
    "devmajor NUL": [(329, bytes(8))],
    "devminor": [(337, b"0000001")],
    "prefix": [(345, b"place")],
    "padding": [(511, b"x")],
}
#: By the path: fields of the headers of the first two members. A few bytes more or less are for the ciphertext to tell.
FIRST_FIELDS: dict[str, dict[str, list[tuple[int, bytes]]]] = {
    "vmsnap_manifest": {
        "name": [(0, b"vmsnap_Manifest")],
        **{name: FIELDS[name] for name in ("mode", "uid", "mtime", "chksum", "typeflag NUL", "uname", "padding")},
        "size beyond the end": [(124, b"%011o" % (1 << 28))],
        "size above the limit": [(124, b"%011o" % ((1 << 28) + 1))],
        "size of 8 EiB": [(124, b"\x80" + (1 << 63).to_bytes(11, "big"))],
        "size without digits": [(124, b" " * 11)],
        "a symbolic link": [(156, b"2"), (157, b"/etc/passwd")],
    },
    "enc_metadata": {
        "name": [(0, b"enc_metadatb")],
        **{name: FIELDS[name] for name in ("mode", "mtime", "typeflag NUL")},
        "size above the limit": [(124, b"%011o" % ((1 << 28) + 1))],
    },
}
#: Of `archive-pax`: the fragment whose pax header is changed, then the change.
PAX: dict[str, tuple[str, Change]] = {
    "comment": ("large", in_pax("large", b"  \n", b" x\n")),
    "comment with another keyword": ("large", in_pax("large", b" comment=", b" commenu=")),
    "length with a leading zero": ("żółć", in_pax("żółć", b"495 comment= ", b"0495 comment=")),
    "path": ("żółć", in_pax("żółć", "path=żółć".encode(), "path=żółś".encode())),
    "path upwards": ("żółć", in_pax("żółć", "path=żółć".encode(), b"path=../notes")),
    "size": ("żółć", in_pax("żółć", b"495 comment=" + b" " * 9, b"9 size=1\n486 comment=")),
    "records removed": ("żółć", lambda archive: _pax_data(archive, "żółć", bytes(BLOCK))),
    "name of the header": ("large", in_header("large", (0, b"PaxHeaders.0/x"), pax=True)),
    "mtime of the header": ("large", in_header("large", (136, b"00000000001"), pax=True)),
    "mode of the header": ("large", in_header("large", (100, b"0000644"), pax=True)),
    "typeflag of the header": ("large", in_header("large", (156, b"g"), pax=True)),
    "header of Solaris": ("large", in_header("large", (156, b"X"), pax=True)),
}


def _pax_data(archive: bytes, path: str, data: bytes) -> bytes:
    return put(members_of(archive)[path].offset + BLOCK, data)(archive)


#: Changes of the whole of `archive-encrypted`.
WHOLE: dict[str, Change] = {
    "a byte more": lambda archive: archive + b"\0",
    "a block more": lambda archive: archive + bytes(BLOCK),
    "filled to 10 KiB": lambda archive: archive + bytes(-len(archive) % 10240),
    "another archive behind it": lambda archive: archive * 2,
    "a byte less": lambda archive: archive[:-1],
    "one end block": lambda archive: archive[:-BLOCK],
    "no end blocks": lambda archive: archive[:-END_BYTES],
    "fragment doubled": doubled("note"),
    "fragment again at the end": doubled("note", at_end=True),
    "manifest again at the end": doubled("vmsnap_manifest", at_end=True),
    "enc_metadata doubled": doubled("enc_metadata"),
    "fragment removed": removed("place/note"),
    "namespace removed": removed("place"),
    "manifest removed": removed("vmsnap_manifest"),
    "enc_metadata removed": removed("enc_metadata"),
    "manifest first": moved_first("vmsnap_manifest"),
    "fragment first": moved_first("note"),
    "global header of version 2": put(BLOCK, b"512 comment=vmsnap archive 2"),
    "global header of another mode": lambda archive: (
        with_checksum(put(100, b"0000644")(archive[:BLOCK])) + archive[BLOCK:]
    ),
    "without a global header": lambda archive: archive[GLOBAL_HEADER_BYTES:],
    "global header twice": lambda archive: archive[:GLOBAL_HEADER_BYTES] + archive,
    "empty": lambda _: b"",
    "zeros": lambda archive: bytes(len(archive)),
}
