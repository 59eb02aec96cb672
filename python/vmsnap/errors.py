"""Exceptions. What the operating system refuses stays an `OSError` with its errno (`FileExistsError` and so on)."""

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
    """A tag did not verify.

    The key is wrong, or the file is damaged, truncated, renamed, moved or from another snapshot. Cryptography cannot
    tell these apart.
    """


class KeyUnavailableError(VmsnapError):
    """There is no key for a snapshot that is, or is to be, encrypted.

    None was given and none found, one of another kind than it was written with, a file that others may read, or what
    holds the key (a plugin, a key service) failed.
    """


class NotEncryptedError(VmsnapError):
    """An encrypted snapshot was required, or a key was given, and the snapshot is plain."""


class NotSealedError(VmsnapError):
    """A sealed snapshot was required, and this one has no manifest."""


class CorruptSnapshotError(VmsnapError):
    """What is on disk cannot be a snapshot's: a link, a special file, a header that is none, a malformed value."""


class UnsupportedFormatError(VmsnapError):
    """The snapshot needs a newer version of vmsnap, or its key is wrapped in a way this version does not open."""


class InvalidArgumentError(VmsnapError, ValueError):
    """A name, a chunk size, a key length, an offset or a thread count that is not allowed."""


class SerializationError(VmsnapError, ValueError):
    """A value that cannot be written as CBOR or JSON; the text says what in it, and where."""


class QemuError(VmsnapError):
    """QEMU refuses, fails or ends, or what it runs cannot be saved or loaded as it is."""


class NewIdentityWarning(UserWarning):
    """An age identity is made for the user. Back it up: snapshots encrypted to it cannot be opened without it."""


class StateError(VmsnapError):
    """A fragment or a snapshot cannot be used in its current state.

    An earlier write failed; a fragment is still being written or was never finished; or this process was forked from
    the one that opened it.
    """


class SealedError(VmsnapError):
    """The snapshot is sealed already: nothing can be added to it, and it cannot be sealed again."""
