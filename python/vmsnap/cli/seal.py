"""``vmsnap seal``: a manifest for a snapshot that was written in place."""

import click

import vmsnap
from vmsnap.cli.command import Command
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot
from vmsnap.cli.options import no_durable_option
from vmsnap.cli.targets import snapshot_argument


@click.command(cls=Command, examples=["vmsnap seal vm1", "vmsnap seal vm1 --key-file vm.key > vm1.digest"])
@snapshot_argument
@opening_options
@no_durable_option
def seal(snapshot: Snapshot, keys: OpeningKeys, no_durable: bool) -> None:
    """Seal a snapshot, and print its seal digest.

    This is for a snapshot that was written in place, as by "vmsnap put --create". Sealing writes a manifest of all
    fragments. After that nothing can be added, and "vmsnap verify" finds every change. Keep the digest elsewhere:
    "vmsnap verify --expect-seal-digest" then also detects that the whole snapshot was replaced. A snapshot is sealed
    once.
    """
    try:
        digest = vmsnap.seal(snapshot, **keys.arguments(snapshot), durable=not no_durable)
    except vmsnap.SealedError as error:
        text = f"{snapshot} is already sealed, so there is nothing to do; vmsnap verify prints its seal digest"
        raise vmsnap.SealedError(text) from error
    click.echo(digest.hex())
