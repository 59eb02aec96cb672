"""``vmsnap verify``: everything in a snapshot, compared with its manifest."""

import json

import click

import vmsnap
from vmsnap import Verification
from vmsnap.cli.command import Command
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import expect_seal_digest_option, json_option
from vmsnap.cli.targets import doubt, expecting_snapshot, snapshot_argument
from vmsnap.cli.terminal import human_size, printable
from vmsnap.inspection import is_marked


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _as_json(report: Verification) -> str:
    return json.dumps(
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


def _print(report: Verification, *, marked: bool) -> None:
    # Without a manifest and without tags there is nothing to compare a fragment with.
    states = {path: "read" if state == "ok" and not marked else state for path, state in report.fragments.items()}
    width = max(map(len, states.values()), default=0)
    for path, state in states.items():
        click.echo(f"{state:<{width}}  {printable(path)}")
    for problem in report.problems:
        click.echo(f"{problem.kind}: {printable(problem.path) or '.'}: {printable(problem.text)}", err=True)
    for text in report.not_checked:
        click.echo(f"not checked: {printable(text)}", err=True)
    if not report.ok:
        skipped = len(report.not_checked)
        rest = f"{_counted(skipped, 'check')} skipped" if skipped else "all fragments were read"
        click.echo(f"FAILED: {_counted(len(report.problems), 'problem')}, {rest}")
        return
    fragments = _counted(len(report.fragments), "fragment")
    click.echo(f"ok: {fragments} checked, {human_size(report.verified_bytes)}, sealed")
    if report.seal_digest is not None:
        click.echo(f"seal digest: {report.seal_digest.hex()}")


@click.command(
    cls=Command, examples=["vmsnap verify vm1", "vmsnap verify vm1 --key-file vm.key --expect-seal-digest 1f2e..."]
)
@snapshot_argument
@opening_options
@expect_seal_digest_option
@json_option
@store_options
@click.pass_context
def verify(
    context: click.Context, snapshot: Snapshot, keys: OpeningKeys, expect_seal_digest: str | None, as_json: bool
) -> None:
    """Check everything in a snapshot against its seal.

    The exit code is 0 if everything was checked and nothing is wrong, otherwise 1. It is also 1 if a part was not
    checked because the key of an encrypted snapshot is missing, and if the snapshot is not sealed, because nothing
    shows then whether it is complete. A directory that is not a snapshot is refused with exit code 4.
    """
    marked = is_marked(snapshot)
    if not marked:
        with expecting_snapshot(snapshot):
            vmsnap.inspect(snapshot)
        doubt(snapshot)
    report = vmsnap.verify(snapshot, expect_seal_digest=expect_seal_digest, **keys.arguments(snapshot))
    if as_json:
        click.echo(_as_json(report))
    else:
        _print(report, marked=marked)
    context.exit(0 if report.ok else 1)
