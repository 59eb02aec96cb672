"""``vmsnap push`` and ``vmsnap pull``: a whole snapshot into an object store, and out of it."""

import click

import vmsnap
from vmsnap import Location
from vmsnap.cli.command import Command, argument
from vmsnap.cli.keys import OpeningKeys, asked, opening_options
from vmsnap.cli.location import URL, Snapshot, new_store_options
from vmsnap.cli.options import (
    archive_option,
    expect_seal_digest_option,
    no_durable_option,
    take_over_option,
    threads_option,
)
from vmsnap.cli.targets import new_snapshot_argument, snapshot_argument
from vmsnap.cli.terminal import human_size, progress_so_far

_url_argument = argument(
    "url",
    metavar="URL",
    description="The snapshot in the object store: s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH.",
    type=URL,
)


@click.command(
    cls=Command,
    examples=["vmsnap push vm1 s3://bucket/vm1", "vmsnap push vm1.vmsnap.tar gs://bucket/fleet/vm1 -i id.txt"],
)
@snapshot_argument
@_url_argument
@opening_options
@expect_seal_digest_option
@take_over_option
@threads_option
@new_store_options
def push(
    snapshot: Snapshot,
    url: Location,
    keys: OpeningKeys,
    expect_seal_digest: str | None,
    take_over: bool,
    threads: int | None,
) -> None:
    """Copy a sealed snapshot into an object store.

    Each fragment becomes an object, byte for byte, and is checked before it is sent. The manifest comes last: before
    that, nobody takes the objects for a snapshot. Nothing is overwritten. The seal digest is printed on standard error.

    A push that is interrupted or fails leaves the objects that it sent, and the next push of the same snapshot sends the
    rest. "vmsnap clean URL" removes them instead.
    """
    arguments = asked(keys.arguments(snapshot))
    with progress_so_far("push") as show:
        pushed = vmsnap.push(
            snapshot,
            url,
            **arguments,
            expect_seal_digest=expect_seal_digest,
            take_over=take_over,
            threads=threads,
            progress=show,
        )
    if pushed.already_there:
        click.echo("vmsnap: already there", err=True)
    else:
        resumed = f", and {human_size(pushed.resumed_bytes)} before" if pushed.resumed_bytes else ""
        click.echo(f"vmsnap: sent {human_size(pushed.sent_bytes)}{resumed}", err=True)
    click.echo(f"vmsnap: seal digest: {pushed.seal_digest.hex()}", err=True)


@click.command(
    cls=Command,
    examples=["vmsnap pull s3://bucket/vm1 vm1", "vmsnap pull az://container/vm1 vm1.vmsnap.tar --key-file vm.key"],
)
@_url_argument
@new_snapshot_argument
@opening_options
@expect_seal_digest_option
@archive_option
@threads_option
@no_durable_option
@new_store_options
def pull(
    url: Location,
    new_snapshot: Snapshot,
    keys: OpeningKeys,
    expect_seal_digest: str | None,
    archive: bool | None,
    threads: int | None,
    no_durable: bool,
) -> None:
    """Copy a snapshot out of an object store.

    NEW-SNAPSHOT is a directory, or one file if its name ends in .vmsnap.tar. It is the snapshot that was pushed, byte
    for byte. Each fragment is checked while it is copied. The seal digest is printed on standard error.

    NEW-SNAPSHOT appears when it is complete. If pulling fails, nothing is left behind.
    """
    arguments = asked(keys.arguments(url))
    with progress_so_far("pull") as show:
        seal = vmsnap.pull(
            url,
            new_snapshot,
            **arguments,
            expect_seal_digest=expect_seal_digest,
            archive=archive,
            threads=threads,
            durable=not no_durable,
            progress=show,
        )
    click.echo(f"vmsnap: seal digest: {seal.seal_digest.hex()}", err=True)
