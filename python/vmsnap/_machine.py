"""The machine that a guest ran on: its description in a snapshot, and the comparison with a started QEMU."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from vmsnap.errors import QemuError, UnsupportedFormatError

_FORMAT, _VERSION = "vmsnap-qemu", 2
# Version 1 has no state, processor and devices.
_READABLE = (1, _VERSION)

# A longer list in an error is cut.
_SHOWN = 8

# Features that a started processor may lack: PCOMMIT. QEMU 7.2 has it with `-cpu max`, and later versions removed it,
# because Intel withdrew it before a processor had it.
_MAY_LACK = {"7.0.EBX": 1 << 22}


@dataclass(frozen=True)
class RamRange:
    """A contiguous range of guest-physical addresses, and the range of a memory backend behind it, in bytes."""

    backend: str
    """The id of the memory backend."""
    guest_base: int
    """The guest-physical address of the first byte."""
    offset: int
    """The offset of the range in the backend."""
    size: int
    """The size of the range."""
    mapped: bool = True
    """Whether the guest sees the range there. If not, the address only tells the range from others."""
    block: str = ""
    """The name of the backend in QEMU's migration stream, if it differs from the id."""

    @property
    def stream_name(self) -> str:
        """The name of the backend in QEMU's migration stream."""
        return self.block or self.backend


def listed_name(stream_name: str, listed: Collection[str]) -> str | None:
    """Return the name under which a device state lists a block of memory, or None if it does not list the block.

    A description by vmsnap 0.1 has only the id of the backend. The name is its path in old machine types of QEMU.
    """
    return next((each for each in (stream_name, f"/objects/{stream_name}") if each in listed), None)


@dataclass(frozen=True)
class Cpu:
    """The processors of a machine."""

    model: str
    """The model, such as ``qemu64``."""
    features: dict[str, str] = field(default_factory=dict, repr=False)
    """The features of an x86 processor, as hexadecimal numbers by CPUID leaf, subleaf and register: ``7.0.EBX``."""


@dataclass(frozen=True)
class Smp:
    """The number of processors, and their arrangement in the whole machine."""

    cpus: int
    """Processors that are present."""
    max_cpus: int
    """Processors that may be present."""
    sockets: int = 1
    """Sockets of the machine."""
    dies: int = 1
    """Dies of a socket."""
    cores: int = 1
    """Cores of a die."""
    threads: int = 1
    """Threads of a core."""


@dataclass(frozen=True)
class Device:
    """A device of a machine."""

    type: str
    """The type in QEMU, such as ``virtio-net-pci``; of a PCI function, the vendor and the device: ``1af4:1000``."""
    address: str = ""
    """The PCI address: bus, slot and function of a PCI function, slot and function of another device."""
    id: str = ""
    """The id, where the device has one."""

    def __str__(self) -> str:
        return self.type + (f" at {self.address}" if self.address else "")


@dataclass(frozen=True)
class Machine:
    """A description of the machine that a guest ran on. It is the fragment ``machine``."""

    qemu_version: str
    """The version of QEMU, such as ``7.2.22``; empty if it is not known, because the guest was imported."""
    target: str
    """The architecture of the processor, such as ``x86_64``; empty if it is not known."""
    machine_type: str
    """The machine type with its version, such as ``pc-i440fx-7.2``; never an alias."""
    ram: list[RamRange]
    """The memory, in the order of the regions in the fragment ``mem``."""
    command_line: list[str] = field(default_factory=list, repr=False)
    """The command line of QEMU, empty if its process was not visible. It may contain secrets."""
    state: str = ""
    """``running`` or ``paused``: the state of the guest before it was saved."""
    cpu: Cpu | None = None
    """The processors."""
    smp: Smp | None = None
    """The number of processors."""
    devices: list[Device] | None = field(default=None, repr=False)
    """The devices, in alphabetical order."""
    format: str = _FORMAT
    version: int = _VERSION

    def check_format(self, location: str) -> None:
        """Check that this version of vmsnap supports the description.

        Raises
        ------
        UnsupportedFormatError
            A newer version of vmsnap wrote it.
        """
        if self.format != _FORMAT or self.version not in _READABLE:
            raise UnsupportedFormatError(
                f"{location}: the fragment 'machine' is {self.format!r}, version {self.version}: use a newer vmsnap"
            )

    def check_against(self, started: "Machine", *, ignore_differences: bool = False) -> dict[str, str]:
        """Check that the started machine can load the state of this one.

        A newer QEMU can load it, because the version is part of the machine type. The processor may have more features.
        The ids of memory backends may differ. A description of version 1 has no processor and devices to compare.

        Parameters
        ----------
        started
            The machine that the started QEMU runs.
        ignore_differences
            Whether other processors and devices are allowed.

        Returns
        -------
        dict
            The names of the blocks of memory in the started QEMU, by their names in the stream of the saved one.

        Raises
        ------
        QemuError
            The started machine is another one, or its QEMU is older. The text names all differences.
        """
        differences = list(self._basic_differences(started))
        can_be_ignored = not differences
        if not ignore_differences:
            differences += self._other_differences(started)
        if differences:
            advice = "start the same machine, with the same version of QEMU or a newer one"
            if can_be_ignored:
                advice += ", or pass ignore_differences=True (--force)"
            raise QemuError(f"{'; '.join(differences)}: {advice}")
        return {
            saved.stream_name: found.stream_name
            for saved, found in zip(_by_address(self.ram), _by_address(started.ram), strict=True)
        }

    def _basic_differences(self, started: "Machine") -> Iterator[str]:
        for what, saved, found in (
            ("architecture", self.target, started.target),
            ("machine type", self.machine_type, started.machine_type),
        ):
            # A guest that was imported has an empty text for each of these that its file did not tell.
            if saved not in ("", found):
                yield _differs(what, saved, found)
        if not _same_layout(self.ram, started.ram):
            yield _differs("memory", _told(self.ram), _told(started.ram))
        if _release(self.qemu_version) > _release(started.qemu_version):
            yield f"the guest was saved by QEMU {self.qemu_version}, but the started QEMU is {started.qemu_version}"

    def _other_differences(self, started: "Machine") -> Iterator[str]:
        if self.cpu and started.cpu:
            if self.cpu.model != started.cpu.model:
                yield _differs("CPU model (-cpu)", self.cpu.model, started.cpu.model)
            elif missing := list(_missing(self.cpu.features, started.cpu.features)):
                yield f"the CPU of the started QEMU lacks features of the saved guest, in CPUID {_listed(missing)}"
        if self.smp and started.smp and self.smp != started.smp:
            yield _differs("number of CPUs (-smp)", _counted(self.smp), _counted(started.smp))
        # Another machine type has other devices.
        same_type = (self.target, self.machine_type) == (started.target, started.machine_type)
        if same_type and self.devices is not None and started.devices is not None:
            # Ids are names on the command line, which the state does not contain.
            saved, found = (Counter(map(str, each)) for each in (self.devices, started.devices))
            if gone := sorted((saved - found).elements()):
                yield f"the started QEMU lacks devices of the saved guest: {_listed(gone)}"
            if more := sorted((found - saved).elements()):
                yield f"the started QEMU has devices that the saved guest did not have: {_listed(more)}"


def _differs(what: str, saved: str, found: str) -> str:
    return f"the {what} of the saved guest is {saved}, but that of the started QEMU is {found}"


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _told(ram: list[RamRange]) -> str:
    return _listed(
        [
            f"{each.size >> 20} MiB of backend {each.backend!r}" + (f" at {each.guest_base:#x}" if each.mapped else "")
            for each in ram
        ]
    )


def _by_address(ram: list[RamRange]) -> list[RamRange]:
    return sorted(ram, key=lambda each: each.guest_base)


def _same_layout(saved: list[RamRange], found: list[RamRange]) -> bool:
    """Return whether the guest sees the same memory, in backends that correspond one to one."""
    if len(saved) != len(found):
        return False
    there, back = dict[str, str](), dict[str, str]()
    for one, other in zip(_by_address(saved), _by_address(found), strict=True):
        # The address of a range that is not mapped depends on the names of all others.
        same = ("mapped", "offset", "size", "guest_base" if one.mapped else "backend")
        if any(getattr(one, name) != getattr(other, name) for name in same):
            return False
        if there.setdefault(one.backend, other.backend) != other.backend:
            return False
        if back.setdefault(other.backend, one.backend) != one.backend:
            return False
    return True


def _missing(saved: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    for name, word in sorted(saved.items()):
        if missing := _number(word) & ~_number(found.get(name, "0")) & ~_MAY_LACK.get(name, 0):
            yield f"{name}: {missing:#x}"


def _number(word: str) -> int:
    if not re.fullmatch(r"(?:0x)?[0-9a-f]{1,8}", word):
        raise QemuError(f"the fragment 'machine' has a CPU feature word that is not a number of 32 bits: {word[:20]!r}")
    return int(word, 16)


def _counted(smp: Smp) -> str:
    return (
        f"{smp.cpus} of {smp.max_cpus} (sockets={smp.sockets}, dies={smp.dies}, cores={smp.cores}, "
        f"threads={smp.threads})"
    )


def _release(version: str) -> tuple[int, ...]:
    """Return the parts of a version that decide whether QEMU can load a state: all but the patch level."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
