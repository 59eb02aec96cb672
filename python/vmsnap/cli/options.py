"""Options that several commands have. Those for keys are in ``keys``."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from vmsnap.cli.names import NAME

Command = TypeVar("Command", bound=Callable[..., Any])

# As fast as larger chunks, and a random read decrypts no more than this.
CHUNK_BYTES = 1 << 16
# The default of `write_memory`: guest memory is read at random more often than other fragments.
MEMORY_CHUNK_BYTES = 1 << 14

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Number of threads.  [default: one per processor]"
)
no_durable_option = click.option(
    "--no-durable",
    is_flag=True,
    help="Do not wait until the data is on the disk. A power failure can then lose the snapshot.",
)
archive_option = click.option(
    "--archive/--no-archive",
    default=None,
    help="Create one file instead of a directory.  [default: if the name ends in .vmsnap.tar]",
)
take_over_option = click.option(
    "--take-over",
    is_flag=True,
    help="Replace a snapshot at the URL that was begun and not completed. If its writer still runs, it fails.",
)
expect_seal_digest_option = click.option(
    "--expect-seal-digest",
    metavar="HEX",
    type=NAME,
    help="Accept only the snapshot with this seal digest, which you have kept elsewhere.",
)
no_stop_option = click.option(
    "--no-stop",
    is_flag=True,
    help="Do not stop the process. Memory that changes during the dump is stored inconsistently.",
)
force_option = click.option(
    "--force", is_flag=True, help="Overwrite FILE if it is a regular file outside any snapshot."
)
uncached_option = click.option(
    "--uncached",
    is_flag=True,
    help="Bypass the page cache, so that a guest of tens of GiB does not evict other data from it.",
)


def _chunk_size_option(default: int) -> Callable[[Command], Command]:
    return click.option(
        "--chunk-size",
        type=click.IntRange(32, 64 << 20),
        metavar="BYTES",
        default=default,
        show_default=True,
        help="Size of a chunk, the unit of encryption: from 32 bytes to 64 MiB. A read decrypts whole chunks.",
    )


chunk_size_option = _chunk_size_option(CHUNK_BYTES)
memory_chunk_size_option = _chunk_size_option(MEMORY_CHUNK_BYTES)
compress_option = click.option(
    "--compress",
    type=click.Choice(["none", "lz4"]),
    default="none",
    show_default=True,
    help="Compression of guest memory.",
)
encrypt_option = click.option(
    "--encrypt", is_flag=True, help="Encrypt the snapshot, to your own identity unless a key option says otherwise."
)
