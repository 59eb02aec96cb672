"""The command ``vmsnap``.

Each module is one noun, and imports only modules further down in this list.

- ``group`` puts the commands together, and reports errors.
- The commands: ``info``, ``tree``, ``ls``, ``show``, ``cat``, ``get``, ``put``; ``dump``, ``restore``, ``peek``,
  ``map``, ``dump_process``; ``qemu``; ``push`` (and pull), ``cache``; ``keygen``, ``rekey``, ``convert`` (encrypt,
  decrypt); ``verify``, ``seal``, ``clean``, ``rm``, ``demo`` (with the process ``demo_child``), ``completion``.
- Modules that commands share: ``entry`` (a fragment in a list), ``targets`` (SNAPSHOT and PATH), ``keys`` (options for
  keys), ``location`` (paths and URLs, options for object stores), ``options`` (other options), ``command`` (their
  help); ``image`` and ``foreign`` (raw files), ``process`` and ``hold`` (live processes), ``values`` and ``hexdump``
  (text for stored values and bytes).
- Input and output: ``io`` (new files, fragments in batches), ``keyfile``, ``names`` and ``paths`` (types of arguments),
  ``failure`` (errors), ``terminal``, ``streams`` (the standard streams), ``files`` (files whose errors name them).
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
        # The two packages of the extra. Any other missing module is a broken installation, and its error must be seen.
        if missing.name not in {"click", "rich"}:
            raise
        print("vmsnap: error: the command line needs click and rich: pip install 'vmsnap[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
