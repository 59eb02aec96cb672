"""The XML of a libvirt domain, as far as it tells about the memory of the guest."""

import re
from dataclasses import dataclass, field
from xml.parsers import expat

from vmsnap.errors import UnsupportedFormatError

# A deeper element is ignored, so that a hostile file cannot make the path of elements long.
_DEPTH = 8
# Of NUMA nodes and of DIMMs, for the same reason.
_MAX_COUNT = 1024


@dataclass
class Domain:
    """The part of a domain that tells where its memory is."""

    architecture: str = ""
    """The architecture of the processor, such as ``x86_64``."""
    machine_type: str = ""
    """The machine type with its version."""
    cells: list[int] = field(default_factory=list)
    """The NUMA nodes, in the order in which they follow each other in memory."""
    dimms: dict[int, int] = field(default_factory=dict)
    """The guest-physical addresses of DIMMs, by their slots."""
    placed: bool = True
    """Whether the memory is where this machine type has it: no QEMU option of the domain moves it."""

    @classmethod
    def parse(cls, xml: bytes, label: str) -> "Domain":
        """Parse the XML of a domain.

        Raises
        ------
        UnsupportedFormatError
            It is not well-formed, is not a domain of QEMU, or has a document type. libvirt never writes one, and its
            entities could make the text arbitrarily large.
        """
        domain, path = cls(), list[str]()
        depth = 0

        def start(name: str, attributes: dict[str, str]) -> None:
            nonlocal depth
            depth += 1
            if depth > _DEPTH:
                return
            path.append(name)
            match path:
                case [root]:
                    if root != "domain" or attributes.get("type") not in ("qemu", "kvm", "hvf"):
                        raise UnsupportedFormatError(f"{label}: the XML does not describe a domain of QEMU")
                case ["domain", "os", "type"]:
                    domain.architecture = attributes.get("arch", "")
                    domain.machine_type = attributes.get("machine", "")
                case ["domain", "cpu", "numa", "cell"] if len(domain.cells) < _MAX_COUNT:
                    number = attributes.get("id", "")
                    domain.cells.append(int(number) if re.fullmatch("[0-9]{1,4}", number) else len(domain.cells))
                case ["domain", "devices", "memory", "address"] if len(domain.dimms) < _MAX_COUNT:
                    slot, base = attributes.get("slot", ""), attributes.get("base", "")
                    if re.fullmatch("[0-9]{1,4}", slot) and re.fullmatch("0x[0-9a-f]{1,16}", base):
                        domain.dimms[int(slot)] = int(base, 16)
                case ["domain", _, "qemu:arg" | "arg"]:
                    domain.placed &= "max-ram-below-4g" not in attributes.get("value", "")

        def end(_name: str) -> None:
            nonlocal depth
            if depth <= _DEPTH:
                path.pop()
            depth -= 1

        def refuse(*_: object) -> None:
            raise UnsupportedFormatError(f"{label}: the XML of the domain has a document type, which libvirt never has")

        parser = expat.ParserCreate("UTF-8")
        parser.StartElementHandler = start
        parser.EndElementHandler = end
        parser.StartDoctypeDeclHandler = refuse
        try:
            parser.Parse(xml, True)
        except expat.ExpatError as error:
            raise UnsupportedFormatError(f"{label}: the XML of the domain is not well-formed: {error}") from None
        return domain
