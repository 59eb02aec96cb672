"""A command of the shell that runs while the guest stands still."""

import asyncio
import os
import signal
from contextlib import suppress

from vmsnap.errors import QemuError
from vmsnap.qemu.background import to_the_end


async def run_command(command: str) -> None:
    """Run a command of the shell and wait for it. If this is cancelled, the command and its children are killed.

    Parameters
    ----------
    command
        The text for ``sh -c``. Its output goes to where that of this process goes.

    Raises
    ------
    QemuError
        The exit status is not 0.
    """
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        status = await process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await to_the_end(process.wait())
        raise
    if status:
        ended = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        raise QemuError(f"the command for the time in which the guest stands still {ended}: {command}")
