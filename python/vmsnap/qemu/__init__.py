"""Saving a running QEMU guest into a snapshot, and resuming it from one. Linux only, over QMP.

`save` pauses the guest, stores the device state of QEMU and the guest memory, and resumes the guest. `load` starts
QEMU, restores both, and resumes the guest. ``docs/qemu.md`` has examples, and the QEMU options that a guest needs.

The modules: ``saving`` and ``loading`` do the work. ``monitor`` talks to QEMU over QMP, ``machine`` describes the
machine, ``survey`` finds the guest memory, ``process`` finds QEMU itself, and ``devices`` transfers the device state.
``started`` is a QEMU that vmsnap started for loading, and ``background`` keeps blocking calls out of the event loop.
"""

try:
    from qemu import qmp as _qmp  # noqa: F401  imported first, so that the error names the extra
except ModuleNotFoundError:
    raise ModuleNotFoundError("vmsnap.qemu needs qemu.qmp: pip install 'vmsnap[qemu]'", name="qemu.qmp") from None

from vmsnap.qemu.loading import LoadReport, load, load_async
from vmsnap.qemu.machine import Cpu, Device, Machine, RamRange, Smp
from vmsnap.qemu.saving import SaveReport, save, save_async

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
    "save",
    "save_async",
]
