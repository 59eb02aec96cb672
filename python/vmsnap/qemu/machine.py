"""The description of the machine that QEMU runs, asked over QMP."""

import re
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from vmsnap._machine import Cpu, Device, Machine, RamRange, Smp, listed_name
from vmsnap.errors import QemuError
from vmsnap.qemu.monitor import Monitor

__all__ = ["Cpu", "Device", "Machine", "RamRange", "Smp", "describe", "listed_name"]

# The levels of the arrangement of processors.
_LEVELS = ("socket", "die", "core", "thread")

# Devices of a board that options such as -serial and -drive create. Other devices of a board belong to the machine type
# or are PCI functions, and newer versions of QEMU name some of them differently.
_OPTIONAL = re.compile(r"isa-serial|isa-parallel|isa-fdc|floppy|hpet|(?:ide|scsi|usb)-.*")


async def describe(monitor: Monitor, ram: list[RamRange], command_line: list[str]) -> Machine:
    """Describe the machine that QEMU runs.

    QEMU is asked nothing that makes it load modules, such as the list of its types: a QEMU whose package was upgraded
    meanwhile aborts when it loads a module of the new version.
    """
    version = (await monitor.run("query-version"))["qemu"]
    kind = await monitor.run("qom-get", path="/machine", property="type")
    target = (await monitor.run("query-target"))["arch"]
    status = (await monitor.run("query-status"))["status"]
    processors = await monitor.run("query-cpus-fast")
    return Machine(
        qemu_version=f"{version['major']}.{version['minor']}.{version['micro']}",
        target=target,
        machine_type=kind.removesuffix("-machine"),
        ram=ram,
        command_line=command_line,
        state="running" if status == "running" else "paused",
        cpu=await _cpu(monitor, processors, target),
        smp=await _smp(monitor, len(processors)),
        devices=sorted([each async for each in _devices(monitor)], key=lambda each: (each.type, each.address, each.id)),
    )


async def _cpu(monitor: Monitor, processors: list[dict[str, Any]], target: str) -> Cpu | None:
    if not processors:
        return None
    path = processors[0]["qom-path"]
    kind = await monitor.run("qom-get", path=path, property="type")
    features = {}
    if "feature-words" in {each["name"] for each in await monitor.run("qom-list", path=path)}:
        for each in await monitor.run("qom-get", path=path, property="feature-words"):
            if each["features"]:
                name = f"{each['cpuid-input-eax']:x}.{each.get('cpuid-input-ecx', 0):x}.{each['cpuid-register']}"
                features[name] = f"{each['features']:#010x}"
    return Cpu(kind.removesuffix(f"-{target}-cpu"), dict(sorted(features.items())))


async def _smp(monitor: Monitor, cpus: int) -> Smp:
    try:
        slots = await monitor.run("query-hotpluggable-cpus")
    except QemuError:  # such as microvm
        return Smp(cpus, cpus)
    numbers = [len({slot["props"].get(f"{each}-id", 0) for slot in slots}) or 1 for each in _LEVELS]
    return Smp(cpus, sum(slot["vcpus-count"] for slot in slots), *numbers)


async def _devices(monitor: Monitor) -> AsyncIterator[Device]:
    """Yield the devices, in no particular order."""
    try:
        buses = await monitor.run("query-pci")
    except QemuError:  # a machine without PCI, in some versions
        buses = []
    # Devices behind a bridge are left out, because the firmware of the guest gives the bridge its number.
    for function in (each for bus in buses for each in bus["devices"]):
        numbers = function["id"]
        address = f"{function['bus']:02x}:{function['slot']:02x}.{function['function']:x}"
        yield Device(f"{numbers['vendor']:04x}:{numbers['device']:04x}", address, function.get("qdev_id", ""))
    for folder in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"):
        for name, kind in _children(await monitor.run("qom-list", path=folder)):
            if folder == "/machine/unattached" and not (name.startswith("device[") and _OPTIONAL.fullmatch(kind)):
                continue
            path = f"{folder}/{name}"
            properties = {each["name"] for each in await monitor.run("qom-list", path=path)}
            address = ""
            if {"addr", "romfile"} <= properties:  # a PCI function
                address = _slot(await monitor.run("qom-get", path=path, property="addr"))
            yield Device(kind, address, name if folder == "/machine/peripheral" else "")


def _slot(address: object) -> str:
    """Return the slot and function of a PCI address. Versions of QEMU give it as a number or as such a text."""
    return f"{address >> 3:02x}.{address & 7:x}" if isinstance(address, int) else str(address)


def _children(objects: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the name and the type of each object within another."""
    for each in objects:
        if found := re.fullmatch(r"child<(.*)>", each["type"]):
            yield each["name"], found[1]
