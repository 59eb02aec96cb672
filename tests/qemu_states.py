"""The state of a QEMU that is being saved, as another client of it sees it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest import PATIENCE, ask

_UNCHANGED = ("max-bandwidth", "downtime-limit", "tls-creds", "mode")


def state(qmp: Path) -> str:
    return str(ask(qmp, "query-status")["status"])


def settings(qmp: Path) -> dict[str, Any]:
    """The capabilities that are on, the parameters that a save changes, and the objects of the user."""
    parameters = ask(qmp, "query-migrate-parameters")
    return {
        "on": sorted(each["capability"] for each in ask(qmp, "query-migrate-capabilities") if each["state"]),
        **{name: parameters.get(name) for name in _UNCHANGED},
        "objects": sorted(each["name"] for each in ask(qmp, "qom-list", path="/objects")),
    }


def is_as_before(qmp: Path) -> bool:
    """Whether the guest runs, no migration goes on, and QEMU has the settings it began with, and no mark of a save."""
    found = settings(qmp)
    migration = ask(qmp, "query-migrate").get("status", "none")
    return (
        state(qmp) == "running"
        and found["on"] == []
        and found["max-bandwidth"] == 128 << 20
        and found["downtime-limit"] == 300
        and "vmsnap-save" not in found["objects"]
        and migration in ("none", "completed", "failed", "cancelled")
    )


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds."""
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, f"never {what}"
        time.sleep(0.01)


def guards(qmp: Path) -> list[int]:
    """The guard processes of saves over a socket: their IDs."""
    found = []
    for each in Path("/proc").iterdir():
        try:
            words = (each / "cmdline").read_bytes().split(b"\0") if each.name.isdecimal() else []
        except OSError:
            continue
        if b"vmsnap-guard" in words and str(qmp).encode() in words:
            found.append(int(each.name))
    return found


def once(call: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a function for `progress=` that calls another one the first time."""
    calls = []

    def progress(_done: int, _total: int) -> None:
        if not calls:
            calls.append(call())

    return progress
