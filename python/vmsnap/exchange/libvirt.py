"""The file of ``virsh save``: a header, the XML of the domain, and QEMU's migration stream.

``src/qemu/qemu_saveimage.h`` and ``qemu_saveimage.c`` of libvirt define the format. The numbers of the header are
in the byte order of the host that wrote it:

    16 bytes   "LibvirtQemudSave"; "LibvirtQemudPart" until the file is complete
    u32        version: 2
    u32        size of the XML, the cookie and the padding after them
    u32        whether the guest was running
    u32        compression of the stream: see `_COMPRESSIONS`
    u32        offset of the cookie after the header; 0 without a cookie
    14 u32     unused

The XML and the cookie end in a NUL. The cookie is XML of libvirt's own.
"""

import struct
from dataclasses import dataclass

from vmsnap.errors import InvalidArgumentError, UnsupportedFormatError
from vmsnap.exchange.source import Source

_MAGIC, _INCOMPLETE = b"LibvirtQemudSave", b"LibvirtQemudPart"
_VERSION = 2
_NUMBERS = "5I56x"
_HEADER_BYTES = len(_MAGIC) + struct.calcsize("=" + _NUMBERS)
# So that a changed XML fits in: virQEMUSaveDataWrite.
_PADDING_BYTES = 64 << 10
#: The maximum size of the XML with its cookie and padding. That of a large guest is a few hundred KiB.
MAX_XML_BYTES = 16 << 20

_SPARSE = 6
# virQEMUSaveFormat. None is a stream that is not compressed.
_COMPRESSIONS = {0: None, 1: "gzip", 2: "bzip2", 3: "xz", 4: "lzop", 5: "zstd"}


@dataclass(frozen=True)
class SaveImage:
    """The part of a saved image before the stream."""

    xml: bytes
    """The XML of the domain, without the NUL."""
    cookie: bytes
    """libvirt's own data about the domain, without the NUL; empty without it."""
    running: bool
    """Whether the guest was running when it was saved."""
    compression: str | None = None
    """The program that compressed the stream."""

    @classmethod
    def read(cls, source: Source) -> "SaveImage":
        """Read the header, the XML and the cookie. The stream is next in the source.

        Raises
        ------
        UnsupportedFormatError
            The image is incomplete, damaged, or of a format that vmsnap does not know.
        """
        label = source.label
        header = source.read_exactly(_HEADER_BYTES, "the header")
        if header.startswith(_INCOMPLETE):
            raise UnsupportedFormatError(f"{label} is incomplete: virsh save did not finish it; save the guest again")
        if not header.startswith(_MAGIC):
            raise UnsupportedFormatError(f"{label} is not a guest saved by libvirt")
        numbers = struct.unpack_from("<" + _NUMBERS, header, len(_MAGIC))
        if numbers[0] > _VERSION:
            numbers = struct.unpack_from(">" + _NUMBERS, header, len(_MAGIC))
        version, size, running, number, cookie_offset = numbers
        if version not in (1, _VERSION):
            raise UnsupportedFormatError(f"{label} is a guest saved by libvirt in version {version}, which is unknown")
        if number == _SPARSE:
            raise UnsupportedFormatError(
                f"{label} is in the sparse format of libvirt, with memory at fixed places (mapped-ram), which vmsnap "
                "does not read: restore the guest, and save it with --image-format raw"
            )
        if number not in _COMPRESSIONS:
            raise UnsupportedFormatError(f"{label} has compression {number} of libvirt, which is unknown")
        if not 0 < size <= MAX_XML_BYTES or cookie_offset > size:
            raise UnsupportedFormatError(
                f"{label} is damaged: its header has {size} bytes of XML, with a cookie at {cookie_offset}; "
                f"at most {MAX_XML_BYTES} bytes are supported"
            )
        texts = source.read_exactly(size, "the XML")
        xml_bytes = cookie_offset or size
        return cls(
            xml=_text(texts[:xml_bytes], "XML", label),
            cookie=_text(texts[xml_bytes:], "cookie", label) if xml_bytes < size else b"",
            running=running != 0,
            # Only version 2 can be compressed.
            compression=_COMPRESSIONS[number] if version == _VERSION else None,
        )

    def header(self) -> bytes:
        """Return the beginning of a complete image, to which the stream is appended.

        Raises
        ------
        InvalidArgumentError
            The XML is empty, too large, or contains a NUL.
        """
        xml, cookie = self.xml + b"\0", self.cookie + b"\0" if self.cookie else b""
        size = len(xml) + len(cookie) + _PADDING_BYTES
        if not self.xml or b"\0" in self.xml + self.cookie or size > MAX_XML_BYTES:
            raise InvalidArgumentError(
                f"the XML of the domain has {len(self.xml)} bytes: it must have at least one, none of them NUL, and "
                f"with its cookie at most {MAX_XML_BYTES - _PADDING_BYTES}"
            )
        numbers = (_VERSION, size, int(self.running), 0, len(xml) if cookie else 0)
        return _MAGIC + struct.pack("=" + _NUMBERS, *numbers) + (xml + cookie).ljust(size, b"\0")


def _text(content: bytes, what: str, label: str) -> bytes:
    text, end, _ = content.partition(b"\0")
    if not end or not text:
        raise UnsupportedFormatError(f"{label} is damaged: its {what} {'is empty' if end else 'does not end in a NUL'}")
    return text
