"""``vmsnap verify``, ``seal`` and ``clean``: complete or absent."""

import json
from pathlib import Path

import click

import vmsnap
from vmsnap.cli.keys import OpeningKeys, no_durable_option, opening_options
from vmsnap.cli.names import NAME
from vmsnap.cli.paths import PATH
from vmsnap.cli.places import directory_argument, json_option
from vmsnap.cli.terminal import human_size, printable

_expect_option = click.option(
    "--expect-seal-digest",
    metavar="HEX",
    type=NAME,
    help="Accept only the snapshot with this seal digest, kept elsewhere.",
)


@click.command()
@directory_argument
@opening_options
@_expect_option
@json_option
@click.pass_context
def verify(
    context: click.Context, directory: Path, keys: OpeningKeys, expect_seal_digest: str | None, as_json: bool
) -> None:
    """Read all of a snapshot, and tell everything that is not as it was sealed.

    Exits 0 if all was checked and is well, else 1. Without the key of an encrypted snapshot it checks what can be
    checked, says what it could not, and exits 1.
    """
    report = vmsnap.verify(directory, expect_seal_digest=expect_seal_digest, **keys.arguments(directory))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "ok": report.ok,
                    "problems": [vars(problem) for problem in report.problems],
                    "not_checked": report.not_checked,
                    "fragments": report.fragments,
                    "verified_bytes": report.verified_bytes,
                    "snapshot_id": report.snapshot_id.hex() if report.snapshot_id else None,
                    "seal_digest": report.seal_digest.hex() if report.seal_digest else None,
                },
                indent=2,
            )
        )
    else:
        width = max((len(state) for state in report.fragments.values()), default=0)
        for path, state in report.fragments.items():
            click.echo(f"{state:<{width}}  {printable(path)}")
        for problem in report.problems:
            click.echo(f"{problem.kind}: {printable(problem.path) or '.'}: {printable(problem.text)}", err=True)
        for text in report.not_checked:
            click.echo(f"not checked: {printable(text)}", err=True)
        if report.ok:
            click.echo(f"ok: {len(report.fragments)} fragments, {human_size(report.verified_bytes)}")
            if report.seal_digest is not None:
                click.echo(f"seal digest: {report.seal_digest.hex()}")
        else:
            click.echo(f"not ok: {len(report.problems)} problems, {len(report.not_checked)} things not checked")
    context.exit(0 if report.ok else 1)


@click.command()
@directory_argument
@opening_options
@no_durable_option
def seal(directory: Path, keys: OpeningKeys, no_durable: bool) -> None:
    """Seal a snapshot that was written in place, and print its seal digest.

    From then on nothing can be added to it, and "vmsnap verify" finds whatever is changed. Kept elsewhere, the digest
    tells whether it is still the same.
    """
    click.echo(vmsnap.seal(directory, **keys.arguments(directory), durable=not no_durable).hex())


@click.command()
@click.argument("parent", type=PATH)
def clean(parent: Path) -> None:
    """Remove what killed writers left behind in a folder; what a living process holds stays.

    Those are hidden folders of snapshots that were never completed, named .vmsnap- and 16 hexadecimal digits. On file
    systems that several hosts write to (NFS, SMB, 9p, FUSE and others) nothing is removed, for no lock tells of them.
    """
    cleaned = vmsnap.clean(parent)
    for path in cleaned.removed:
        click.echo(f"removed {printable(str(path))}")
    for path in cleaned.held:
        click.echo(f"left, in use: {printable(str(path))}", err=True)
