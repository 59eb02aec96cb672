"""Live saves of a guest that QEMU emulates, which QEMU alone migrates with stale pages."""

from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from guest import ended, qemu_command, running
from qemus import Qemu
from toy_guest import Toy


def saves_and_loads(tmp_path: Path, qemu: Qemu, count: int) -> None:
    """Save one guest several times while it runs, and load each snapshot: the guest finds its memory, or says so."""
    qmp = tmp_path / "qmp"
    toy = Toy(tmp_path, still_mib=16, moving_mib=16)
    command = qemu_command(qmp, *toy.options, memory="", size="256M", qemu=qemu)
    with running(command, qmp):
        for number in range(count):
            toy.ticks(3)
            report = vmsnap.qemu.save(qmp, tmp_path / f"vm{number}", live=True, durable=False)
            assert report.way == "live"
        toy.ticks(3)
    for number in range(count):
        copy = Toy(tmp_path, f"copy{number}", still_mib=16, moving_mib=16)
        words = [each.replace(str(toy.path), str(copy.path)) for each in command]
        with ended(vmsnap.qemu.load(tmp_path / f"vm{number}", words).process):
            copy.ticks(3)
        copy.close()
    toy.close()


def test_a_guest_is_saved_live_again_and_again(tmp_path: Path, qemu: Qemu) -> None:
    saves_and_loads(tmp_path, qemu, 6)


@pytest.mark.torture
def test_a_guest_is_saved_live_again_and_again_often(tmp_path: Path, qemu: Qemu) -> None:
    saves_and_loads(tmp_path, qemu, 40)
