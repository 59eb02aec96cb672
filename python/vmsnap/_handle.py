"""The part that the handles of writers and readers have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

from vmsnap import _vmsnap
from vmsnap.location import local_path

__all__: list[str] = []


class Handle:
    """A writer or a reader of one namespace. It can be copied, and pickled to travel to another process."""

    _raw: _vmsnap.SnapshotReader | _vmsnap.SnapshotWriter
    _raw_class: ClassVar[type[_vmsnap.SnapshotReader] | type[_vmsnap.SnapshotWriter]]

    @property
    def location(self) -> str:
        """The location of the snapshot: the absolute path of its directory or archive, or its URL."""
        return self._raw.location

    @property
    def path(self) -> Path | None:
        """The location as a `pathlib.Path`; None if it is a URL."""
        return local_path(self._raw.location)

    @property
    def namespace_path(self) -> str:
        """The namespace that this handle is for: names joined with ``/``, empty at the root of the snapshot."""
        return self._raw.namespace_path

    @property
    def encrypted(self) -> bool:
        """Whether the snapshot is encrypted."""
        return self._raw.encrypted

    @classmethod
    def _of(cls, raw: _vmsnap.SnapshotReader | _vmsnap.SnapshotWriter) -> Self:
        handle = cls.__new__(cls)
        handle._raw = raw
        return handle

    def __reduce__(self) -> tuple[Callable[[bytes], Self], tuple[bytes]]:
        """Pickle the handle with its data key: anybody who can read the pickle can read the snapshot."""
        return self._from_state, (self._raw.to_state(),)

    @classmethod
    def _from_state(cls, state: bytes) -> Self:
        return cls._of(cls._raw_class.from_state(state))

    def __repr__(self) -> str:
        namespace = f" namespace={self.namespace_path!r}" if self.namespace_path else ""
        state = "encrypted" if self.encrypted else "plain"
        return f"<vmsnap.{type(self).__name__} {self.location!r}{namespace} {state}>"
