"""Keys that encrypt and open snapshots.

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
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from vmsnap import _vmsnap
from vmsnap.errors import InvalidArgumentError, NewIdentityWarning
from vmsnap.location import SnapshotLocation, located

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

__all__ = [
    "IdentityFile",
    "KeyProvider",
    "KeyWrapping",
    "Keys",
    "generate_identity",
    "identity_file",
    "key_wrapping",
    "read_recipients_file",
    "read_secret_file",
    "recipients_of",
    "rekey",
]

#: A text, its bytes (a bytearray is cleared after it is read), or a callable that returns one when it is needed.
Passphrase: TypeAlias = str | bytes | bytearray | Callable[[], str | bytes | bytearray]


class KeyProvider(Protocol):
    """A key service of the caller, such as a KMS, Vault or a TPM: any object with these attributes.

    It wraps about 130 bytes, which contain the snapshot's data key. It must authenticate: `unwrap` must raise for
    anything that `wrap` did not return. An attribute ``timeout_seconds`` limits how long each call may take; by default
    60 s. Both methods are called in a thread of their own.
    """

    @property
    def name(self) -> str:
        """The name of the service. It is written into the snapshot and is not a secret."""

    def wrap(self, payload: bytes, /) -> bytes:
        """Return `payload` encrypted."""

    def unwrap(self, wrapped: bytes, /) -> bytes:
        """Return the payload of `wrapped`, which `wrap` returned."""


@dataclass(frozen=True)
class IdentityFile:
    """A file of identities that is itself encrypted: by ``age -p``, or an SSH key with a passphrase."""

    path: "StrOrBytesPath"
    passphrase: Passphrase = field(repr=False)


#: The text of an identity (``AGE-SECRET-KEY-1...`` or an SSH private key), or the path of a file that contains it.
Identity: TypeAlias = str | os.PathLike[str] | IdentityFile


@dataclass(frozen=True, eq=False, kw_only=True)
class Keys:
    """The key that encrypts a new snapshot or opens an existing one.

    Every function that takes these attributes as keyword arguments also accepts ``keys=``. At most one of `key`,
    `recipients`, `identities`, `passphrase` and `key_provider` may be given, and any of them implies `encrypt`. The
    representation of the object shows no secret.

    >>> import vmsnap
    >>> keys = vmsnap.Keys(key=vmsnap.generate_key())
    >>> keys
    Keys(key=...)

    Attributes
    ----------
    encrypt
        Encrypt a new snapshot; refuse to open one that is not encrypted.
    key
        32 bytes that wrap the snapshot's data key, from `generate_key`.
    recipients
        To write: the age recipients (``age1...``) or SSH public keys that can open the snapshot.
    identities
        To read: the identities of such recipients, each a text, a path or an `IdentityFile`.
    passphrase
        A passphrase, or a callable that returns one.
    key_provider
        A key service of your own, see `KeyProvider`.
    """

    encrypt: bool = False
    key: "ReadableBuffer | None" = None
    recipients: str | Iterable[str] | None = None
    identities: Identity | Iterable[Identity] | None = None
    passphrase: Passphrase | None = None
    key_provider: KeyProvider | None = None

    def __post_init__(self) -> None:
        # An iterator could be read only once; the object may be used many times.
        if self.recipients is not None:
            recipients = [self.recipients] if isinstance(self.recipients, str) else self.recipients
            object.__setattr__(self, "recipients", tuple(recipients))
        if self.identities is not None:
            identities = self.identities
            if isinstance(identities, (str, os.PathLike, IdentityFile)):
                identities = [identities]
            object.__setattr__(self, "identities", tuple(identities))

    @property
    def given(self) -> bool:
        """Whether anything is given."""
        return self.encrypt or any(getattr(self, name) is not None for name in _KINDS)

    def __repr__(self) -> str:
        shown = ["encrypt=True"] if self.encrypt else []
        for name in _KINDS:
            if (value := getattr(self, name)) is not None:
                shown.append(f"{name}={list(value)!r}" if name == "recipients" else f"{name}=...")
        return f"Keys({', '.join(shown)})"

    def _credentials(self) -> _vmsnap.Credentials:
        """Return these keys as the core takes them."""
        recipients = None if self.recipients is None else list(self.recipients)
        identities = None
        if self.identities is not None:
            identities = [_identity(identity) for identity in cast("tuple[Identity, ...]", self.identities)]
        return _vmsnap.Credentials(
            self.encrypt,
            self.key,
            recipients,
            identities,
            self.passphrase,
            self.key_provider,
            _warn_of_new_identity,
        )


_KINDS = ("key", "recipients", "identities", "passphrase", "key_provider")


def one_of(keys: Keys | None, given: Keys) -> Keys:
    """Return the keys that a caller passed: as ``keys=``, or by single keyword arguments.

    Raises
    ------
    InvalidArgumentError
        Both were passed, or ``keys=`` is empty, which must not mean "not encrypted".
    """
    if keys is None:
        return given
    if not isinstance(keys, Keys):
        raise TypeError(f"keys must be vmsnap.Keys, not {type(keys).__name__}")
    if given.given:
        raise InvalidArgumentError("keys= and single key arguments were passed together: pass one or the other")
    if not keys.given:
        raise InvalidArgumentError("keys= holds no key: leave it out, or pass Keys(encrypt=True) for your own identity")
    return keys


@dataclass(frozen=True)
class KeyWrapping:
    """The way in which the data key of an encrypted snapshot is wrapped. None of the attributes is authenticated.

    Attributes
    ----------
    kind
        ``raw-key``, ``age``, ``passphrase`` or ``key-provider``.
    name
        The name of the key service, for ``key-provider``.
    recipients
        The kind of each recipient, for ``age``. The recipients themselves are not stored.
    """

    kind: str
    name: str | None
    recipients: list[str]


def key_wrapping(location: SnapshotLocation) -> KeyWrapping | None:
    """Return how the data key of a snapshot is wrapped; None if the snapshot is not encrypted. No key is needed.

    Only ``enc_metadata`` is read; `inspect` looks at the whole snapshot.

    Raises
    ------
    FileNotFoundError
        The snapshot does not exist.
    CorruptSnapshotError
        ``enc_metadata`` is not a wrapped key.
    """
    wrapping = _vmsnap.key_wrapping(located(location))
    return None if wrapping is None else KeyWrapping(*wrapping)


def generate_identity() -> str:
    """Return a new age identity. It is a secret: it opens snapshots encrypted to its recipient, see `recipients_of`."""
    return _vmsnap.generate_identity()[0]


def identity_file(identity: str) -> str:
    """Return the text of a file that holds an identity, as ``age-keygen`` writes it.

    Raises
    ------
    InvalidArgumentError
        `identity` is not an age identity.
    """
    return _vmsnap.identity_file(identity.strip(), recipients_of(identity)[0])


def recipients_of(identity: Identity) -> list[str]:
    """Return the recipients of an identity, or of all identities in a file.

    The identity opens snapshots that are encrypted to its recipient.

    Raises
    ------
    InvalidArgumentError
        `identity` is not an identity, or it is the identity of a plugin, whose recipient only the plugin knows.
    OSError, KeyUnavailableError
        The file cannot be read, or may be read by others.
    """
    return _vmsnap.recipients_of(_identity(identity))


def read_recipients_file(path: "StrOrBytesPath") -> tuple[list[str], list[str]]:
    """Return the recipients in a file, one per line, and a warning for each line that was ignored.

    Raises
    ------
    InvalidArgumentError
        A line is not a recipient, or the file contains no recipient.
    OSError
        The file cannot be read.
    """
    return _vmsnap.read_recipients(os.fsdecode(path))


def read_secret_file(path: "StrOrBytesPath") -> bytearray:
    """Return the contents of a file that holds a secret.

    Raises
    ------
    KeyUnavailableError
        Users other than the owner may read or change the file.
    OSError
        The file cannot be read.
    """
    return _vmsnap.read_secret_file(os.fsdecode(path))


def rekey(
    location: SnapshotLocation,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: Passphrase | None = None,
    key_provider: KeyProvider | None = None,
    new_keys: Keys | None = None,
    recipients: str | Iterable[str] | None = None,
    new_key: "ReadableBuffer | None" = None,
    new_passphrase: Passphrase | None = None,
    new_key_provider: KeyProvider | None = None,
) -> None:
    """Change the key of a snapshot, without copying the snapshot. This takes milliseconds for any size.

    The previous keys no longer open the snapshot. This does not revoke access: the data key stays the same, so anyone
    who has opened the snapshot, or kept a copy of ``enc_metadata``, can still read its fragments and forge them. To
    lock somebody out, copy the snapshot into a new one: ``vmsnap encrypt``.

    Parameters
    ----------
    location
        The snapshot: a directory, an archive, or a URL. Only ``enc_metadata`` is replaced; after a crash it is the old
        or the new one.
    keys, key, identities, passphrase, key_provider
        The key that opens the snapshot now, as for `SnapshotReader`: one of these. By default the user's own identity.
    new_keys, recipients, new_key, new_passphrase, new_key_provider
        The key that opens the snapshot from now on, as for `SnapshotWriter`: one of these.

    Raises
    ------
    InvalidArgumentError
        No new keys are given, or more than one kind.
    NotEncryptedError
        The snapshot is not encrypted.
    KeyUnavailableError, AuthenticationError, CorruptSnapshotError, UnsupportedFormatError, OSError
        The snapshot cannot be opened. It is unchanged.
    """
    old = one_of(keys, Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider))
    new = one_of(
        new_keys,
        Keys(key=new_key, recipients=recipients, passphrase=new_passphrase, key_provider=new_key_provider),
    )
    _vmsnap.rekey(located(location), old._credentials(), new._credentials())


def _warn_of_new_identity(path: Path) -> None:
    """Warn the caller of this package that an identity is about to be made; as an error, the warning prevents it."""
    text = f"creating the identity {path}: back it up, because snapshots encrypted to it cannot be opened without it"
    # The caller's frame is the third: Rust, which called this function, has no frame, and a function of this package
    # called Rust.
    warnings.warn(text, NewIdentityWarning, stacklevel=3)


def _identity(identity: Identity) -> "tuple[str | Path, bool, Passphrase | None]":
    if isinstance(identity, IdentityFile):
        return Path(os.fsdecode(identity.path)), True, identity.passphrase
    if isinstance(identity, str):
        if not identity.lstrip().startswith(("AGE-", "#", "-----BEGIN ")):
            # The error does not quote the text, because it may still be a secret.
            text = "the text is not an identity (AGE-SECRET-KEY-... or similar); pass the path of a file as a Path"
            raise InvalidArgumentError(text)
        return identity, False, None
    return Path(os.fsdecode(identity)), True, None
