"""Where the memory blocks of a migration stream are in guest-physical memory.

A stream has the size of each block, but not its address. For a PC, the rules of QEMU and the machine type tell it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vmsnap.exchange.domain import Domain

_GIB = 1 << 30
_FOUR_GIB = 4 * _GIB
_PAGE_BYTES = 4096
#: Regions of blocks whose address is not known begin here: no processor of today has addresses of 52 bits or more.
UNKNOWN_BASE = 1 << 52

# The size from which memory is split around the hole below 4 GiB, and the size of the lower part then. These are the
# defaults for max-ram-below-4g: pc_init1 in hw/i386/pc_piix.c and pc_q35_init in hw/i386/pc_q35.c of QEMU.
_SPLITS = {"i440fx": (0xE0000000, 3 * _GIB), "q35": (0xB0000000, 2 * _GIB)}
# Machine types before 2.0 had other rules.
_PC = re.compile(r"pc-(i440fx|q35)-(?![01]\.)")
# Beyond it, memory may begin above 1 TiB, depending on the processor: pc_set_amd_above_4g_mem_start in hw/i386/pc.c.
_MAX_PLACED_BYTES = 960 * _GIB

_DEFAULT_BLOCK = "pc.ram"
_NODE_BLOCK = re.compile(r"ram-node(\d{1,4})")
# libvirt names the memory of a DIMM by its slot.
_DIMM_BLOCK = re.compile(r"mem(?:nv)?dimm(\d{1,4})")


class Part(NamedTuple):
    """A contiguous part of a block, and the guest-physical address of it."""

    block: str
    guest_base: int
    offset: int
    size: int
    mapped: bool
    """Whether the address is known. Otherwise it only keeps the parts apart."""


def place(machine_type: str, blocks: Sequence[tuple[str, int]], domain: Domain | None) -> list[Part]:
    """Return the parts of the blocks of guest memory, sorted by guest-physical address.

    Parameters
    ----------
    machine_type
        The machine type with its version, or an empty text if it is not known.
    blocks
        The names and sizes of the blocks.
    domain
        The libvirt domain, if there is one.
    """
    sizes = {name: size for name, size in blocks if size}
    main = _main(sizes, domain) if domain is None or domain.placed else []
    windows = _windows(machine_type, sum(sizes[name] for name in main))
    parts, start = list[Part](), 0
    for name in main if windows else []:
        end, window_start = start + sizes[name], 0
        for base, size in windows:
            low, high = max(start, window_start), min(end, window_start + size)
            if low < high:
                parts.append(Part(name, base + low - window_start, low - start, high - low, True))
            window_start += size
        start = end
    if parts and domain is not None:
        _add_dimms(parts, sizes, domain)
    parts.sort(key=lambda each: each.guest_base)
    base = UNKNOWN_BASE
    placed = {each.block for each in parts}
    for name in (name for name in sizes if name not in placed):
        parts.append(Part(name, base, 0, sizes[name], False))
        base += sizes[name]
    return parts


def _add_dimms(parts: list[Part], sizes: dict[str, int], domain: Domain) -> None:
    """Add the DIMMs whose addresses the domain tells. An address that cannot be right is ignored."""
    end = max(each.guest_base + each.size for each in parts)
    dimms = [(domain.dimms.get(int(found[1]), 0), name) for name in sizes if (found := _DIMM_BLOCK.fullmatch(name))]
    for base, name in sorted(dimms):
        # DIMMs lie above all other memory: pc_get_device_memory_range in hw/i386/pc.c of QEMU.
        if max(end, _FOUR_GIB) <= base <= UNKNOWN_BASE - sizes[name] and base % _PAGE_BYTES == 0:
            parts.append(Part(name, base, 0, sizes[name], True))
            end = base + sizes[name]


def _windows(machine_type: str, total: int) -> list[tuple[int, int]]:
    """Return the address and the size of each range of RAM, in the order in which blocks fill them."""
    found = _PC.match(machine_type)
    if not found or total > _MAX_PLACED_BYTES:
        return []
    split_from, low = _SPLITS[found[1]]
    return [(0, total)] if total < split_from else [(0, low), (_FOUR_GIB, total - low)]


def _main(sizes: dict[str, int], domain: Domain | None) -> list[str]:
    """Return the blocks that RAM of the machine consists of, in their order; none if it cannot be told."""
    if _DEFAULT_BLOCK in sizes:
        return [_DEFAULT_BLOCK]
    nodes = {int(found[1]): name for name in sizes if (found := _NODE_BLOCK.fullmatch(name))}
    if nodes:
        order = domain.cells if domain is not None and domain.cells else sorted(nodes)
        return [nodes[number] for number in order] if sorted(order) == sorted(nodes) else []
    return list(sizes) if len(sizes) == 1 else []
