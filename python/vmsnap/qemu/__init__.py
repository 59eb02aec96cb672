"""A running QEMU guest, saved into a snapshot and resumed from one; on Linux, over QMP.

`save` stops the guest, takes QEMU's device state and the guest's memory, and lets it go on; `load` starts QEMU, brings
both back and lets the guest go on where it stood. ``docs/qemu.md`` shows it, and how the guest has to be started.

``monitor`` talks to a QEMU, ``machine`` asks what it runs and finds its memory, ``devices`` moves their state, and
``saving`` and ``loading`` do it; ``started`` is a QEMU that is to load, and ``background`` keeps what blocks
out of the event loop.
"""

try:
    from qemu import qmp as _qmp  # noqa: F401  asked for first, so that what is missing is said well
except ModuleNotFoundError:
    raise ModuleNotFoundError("vmsnap.qemu needs qemu.qmp: pip install 'vmsnap[qemu]'", name="qemu.qmp") from None

from vmsnap.qemu.loading import LoadReport, load, load_async
from vmsnap.qemu.machine import Machine, RamRange
from vmsnap.qemu.saving import SaveReport, save, save_async

__all__ = ["LoadReport", "Machine", "RamRange", "SaveReport", "load", "load_async", "save", "save_async"]
