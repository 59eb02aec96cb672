"""The survey of a QEMU that runs, by a connection of its own."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmsnap.qemu.monitor import connected, connection_to
from vmsnap.qemu.survey import Block, Ram, survey


@contextmanager
def surveyed(qmp: Path | socket.socket, pid: int | None = None, *, to_fill: bool = False) -> Iterator[Ram]:
    """Survey the QEMU at this socket or connection; the files of its memory are open during the block."""
    connection = qmp if isinstance(qmp, socket.socket) else connection_to(qmp)

    async def looking(stack: ExitStack) -> Ram:
        async with connected(connection, "QEMU") as monitor:
            return await survey(monitor, stack, pid, to_fill=to_fill)

    with ExitStack() as stack:
        yield asyncio.run(looking(stack))


def only_block(ram: Ram) -> Block:
    [block] = ram.blocks
    return block
