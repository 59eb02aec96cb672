"""The command ``vmsnap``: dump memory into a snapshot, look into one, copy in and out.

``group`` puts the commands together and reports errors. ``dump``, ``look`` (ls, cat), ``tree``, ``show``, ``info``,
``memory`` (dump-memory, restore-memory, peek), ``map``, ``qemu``, ``copy``, ``convert``, ``rewrap``, ``completion`` and
``demo`` are the commands; ``values`` and ``hexdump`` make text of what is stored. ``places`` knows how DIR and PATH
lead into a snapshot, ``keys`` the options for what opens one, ``keyfile`` reads a key and ``process`` a live process;
``holder`` is the child that ``demo`` dumps; ``terminal`` knows what depends on where the output goes, ``streams`` the
standard streams; ``files`` is a file whose errors name it, and ``names`` what a name is on the command line.
"""

import sys

from vmsnap.cli.streams import take_standard_streams

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status."""
    take_standard_streams()
    try:
        from vmsnap.cli.group import run
    except ModuleNotFoundError as missing:
        # The two packages of the extra; any other missing module is a broken installation and must be seen as such.
        if missing.name not in {"click", "rich"}:
            raise
        print("vmsnap: error: the command line needs click and rich: pip install 'vmsnap[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
