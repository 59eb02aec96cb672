"""``vmsnap keygen`` and ``vmsnap rekey``: identities, and what a snapshot's key is wrapped with."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import click

import vmsnap
from vmsnap.cli.files import named
from vmsnap.cli.keys import OpeningKeys, WritingKeys, identity_of, opening_options, writing_options
from vmsnap.cli.paths import PATH
from vmsnap.cli.places import directory_argument, write_all
from vmsnap.keys import identity_file


@click.command()
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Write it to a new file.")
@click.option("--recipient", type=PATH, metavar="FILE", help="Print the recipients of a file.")
def keygen(output: Path | None, recipient: Path | None) -> None:
    """Make an age identity, or tell the recipient of one.

    The identity is a secret: who has it can open what is written for its recipient. It is printed, or written to a new
    file that only you may read; the recipient is told on standard error.

    With --recipient, print the recipients of the identities in a file instead.
    """
    if recipient is not None:
        lines = vmsnap.recipients_of(identity_of(recipient))
        if output is None:
            click.echo("\n".join(lines))
        else:
            _write_new(output, "\n".join(lines) + "\n", mode=0o666)
        return
    identity = vmsnap.generate_identity()
    [public] = vmsnap.recipients_of(identity)
    content = identity_file(identity)
    if output is None:
        sys.stdout.write(content)
        if not sys.stdout.isatty():
            click.echo(f"Public key: {public}", err=True)
    else:
        _write_new(output, content, mode=0o600)
        click.echo(f"Public key: {public}", err=True)


def _write_new(path: Path, content: str, *, mode: int) -> None:
    with named(path), open(path, "xb", buffering=0, opener=lambda path, flags: os.open(path, flags, mode)) as file:
        try:
            write_all(file, memoryview(content.encode()))
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise


@click.command()
@directory_argument
@opening_options
@writing_options("new-")
def rekey(directory: Path, keys: OpeningKeys, new_keys: WritingKeys) -> None:
    """Wrap the key of a snapshot anew, so that something else opens it.

    What opens it now is said as for other commands, or is your own identity; what is to open it by -r, -R,
    --new-key-file or one of --new-passphrase... Only the file enc_metadata is replaced, so it takes no time.

    It takes nothing back from those who could open the snapshot before: they may have kept its key. To lock somebody
    out, copy it into a new one with "vmsnap encrypt".
    """
    if not new_keys.given:
        raise click.UsageError("say what is to open it: -r, -R, --new-key-file or --new-passphrase")
    vmsnap.rekey(
        directory,
        **keys.arguments(directory),
        recipients=new_keys.recipients,
        new_key=new_keys.key,
        new_passphrase=new_keys.passphrase,
    )
