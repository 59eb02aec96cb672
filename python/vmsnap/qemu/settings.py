"""The migration settings of QEMU that a save changes."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from vmsnap.errors import QemuError
from vmsnap.qemu.monitor import Monitor

# Bytes per second. The default limit of QEMU is for a network, and would keep the guest paused for longer.
_MAX_BANDWIDTH = 1 << 40

# These would turn a migration into a pipe into another one.
_PLAIN: dict[str, Any] = {"max-bandwidth": _MAX_BANDWIDTH, "tls-creds": "", "mode": "normal"}


@dataclass(frozen=True)
class Settings:
    """Migration capabilities and parameters, by name."""

    capabilities: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)

    async def put(self, monitor: Monitor) -> None:
        """Set them."""
        if self.capabilities:
            listed = [{"capability": name, "state": state} for name, state in self.capabilities.items()]
            await monitor.run("migrate-set-capabilities", capabilities=listed)
        if self.parameters:
            await monitor.run("migrate-set-parameters", **self.parameters)


async def differing(monitor: Monitor, on: Set[str], parameters: dict[str, Any]) -> tuple[Settings, Settings]:
    """Return the settings of QEMU that differ from those for a save, as they are and as they should be.

    Parameters
    ----------
    monitor
        The connection to QEMU.
    on
        The capabilities that should be on. All others should be off, because they are for a network, and some change
        the format of the state. ``events`` is on too where QEMU has it.
    parameters
        The parameters that the save needs besides an unlimited bandwidth.

    Raises
    ------
    QemuError
        This QEMU does not have one of the capabilities.
    """
    capabilities = {each["capability"]: each["state"] for each in await monitor.run("query-migrate-capabilities")}
    if missing := sorted(on - capabilities.keys()):
        raise QemuError(f"this QEMU is too old: it lacks the migration capability {missing[0]}; use QEMU 4 or newer")
    wanted = {name: name in on or name == "events" for name in capabilities}
    found = await monitor.run("query-migrate-parameters")
    values = {name: value for name, value in {**_PLAIN, **parameters}.items() if name in found}
    changed = [name for name in wanted if wanted[name] != capabilities[name]]
    set_anew = [name for name in values if values[name] != found[name]]
    return (
        Settings({name: capabilities[name] for name in changed}, {name: found[name] for name in set_anew}),
        Settings({name: wanted[name] for name in changed}, {name: values[name] for name in set_anew}),
    )
