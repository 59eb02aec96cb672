"""The survey of a QEMU that runs, by a connection of its own."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmsnap.qemu.monitor import connected, connection_to
from vmsnap.qemu.survey import Block, Ram, survey


@contextmanager
def surveyed(qmp: Path, pid: int | None = None, *, to_fill: bool = False) -> Iterator[Ram]:
    """Survey the QEMU with this socket; the files of its memory are open during the block."""

    async def looking(stack: ExitStack) -> Ram:
        async with connected(connection_to(qmp), "QEMU") as monitor:
            return await survey(monitor, stack, pid, to_fill=to_fill)

    with ExitStack() as stack:
        yield asyncio.run(looking(stack))


def only_block(ram: Ram) -> Block:
    [block] = ram.blocks
    return block
