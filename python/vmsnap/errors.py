"""Exceptions. An error of the operating system stays an `OSError` with its errno, such as `FileExistsError`."""

__all__ = [
    "AuthenticationError",
    "CorruptSnapshotError",
    "InvalidArgumentError",
    "KeyUnavailableError",
    "NewIdentityWarning",
    "NotEncryptedError",
    "NotSealedError",
    "QemuError",
    "SealedError",
    "SerializationError",
    "StateError",
    "UnsupportedFormatError",
    "VmsnapError",
]


class VmsnapError(Exception):
    """The base of all exceptions of this package."""


class AuthenticationError(VmsnapError):
    """A key or data failed authentication.

    The key is wrong, or the file is damaged, truncated, renamed, moved or from another snapshot. Cryptography cannot
    tell these apart.
    """


class KeyUnavailableError(VmsnapError):
    """The key of an encrypted snapshot is not available.

    No key was given or found; the given one is of another kind than the snapshot's; other users may read its file; or
    the plugin or key service that has the key failed.
    """


class NotEncryptedError(VmsnapError):
    """An encrypted snapshot was required, or a key was given, and the snapshot is plain."""


class NotSealedError(VmsnapError):
    """A sealed snapshot was required, and this one has no manifest."""


class CorruptSnapshotError(VmsnapError):
    """The data on disk is not valid in a snapshot: a link, a special file, a malformed header or value."""


class UnsupportedFormatError(VmsnapError):
    """The snapshot needs a newer version of vmsnap, or its key is wrapped in a way that this version cannot open.

    For a file to import: it is of a format that vmsnap cannot import, or it is truncated or damaged.
    """


class InvalidArgumentError(VmsnapError, ValueError):
    """An argument is not allowed: a name, a chunk size, a key length, an offset, a thread count or another value."""


class SerializationError(VmsnapError, ValueError):
    """A value cannot be written as CBOR or JSON. The text names the part of the value that cannot."""


class QemuError(VmsnapError):
    """QEMU refused a command, failed or ended, or its guest cannot be saved or loaded in its present state."""


class NewIdentityWarning(UserWarning):
    """An age identity is made for the user. Back it up: snapshots encrypted to it cannot be opened without it."""


class StateError(VmsnapError):
    """A fragment or a snapshot cannot be used in its present state.

    An earlier write failed; a fragment is still being written or was never finished; or this process was forked from
    the one that opened it.
    """


class SealedError(VmsnapError):
    """The snapshot is sealed already: nothing can be added to it, and it cannot be sealed again."""
