"""The description of a machine does not depend on the version of QEMU, and each difference of two machines is named."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import qemus
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import ask, ended, qemu_command, running
from qemus import Qemu
from refusals import refused, row
from support import MIB
from surveyed import surveyed
from vmsnap.qemu import Machine, RamRange
from vmsnap.qemu.machine import Cpu, Device, Smp

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine types are those of x86")

# Devices of each kind, from -device and from other options.
DEVICES = [
    *("-smp", "3,sockets=2,cores=2,threads=1,maxcpus=4", "-usbdevice", "tablet"),
    *("-device", "virtio-net-pci", "-device", "qemu-xhci,id=usb", "-device", "usb-kbd,bus=usb.0,id=keys"),
    *("-drive", "if=ide,file=null-co://,format=raw,media=disk", "-device", "virtio-scsi-pci,id=scsi,addr=8"),
    *("-drive", "if=none,id=d,file=null-co://,format=raw", "-device", "scsi-hd,drive=d,bus=scsi.0"),
    *("-device", "isa-debugcon,chardev=c", "-chardev", "null,id=c"),
]


def machine_of(qmp: Path, *command: str) -> Machine:
    """Return the description of the machine that a command starts."""
    with running([*command, "-S", "-qmp", f"unix:{qmp},server=on,wait=off"], qmp), surveyed(qmp) as ram:
        return ram.machine


def bare(qemu: Qemu, machine: str, *more: str) -> list[str]:
    """Start a QEMU with everything that it has by itself."""
    return [*qemu.command, "-accel", "tcg", "-display", "none", "-m", "64M", "-machine", machine, *more]


OPTIONS = {"": [], "none": ["-nodefaults"], "max": ["-cpu", "max"], "devices": DEVICES}
MACHINES = {
    "pc-i440fx-7.2": OPTIONS,
    "pc-q35-7.2": OPTIONS,
    "pc-q35-7.2,usb=on,hpet=off": OPTIONS,
    "microvm": ["", "none", "max"],  # it has no PCI and no sockets
}


@pytest.mark.parametrize(
    ("machine", "options"), [(machine, each) for machine, options in MACHINES.items() for each in options]
)
def test_each_qemu_describes_a_machine_in_the_same_way(qmp: Path, machine: str, options: str) -> None:
    old, new = qemus.found("system"), qemus.found("10.0")
    if not (old.knows(machine.partition(",")[0]) and old.number < new.number):
        pytest.skip(f"{old} does not have this machine type, or is not older than {new}")
    saved, started = (machine_of(qmp, *bare(each, machine, *OPTIONS[options])) for each in (old, new))
    assert saved.devices == started.devices
    assert saved.smp == started.smp
    assert saved.cpu is not None
    assert started.cpu is not None
    assert saved.cpu.model == started.cpu.model == ("max" if options == "max" else "qemu64")
    # QEMU 10 has more features under TCG, and the type of a microvm has no version.
    name = saved.ram[0].backend
    assert saved.check_against(started) == {name: name}


def test_a_machine_is_described(qmp: Path, qemu: Qemu) -> None:
    machine = machine_of(qmp, *bare(qemu, "pc", "-nodefaults", *DEVICES))
    assert machine.version == 2
    assert machine.qemu_version == qemu.version
    assert machine.target == "x86_64"
    assert machine.state == "paused"
    assert machine.smp == Smp(3, 4, sockets=2, dies=1, cores=2, threads=1)
    assert machine.cpu is not None
    assert machine.cpu.model == "qemu64"
    # The features that every 64-bit processor has: fpu, and lm.
    assert int(machine.cpu.features["1.0.EDX"], 16) & 1
    assert int(machine.cpu.features["80000001.0.EDX"], 16) >> 29 & 1
    assert machine.devices is not None
    assert sorted(machine.devices, key=lambda each: (each.type, each.address, each.id)) == machine.devices
    assert {
        Device("virtio-scsi-pci", "08.0", "scsi"),
        Device("1af4:1004", "00:08.0", "scsi"),
        Device("8086:1237", "00:00.0"),
        Device("usb-kbd", id="keys"),
        Device("usb-tablet"),
        Device("scsi-hd"),
        Device("ide-hd"),
        Device("isa-debugcon"),
    } <= set(machine.devices)


@pytest.mark.parametrize(
    ("saved", "started", "difference"),
    [
        ("-cpu max", "-cpu qemu64", r"CPU model \(-cpu\) of the saved guest is max, but that .* is qemu64"),
        ("-cpu qemu64,+avx2", "", r"CPU .* lacks features of the saved guest, in CPUID 7\.0\.EBX: 0x20:"),
        ("", "-device virtio-rng-pci", r"has devices that .*: 1af4:1005 at 00:02\.0, virtio-rng-pci at 02\.0:"),
        ("-device virtio-rng-pci", "", r"lacks devices of the saved guest: 1af4:1005 at 00:02\.0, virtio-rng-pci"),
        ("-device virtio-rng-pci,addr=5", "-device virtio-rng-pci,addr=6", r"at 00:05\.0.*at 00:06\.0"),
        ("", "-vga std", r"has devices that .*: 1234:1111 at 00:02\.0"),
        ("-vga std", "-vga cirrus", r"lacks devices .* 1234:1111 at 00:02\.0; .* has devices .* 1013:00b8 at 00:02\.0"),
        ("", "-machine usb=on", r"has devices that .*: 8086:7020 at 00:01\.2"),
        ("-serial null", "", r"lacks devices of the saved guest: isa-serial"),
        ("-smp 1", "-smp 2", r"CPUs \(-smp\) of the saved guest is 1 of 1 .* is 2 of 2 \(sockets="),
        (
            "-smp 4,sockets=4",
            "-smp 4,cores=4,sockets=1",
            r"\(sockets=4, dies=1, cores=1, .*\(sockets=1, dies=1, cores=4",
        ),
    ],
)
def test_each_difference_is_named(qmp: Path, qemu: Qemu, saved: str, started: str, difference: str) -> None:
    one, other = (machine_of(qmp, *bare(qemu, "pc", "-nodefaults", *each.split())) for each in (saved, started))
    with pytest.raises(vmsnap.QemuError, match=difference) as caught:
        one.check_against(other)
    assert "pass ignore_differences=True (--force)" in str(caught.value)
    assert one.check_against(other, ignore_differences=True) == {"pc.ram": "pc.ram"}
    assert one.check_against(one) == {"pc.ram": "pc.ram"}


def test_more_features_and_other_ids_are_no_difference(qmp: Path, qemu: Qemu) -> None:
    device = "-device virtio-rng-pci"
    plain = machine_of(qmp, *bare(qemu, "pc", "-nodefaults", *device.split()))
    more = machine_of(qmp, *bare(qemu, "pc", "-nodefaults", "-cpu", "qemu64,+avx2", *f"{device},id=rng".split()))
    plain.check_against(more)


@row("qemu-other-machine")
def test_a_load_with_another_processor_is_refused_unless_forced(tmp_path: Path, qmp: Path, qemu: Qemu) -> None:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    with running(qemu_command(qmp, "-cpu", "max", qemu=qemu), qmp):
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
    other = qemu_command(qmp, "-cpu", "qemu64", "-device", "virtio-rng-pci", qemu=qemu)
    message = "CPU model .* is max, .* is qemu64; the started QEMU has devices .*virtio-rng-pci"
    with refused("qemu-other-machine", message, folder):
        vmsnap.qemu.load(folder / "vm1", other)
    line = error_of(run("qemu", "load", folder / "vm1", "--", *other, status=1))
    assert "--force" in line
    alike = qemu_command(qmp, "-cpu", "max,+vmx", qemu=qemu)
    with ended(vmsnap.qemu.load(folder / "vm1", alike, paused=True, overwrite=True).process):
        assert ask(qmp, "query-status")["status"] == "paused"


# Without QEMU ---------------------------------------------------------------------------------------------------------


def machine(**change: Any) -> Machine:
    ram = [RamRange("mem", 0, 0, 3072 * MIB), RamRange("mem", 4096 * MIB, 3072 * MIB, 1024 * MIB)]
    made = Machine("7.2.22", "x86_64", "pc-q35-7.2", ram, cpu=Cpu("max", {"1.0.EDX": "0x0000000f"}), smp=Smp(1, 1))
    return dataclasses.replace(made, **change)


def test_all_differences_are_in_one_error() -> None:
    started = machine(
        qemu_version="7.1.0", target="aarch64", machine_type="virt-7.1", ram=[RamRange("mem", 0, 0, MIB)], smp=Smp(2, 2)
    )
    with pytest.raises(vmsnap.QemuError) as caught:
        machine().check_against(started)
    text = str(caught.value)
    for part in (
        "the architecture of the saved guest is x86_64, but that of the started QEMU is aarch64",
        "the machine type of the saved guest is pc-q35-7.2, but that of the started QEMU is virt-7.1",
        "3072 MiB of backend 'mem' at 0x0, 1024 MiB of backend 'mem' at 0x100000000, but that of the started",
        "saved by QEMU 7.2.22, but the started QEMU is 7.1.0",
        "the number of CPUs (-smp)",
    ):
        assert part in text
    # Nothing of this can be ignored.
    assert "--force" not in text
    with pytest.raises(vmsnap.QemuError, match="architecture"):
        machine().check_against(started, ignore_differences=True)


def test_memory_may_have_other_names() -> None:
    other = [dataclasses.replace(each, backend="ram", block="/objects/ram") for each in machine().ram]
    assert machine().check_against(machine(ram=other)) == {"mem": "/objects/ram"}
    # Two blocks instead of one.
    other = [RamRange("a", 0, 0, 3072 * MIB), RamRange("b", 4096 * MIB, 3072 * MIB, 1024 * MIB)]
    for saved, started in ((machine(), machine(ram=other)), (machine(ram=other), machine())):
        with pytest.raises(vmsnap.QemuError, match="the memory of the saved guest is"):
            saved.check_against(started)


def test_memory_at_no_address_is_told_by_its_name() -> None:
    def with_bar(name: str, base: int) -> Machine:
        return machine(ram=[*machine().ram, RamRange(name, base, 0, MIB, mapped=False)])

    names = with_bar("bar", 1 << 52).check_against(with_bar("bar", (1 << 52) + MIB))
    assert names == {"mem": "mem", "bar": "bar"}
    with pytest.raises(vmsnap.QemuError, match=r"1 MiB of backend 'bar', but that .* 1 MiB of backend 'baz'"):
        with_bar("bar", 1 << 52).check_against(with_bar("baz", 1 << 52))


@pytest.mark.parametrize("word", ["", "-1", "f" * 9, "0x", "ten", "1\n"])
def test_a_feature_that_is_not_a_number_is_refused(word: str) -> None:
    with pytest.raises(vmsnap.QemuError, match="not a number of 32 bits"):
        machine(cpu=Cpu("max", {"1.0.EDX": word})).check_against(machine())


def test_a_long_list_of_differences_is_cut() -> None:
    devices = [Device(f"device-{number}") for number in range(1000)]
    with pytest.raises(vmsnap.QemuError, match=r"lacks devices .*: device-0, .* and 992 more: start") as caught:
        machine(devices=devices).check_against(machine(devices=[]))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("missing", [["cpu"], ["smp"], ["devices"], ["cpu", "smp", "devices"]])
def test_only_what_is_described_is_compared(missing: list[str]) -> None:
    saved = machine(**{"devices": [], **dict.fromkeys(missing)})
    other = machine(cpu=Cpu("qemu64"), smp=Smp(2, 2), devices=[Device("hpet")])
    if len(missing) == 3:
        assert saved.check_against(other) == {"mem": "mem"}
        return
    with pytest.raises(vmsnap.QemuError) as caught:
        saved.check_against(other)
    for name, told in (("cpu", "CPU model"), ("smp", "number of CPUs"), ("devices", "hpet")):
        assert (told in str(caught.value)) == (name not in missing)


def test_a_description_of_version_1_reads(tmp_path: Path) -> None:
    """As vmsnap 0.1 wrote it."""
    old = {
        "qemu_version": "7.2.22",
        "target": "x86_64",
        "machine_type": "pc-q35-7.2",
        "ram": [{"backend": "mem", "guest_base": 0, "offset": 0, "size": 256 * MIB}],
        "command_line": ["qemu-system-x86_64"],
        "format": "vmsnap-qemu",
        "version": 1,
    }
    with vmsnap.create(tmp_path / "vm1") as writer:
        writer.write_fragment("machine", old)
    read = vmsnap.open(tmp_path / "vm1").read_fragment("machine", type=Machine)
    read.check_format(str(tmp_path))
    assert read.ram == [RamRange("mem", 0, 0, 256 * MIB)]
    assert (read.state, read.cpu, read.smp, read.devices) == ("", None, None, None)
    started = machine(ram=read.ram, devices=[Device("hpet")])
    assert read.check_against(started) == {"mem": "mem"}


def test_a_description_comes_back_and_is_shown(tmp_path: Path) -> None:
    written = machine(devices=[Device("virtio-net-pci", "03.0", "net0")], state="running")
    with vmsnap.create(tmp_path / "vm1") as writer:
        writer.write_fragment("machine", written)
    assert vmsnap.open(tmp_path / "vm1").read_fragment("machine", type=Machine) == written
    shown = json.loads(run("show", tmp_path / "vm1", "machine", "--json").stdout)
    assert shown["cpu"] == {"model": "max", "features": {"1.0.EDX": "0x0000000f"}}
    assert shown["devices"] == [{"type": "virtio-net-pci", "address": "03.0", "id": "net0"}]
    assert shown["state"] == "running"
