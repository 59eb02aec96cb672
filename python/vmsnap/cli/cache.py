"""``vmsnap cache``: the local cache of data from object stores."""

import json
from pathlib import Path

import click

from vmsnap._cache import cache_usage, empty_cache
from vmsnap.cli.command import Command
from vmsnap.cli.location import cache_directory
from vmsnap.cli.options import json_option
from vmsnap.cli.paths import PATH
from vmsnap.cli.terminal import human_size, print_table, printable, to_terminal


@click.command(cls=Command, examples=["vmsnap cache", "vmsnap cache --clear"])
@click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    envvar="VMSNAP_CACHE",
    help="The directory of the cache; VMSNAP_CACHE names another one.  [default: $XDG_CACHE_HOME/vmsnap]",
)
@click.option("--clear", is_flag=True, help="Remove all of it.")
@json_option
def cache(cache: Path | None, clear: bool, as_json: bool) -> None:
    """Show or clear the local cache of data from object stores.

    Commands that read a snapshot at a URL keep the blocks that they fetched, as these are stored: encrypted data stays
    encrypted.
    The oldest blocks are removed when the cache has 10 GiB or a tenth of the free space.

    Clearing is always safe, also while other commands use the cache.
    """
    directory = cache_directory(cache)
    if clear:
        removed = empty_cache(directory)
        if as_json:
            told = {"directory": str(directory), "blocks": removed.blocks, "bytes": removed.bytes}
            click.echo(json.dumps(told))
        else:
            click.echo(f"vmsnap: removed {removed.blocks} blocks, {human_size(removed.bytes)}", err=True)
        return
    usage = cache_usage(directory)
    if as_json:
        told = {
            "directory": str(directory),
            "blocks": usage.blocks,
            "bytes": usage.bytes,
            "limit_bytes": usage.limit_bytes,
        }
        click.echo(json.dumps(told))
        return
    size_of = human_size if to_terminal() else str
    rows = [
        ("directory", printable(str(directory))),
        ("blocks", str(usage.blocks)),
        ("size", size_of(usage.bytes)),
        ("limit", size_of(usage.limit_bytes)),
    ]
    if to_terminal():
        print_table(rows)
    else:
        click.echo("".join(f"{label}\t{text}\n" for label, text in rows), nl=False)
