"""``vmsnap keygen``: age identities, and the recipients of them."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import click

import vmsnap
from vmsnap.cli.command import Command
from vmsnap.cli.files import named
from vmsnap.cli.io import write_all
from vmsnap.cli.keys import identity_of
from vmsnap.cli.paths import PATH
from vmsnap.keys import identity_file


@click.command(cls=Command, examples=["vmsnap keygen -o id.txt", "vmsnap keygen --recipient id.txt"])
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Write to a new file.  [default: standard output]")
@click.option("--recipient", type=PATH, metavar="FILE", help="Print the recipients of this identity file instead.")
def keygen(output: Path | None, recipient: Path | None) -> None:
    """Create an age identity, or print the recipient of one.

    The identity is a secret: it opens all snapshots that are encrypted to its recipient. The file gets mode 0600, and
    an existing file is never overwritten. If the identity does not go to the terminal, its recipient is printed on
    standard error.
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
