"""Keys: what a snapshot is written for, and what opens it.

>>> import vmsnap
>>> identity = vmsnap.generate_identity()
>>> identity[:15]
'AGE-SECRET-KEY-'
>>> (recipient,) = vmsnap.recipients_of(identity)
>>> recipient[:4]
'age1'
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from vmsnap import _vmsnap
from vmsnap.errors import InvalidArgumentError, NewIdentityWarning

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

__all__ = ["IdentityFile", "KeyProvider", "generate_identity", "recipients_of", "rekey"]

#: A text, its bytes (a bytearray is cleared once it was taken), or what is called when it is needed and returns one.
Passphrase: TypeAlias = str | bytes | bytearray | Callable[[], str | bytes | bytearray]


class KeyProvider(Protocol):
    """A key service of the caller's: KMS, Vault, TPM. Any object that has these.

    What it wraps is some 130 bytes, and holds the snapshot's data key. It must authenticate: `unwrap` must raise for
    anything that `wrap` did not return. An attribute ``timeout_seconds`` says how long it may take to answer, if not
    60 s. Both methods are called in a thread of their own.
    """

    @property
    def name(self) -> str:
        """What the service is called: written into the snapshot, and no secret."""

    def wrap(self, payload: bytes, /) -> bytes:
        """Encrypt."""

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """Decrypt what `wrap` returned."""


@dataclass(frozen=True)
class IdentityFile:
    """A file of identities that is itself encrypted: by ``age -p``, or an SSH key with a passphrase."""

    path: "StrOrBytesPath"
    passphrase: Passphrase = field(repr=False)


#: The text (``AGE-SECRET-KEY-1...``, an SSH private key) or the path of a file that has it.
Identity: TypeAlias = str | os.PathLike[str] | IdentityFile


def generate_identity() -> str:
    """Return a new age identity: a secret, which opens what is written for its recipient (`recipients_of`)."""
    return _vmsnap.generate_identity()[0]


def recipients_of(identity: Identity) -> list[str]:
    """Return the recipients of an identity, or of all in a file: what to encrypt to so that it opens the snapshot.

    Raises
    ------
    InvalidArgumentError
        It is no identity, or one of a plugin's, which alone can tell.
    OSError, KeyUnavailableError
        As for opening a snapshot with it.
    """
    return _vmsnap.recipients_of(_identity(identity))


def rekey(
    root: "StrOrBytesPath",
    *,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: Passphrase | None = None,
    key_provider: KeyProvider | None = None,
    recipients: str | Iterable[str] | None = None,
    new_key: "ReadableBuffer | None" = None,
    new_passphrase: Passphrase | None = None,
    new_key_provider: KeyProvider | None = None,
) -> None:
    """Wrap a snapshot's data key anew, so that something else opens it: milliseconds, whatever its size.

    What opened it before does not any more. That takes back nothing: whoever has opened the snapshot, or kept a copy of
    ``enc_metadata``, can go on reading its fragments, and forge them, for the data key stays what it is. To lock
    somebody out, copy it into a new snapshot: ``vmsnap encrypt``.

    Parameters
    ----------
    root
        The snapshot's folder. Only the file ``enc_metadata`` in it is replaced; after a crash there is the old or the
        new one.
    key, identities, passphrase, key_provider
        One of them: what opens it now, as for `SnapshotReader`. The default identity, where none is given.
    recipients, new_key, new_passphrase, new_key_provider
        One of them: what is to open it from now on, as for `SnapshotWriter`.

    Raises
    ------
    InvalidArgumentError
        Nothing says what is to open it, or several things do.
    NotEncryptedError
        The snapshot is plain.
    KeyUnavailableError, AuthenticationError, CorruptSnapshotError, UnsupportedFormatError, OSError
        As for opening it. It stays as it was.
    """
    old = reading(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    new = writing(key=new_key, recipients=recipients, passphrase=new_passphrase, key_provider=new_key_provider)
    _vmsnap.rekey(os.fsdecode(root), old, new)


def writing(
    encrypt: bool = False,
    *,
    key: "ReadableBuffer | None" = None,
    recipients: str | Iterable[str] | None = None,
    passphrase: Passphrase | None = None,
    key_provider: KeyProvider | None = None,
) -> _vmsnap.Credentials:
    """Return what a snapshot is to be written for."""
    texts = None if recipients is None else [recipients] if isinstance(recipients, str) else list(recipients)
    return _vmsnap.Credentials(encrypt, key, texts, None, passphrase, key_provider, _announce)


def reading(
    require_encrypted: bool = False,
    *,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: Passphrase | None = None,
    key_provider: KeyProvider | None = None,
) -> _vmsnap.Credentials:
    """Return what a snapshot is to be opened with."""
    if isinstance(identities, (str, os.PathLike, IdentityFile)):
        identities = [identities]
    listed = None if identities is None else [_identity(identity) for identity in identities]
    return _vmsnap.Credentials(require_encrypted, key, None, listed, passphrase, key_provider, None)


def _announce(text: str) -> None:
    """Warn the caller of this package that an identity is about to be made; as an error this prevents it."""
    # This function was called from Rust, which has no frame, and that from a function of this package.
    warnings.warn(text, NewIdentityWarning, stacklevel=3)


def _identity(identity: Identity) -> "tuple[str | Path, bool, Passphrase | None]":
    if isinstance(identity, IdentityFile):
        return Path(os.fsdecode(identity.path)), True, identity.passphrase
    if isinstance(identity, str):
        if not identity.lstrip().startswith(("AGE-", "#", "-----BEGIN ")):
            # Not quoted: it may be a secret all the same.
            raise InvalidArgumentError("an identity begins with AGE-SECRET-KEY- or the like; a file is given as a Path")
        return identity, False, None
    return Path(os.fsdecode(identity)), True, None
