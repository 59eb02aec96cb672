"""The snapshot that a save creates."""

import asyncio
from collections.abc import Callable

from vmsnap.location import SnapshotLocation
from vmsnap.qemu.background import in_thread
from vmsnap.removal import remove_snapshot
from vmsnap.staging import StagedSnapshot
from vmsnap.writer import SnapshotWriter


class NewSnapshot:
    """A snapshot that is complete when its ``with`` block ends, or absent if the block fails."""

    def __init__(self, location: SnapshotLocation, make: Callable[[], StagedSnapshot]) -> None:
        self._location, self._make = location, make
        self._staged: StagedSnapshot | None = None
        self.identifier = self.seal_digest = b""

    @property
    def writer(self) -> SnapshotWriter:
        """The writer. It is another one after each `begin`."""
        assert self._staged is not None
        return self._staged.writer

    async def begin(self) -> None:
        """Create it. If it was created before, it is created again."""

        def create_staged() -> None:
            if self._staged is not None:
                self._staged.discard()
            self._staged = self._make()

        await in_thread(create_staged)

    async def commit(self) -> None:
        """Complete it, if that has not been done. If this is cancelled meanwhile, the snapshot is removed."""
        staged = self._staged
        assert staged is not None
        if staged.seal_digest is None:
            try:
                await in_thread(staged.commit)
            except asyncio.CancelledError:
                if staged.seal_digest is not None:
                    self._staged = None
                    await in_thread(lambda: remove_snapshot(staged.path or self._location))
                raise
        assert staged.snapshot_id is not None
        assert staged.seal_digest is not None
        self.identifier, self.seal_digest = staged.snapshot_id, staged.seal_digest

    async def __aenter__(self) -> "NewSnapshot":
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error is None or self._staged is None:
            return False
        if self.seal_digest:
            # The snapshot is all that is left of the guest. A cancellation came too late.
            task = asyncio.current_task()
            assert task is not None
            return isinstance(error, asyncio.CancelledError) and task.uncancel() == 0
        staged, self._staged = self._staged, None
        try:
            staged.discard()
        except OSError as left:
            error.add_note(f"{left.strerror or left}; vmsnap.clean removes it")
        return False
