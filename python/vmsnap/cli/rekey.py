"""``vmsnap rekey``: wrapping the data key of a snapshot with another key."""

import click

import vmsnap
from vmsnap.cli.command import Command
from vmsnap.cli.keys import OpeningKeys, WritingKeys, opening_options, writing_options
from vmsnap.cli.location import Snapshot, new_store_options
from vmsnap.cli.targets import snapshot_argument


@click.command(
    cls=Command,
    examples=["vmsnap rekey vm1 -R team.txt", "vmsnap rekey vm1 --key-file old.key --new-key-file new.key"],
)
@snapshot_argument
@opening_options
@writing_options("new-")
@new_store_options
def rekey(snapshot: Snapshot, keys: OpeningKeys, new_keys: WritingKeys) -> None:
    """Change the key or the recipients of a snapshot.

    The options -r, -R, --new-key-file and --new-passphrase give the new key or recipients. They replace the old ones.

    Only enc_metadata is replaced, so this takes milliseconds for a snapshot of any size. An archive is copied, unless
    its file system has reflinks.

    This does not revoke access: somebody who could open the snapshot before may have kept its data key. To get a new
    data key, copy the snapshot with "vmsnap encrypt".
    """
    if not new_keys.given:
        raise click.UsageError("give the new key or recipients: -r, -R, --new-key-file or --new-passphrase")
    try:
        vmsnap.rekey(
            snapshot,
            **keys.arguments(snapshot),
            recipients=new_keys.recipients,
            new_key=new_keys.key,
            new_passphrase=new_keys.passphrase,
        )
    except vmsnap.NotEncryptedError as error:
        text = f"{snapshot} is not encrypted, so it has no key to change; vmsnap encrypt makes an encrypted copy"
        raise vmsnap.NotEncryptedError(text) from error
