"""The options for keys: the key that opens a snapshot, and the keys that can open a new one."""

import getpass
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

import vmsnap
from vmsnap import IdentityFile, SnapshotReader, SnapshotWriter, StagedSnapshot
from vmsnap.cli.command import with_options
from vmsnap.cli.failure import CommandError
from vmsnap.cli.files import NamedFile
from vmsnap.cli.keyfile import read_key_file, read_private
from vmsnap.cli.location import Snapshot
from vmsnap.cli.names import NAME
from vmsnap.cli.paths import PATH, TEXT_PATH
from vmsnap.cli.terminal import printable
from vmsnap.keys import Passphrase, key_wrapping, read_recipients_file

# The limit for a passphrase with its newline.
_MAX_PASSPHRASE_BYTES = 4096


def _any_given(*options: object) -> bool:
    """Return whether any option is given. An empty one is given, too."""
    return any(option is not None for option in options)


@dataclass(frozen=True)
class OpeningKeys:
    """The key, identities or passphrase that opens a snapshot: at most one of them."""

    key: bytes | None = None
    identities: tuple[Path, ...] | None = None
    passphrase: Passphrase | None = None

    @property
    def given(self) -> bool:
        """Whether any of them is given."""
        return _any_given(self.key, self.identities, self.passphrase)

    def arguments(self, root: Snapshot | None) -> dict[str, Any]:
        """Return the keyword arguments for the snapshot at `root`; None for one that comes through a pipe."""
        if self.key is not None:
            return {"key": self.key}
        if self.identities is not None:
            return {"identities": [identity_of(path) for path in self.identities]}
        passphrase = self.passphrase
        if passphrase is None and root is not None and _is_passphrase(root):
            passphrase = _asker(f"Passphrase of {root}: ")
        return {} if passphrase is None else {"passphrase": passphrase}

    def for_new(self, recipients: tuple[str, ...] | None) -> "WritingKeys":
        """Return the keys for a new snapshot: recipients, or this key or passphrase."""
        if self.identities is not None:
            raise click.UsageError(
                "an identity only opens snapshots: to create a snapshot, give the identity's recipient with -r or -R"
            )
        if recipients is not None and self.given:
            raise click.UsageError("give only one of recipients, a key and a passphrase for the new snapshot")
        # A mistyped passphrase only fails to open a snapshot, but nobody would open a new one with it.
        asked = callable(self.passphrase)
        return WritingKeys(
            False, self.key, recipients, _asker("New passphrase: ", twice=True) if asked else self.passphrase
        )

    def open(self, root: Snapshot, *, threads: int | None = None) -> SnapshotReader:
        """Open a snapshot for reading."""
        return SnapshotReader(root, **self.arguments(root), threads=threads)

    def append(self, root: Snapshot, *, threads: int | None = None) -> SnapshotWriter:
        """Open a snapshot to add to it."""
        return SnapshotWriter.open(root, **self.arguments(root), threads=threads)


@dataclass(frozen=True)
class WritingKeys:
    """The key, recipients or passphrase that a new snapshot is encrypted with: at most one of them.

    If none is given and `encrypt` is true, it is the user's own identity. None means "not given". An empty value is
    passed on for the library to refuse: taken for "not given", it would make a plain snapshot.
    """

    encrypt: bool = False
    key: bytes | None = None
    recipients: tuple[str, ...] | None = None
    passphrase: Passphrase | None = None

    @property
    def given(self) -> bool:
        """Whether any of them is given."""
        return _any_given(self.key, self.recipients, self.passphrase)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for functions that create a snapshot."""
        return {
            "encrypt": self.encrypt,
            "key": self.key,
            "recipients": self.recipients,
            "passphrase": self.passphrase,
        }

    def stage(self, location: Snapshot, **options: Any) -> StagedSnapshot:
        """Begin a snapshot that appears when it is complete, sealed. `options` go to `vmsnap.create`."""
        return vmsnap.create(location, **self.arguments, **options)

    def create(self, root: Snapshot, *, threads: int | None = None) -> SnapshotWriter:
        """Create a snapshot in place, to which more can be added."""
        return SnapshotWriter(root, **self.arguments, threads=threads)


def identity_of(path: Path) -> IdentityFile:
    """Return the identities in a file. If it is encrypted, its passphrase is asked for when it is needed."""
    return IdentityFile(path, _asker(f"Passphrase of {path}: "))


def _is_passphrase(root: Snapshot) -> bool:
    try:
        wrapping = key_wrapping(root)
    except (vmsnap.VmsnapError, OSError):
        return False  # opening the snapshot raises a better error
    return wrapping is not None and wrapping.kind == "passphrase"


def _asker(prompt: str, *, twice: bool = False) -> Callable[[], str]:
    """Return a function that asks for a passphrase on the terminal, without echo."""

    def ask() -> str:
        # Otherwise getpass reads standard input, with echo.
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        except OSError:
            raise CommandError(
                "a passphrase is needed, and there is no terminal to ask on: use --passphrase-file or --passphrase-fd"
            ) from None
        passphrase = getpass.getpass(prompt)
        if twice and getpass.getpass("Repeat the passphrase: ") != passphrase:
            raise CommandError("the two passphrases differ")
        return passphrase

    return ask


def _read_passphrase(source: str | int) -> bytearray:
    """Return the first line of a file that only its owner may use, or of an open descriptor."""
    content = _read_descriptor(source) if isinstance(source, int) else read_private(source)
    line = content.split(b"\n", 1)[0].removesuffix(b"\r")
    if not line or len(line) > _MAX_PASSPHRASE_BYTES:
        named = f"file descriptor {source}" if isinstance(source, int) else source
        raise CommandError(f"{named}: the first line must be a passphrase of 1 to {_MAX_PASSPHRASE_BYTES} bytes")
    return line


def _read_descriptor(number: int) -> bytearray:
    with NamedFile(number, "rb", f"file descriptor {number}", closefd=False) as file:
        content = bytearray()
        while len(content) <= _MAX_PASSPHRASE_BYTES and (data := file.read(_MAX_PASSPHRASE_BYTES + 1)):
            content += data
    return content


def _read_recipients(path: Path) -> list[str]:
    """Return the recipients in a file, and report ignored lines on standard error."""
    recipients, ignored = read_recipients_file(path)
    for text in ignored:
        click.echo(f"vmsnap: {printable(f'{path}: {text}')}", err=True)
    return recipients


def _passphrase(options: dict[str, Any], prefix: str, prompt: str, *, twice: bool) -> Passphrase | None:
    asked = options.pop(f"{prefix}passphrase")
    file, descriptor = options.pop(f"{prefix}passphrase_file"), options.pop(f"{prefix}passphrase_fd")
    if asked + (file is not None) + (descriptor is not None) > 1:
        raise click.UsageError(
            f"give only one of --{prefix}passphrase, --{prefix}passphrase-file and --{prefix}passphrase-fd"
        )
    if asked:
        return _asker(prompt, twice=twice)
    source = file if file is not None else descriptor
    return None if source is None else _read_passphrase(source)


def _key(path: Path | None) -> bytes | None:
    return None if path is None else read_key_file(path)


_Command = Callable[..., Any]


def _passphrase_options(prefix: str, what: str) -> list[Callable[[_Command], _Command]]:
    return [
        click.option(f"--{prefix}passphrase", is_flag=True, help=f"Ask for {what} on the terminal."),
        click.option(
            f"--{prefix}passphrase-file",
            type=TEXT_PATH,
            metavar="FILE",
            help="Read the passphrase from the first line of a file that only you may read.",
        ),
        click.option(
            f"--{prefix}passphrase-fd",
            type=click.IntRange(min=0),
            metavar="N",
            help="Read the passphrase from an open file descriptor.",
        ),
    ]


def _key_file_option(prefix: str) -> Callable[[_Command], _Command]:
    text = "The key: a file with 32 bytes or 64 hex digits that only you may read."
    return click.option(f"--{prefix}key-file", type=PATH, metavar="FILE", help=text)


_IDENTITY_OPTION = click.option(
    "-i",
    "--identity",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Age identities or an SSH private key, in a file. May be repeated.",
)
_RECIPIENT_OPTIONS = [
    click.option(
        "-r",
        "--recipient",
        type=NAME,
        multiple=True,
        metavar="TEXT",
        help="An age recipient (age1...) or an SSH public key that can open the snapshot. May be repeated.",
    ),
    click.option(
        "-R",
        "--recipients-file",
        type=PATH,
        multiple=True,
        metavar="FILE",
        help="A file of recipients, one per line. May be repeated.",
    ),
]


def opening_options(command: _Command) -> _Command:
    """Give a command the options for opening a snapshot. It gets `keys`."""

    @wraps(command)
    def wrapped(**options: Any) -> Any:
        return command(keys=_opening(options), **options)

    return with_options([_key_file_option(""), _IDENTITY_OPTION, *_passphrase_options("", "the passphrase")], wrapped)


def _opening(options: dict[str, Any]) -> OpeningKeys:
    # An option that may be repeated is an empty tuple if it is not given.
    key_file, identities = options.pop("key_file"), options.pop("identity") or None
    passphrase = _passphrase(options, "", "Passphrase: ", twice=False)
    if (key_file is not None) + (identities is not None) + (passphrase is not None) > 1:
        raise click.UsageError("give only one of --key-file, --identity and a passphrase")
    return OpeningKeys(_key(key_file), identities, passphrase)


def recipient_options(command: _Command) -> _Command:
    """Give a command the options for recipients. It gets `recipients`."""

    @wraps(command)
    def wrapped(**options: Any) -> Any:
        return command(recipients=_recipients(options), **options)

    return with_options(_RECIPIENT_OPTIONS, wrapped)


def _recipients(options: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the recipients, or None if there are no such options. A file without recipients is an error."""
    texts, files = options.pop("recipient"), options.pop("recipients_file")
    if not texts and not files:
        return None
    return (*texts, *(recipient for path in files for recipient in _read_recipients(path)))


def writing_options(prefix: str = "") -> Callable[[_Command], _Command]:
    """Give a command the options for who can open a new snapshot. It gets `new_keys`."""

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def wrapped(**options: Any) -> Any:
            return command(new_keys=_writing(options, prefix), **options)

        passphrase = _passphrase_options(prefix, "a new passphrase, twice")
        return with_options([_key_file_option(prefix), *_RECIPIENT_OPTIONS, *passphrase], wrapped)

    return decorate


def _writing(options: dict[str, Any], prefix: str) -> WritingKeys:
    name = prefix.replace("-", "_")
    key_file = options.pop(f"{name}key_file")
    recipients = _recipients(options)
    passphrase = _passphrase(options, name, "New passphrase: ", twice=True)
    if (key_file is not None) + (recipients is not None) + (passphrase is not None) > 1:
        raise click.UsageError("give only one of a key file, recipients and a passphrase")
    return WritingKeys(options.pop("encrypt", False), _key(key_file), recipients, passphrase)


def show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """Print a warning as the command line prints messages, without a line of code."""
    print(f"vmsnap: {message}", file=sys.stderr)


def asked(arguments: dict[str, Any]) -> dict[str, Any]:
    """Ask for a passphrase now: in this thread, which Ctrl-C interrupts, and before a progress bar is drawn."""
    passphrase = arguments.get("passphrase")
    return arguments | {"passphrase": passphrase()} if callable(passphrase) else arguments
