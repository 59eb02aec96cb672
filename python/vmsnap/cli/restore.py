"""``vmsnap restore``: guest memory out of a snapshot, into a sparse raw file."""

import errno

import click

from vmsnap import GuestRegion
from vmsnap.cli.command import Command, argument
from vmsnap.cli.failure import CommandError
from vmsnap.cli.io import new_file, refuse_inside
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import force_option, threads_option, uncached_option
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.targets import complete_file, namespace_option, open_memory, snapshot_argument
from vmsnap.cli.terminal import human_size, progress_so_far


@click.command(
    cls=Command, examples=["vmsnap restore vm1 ram.img", "vmsnap restore vm1 high.img --region 1 --key-file vm.key"]
)
@snapshot_argument
@argument("file", metavar="FILE", description="The raw file to write.", type=TEXT_PATH, shell_complete=complete_file)
@namespace_option
@opening_options
@click.option(
    "--region", type=click.IntRange(min=0), metavar="N", help="Write only region N; the first one is region 0."
)
@force_option
@uncached_option
@threads_option
@store_options
def restore(
    snapshot: Snapshot,
    file: str,
    namespace: str,
    keys: OpeningKeys,
    region: int | None,
    force: bool,
    uncached: bool,
    threads: int | None,
) -> None:
    """Write the guest memory of a snapshot to a sparse raw file.

    The file begins with the lowest guest-physical address. Every region is at its distance from that address, and a gap
    between two regions is a hole in the file. With --region, the file contains only that region.

    FILE is created with mode 0600. An existing FILE is refused, unless it is a regular file and --force is given.
    Files inside a snapshot are never written. A restore that fails leaves nothing behind.
    """
    memory = open_memory(snapshot, namespace, keys, threads)
    refuse_inside(file, snapshot)
    regions = memory.regions
    if region is not None and region >= len(regions):
        raise CommandError(f"{snapshot}: there is no region {region}; the {len(regions)} regions are numbered from 0")
    wanted = range(len(regions)) if region is None else range(region, region + 1)
    lowest = min((regions[number].start for number in wanted), default=0)
    with new_file(file, force=force) as out, progress_so_far("restore") as show:
        targets = [
            GuestRegion(each.start, out.fileno(), offset=each.start - lowest) if number in wanted else None
            for number, each in enumerate(regions)
        ]
        try:
            memory.restore(targets, uncached=uncached, progress=show)
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            span = human_size(max(regions[number].stop for number in wanted) - lowest)
            raise CommandError(
                f"{file}: cannot be as large as the {span} between the lowest and the highest address; "
                "restore one region at a time with --region N"
            ) from error
