"""Saving a running QEMU guest into a snapshot, and resuming it from one. Linux only, over QMP.

`save` stores the guest memory, the device state of QEMU, and a description of the machine, while the guest runs or
stands still. `load` starts QEMU, restores all of it, and resumes the guest. ``docs/qemu.md`` has examples.

The modules: ``saving`` and ``loading`` do the work. ``monitor`` talks to QEMU over QMP, ``machine`` describes the
machine, ``survey`` finds the guest memory, and ``process`` finds QEMU itself. For saving, ``migration`` receives the
stream of QEMU, ``hold`` is the time in which QEMU is not as it was, ``settings``, ``mark`` and ``guard`` see to it that
it is afterwards, and ``shell`` runs a command meanwhile. For loading, ``filling`` plans how memory gets into QEMU,
``incoming`` sends the stream, ``started`` is the process, and ``leftovers`` removes the files of a load that failed.
``background`` keeps blocking calls out of the event loop.
"""

try:
    from qemu import qmp as _qmp  # noqa: F401  imported first, so that the error names the extra
except ModuleNotFoundError:
    raise ModuleNotFoundError("vmsnap.qemu needs qemu.qmp: pip install 'vmsnap[qemu]'", name="qemu.qmp") from None

from vmsnap.qemu.loading import LoadReport, load, load_async
from vmsnap.qemu.machine import Cpu, Device, Machine, RamRange, Smp
from vmsnap.qemu.saving import SaveReport, save, save_async
from vmsnap.qemu.shell import run_command

__all__ = [
    "Cpu",
    "Device",
    "LoadReport",
    "Machine",
    "RamRange",
    "SaveReport",
    "Smp",
    "load",
    "load_async",
    "run_command",
    "save",
    "save_async",
]
