"""Snapshots from files of other programs, and files for other programs from snapshots.

The modules: ``importing`` and ``exporting`` do the work. ``source`` is the file that is read, and ``compression`` the
programs that decompress it. ``foreign`` lists the first bytes of other formats. ``libvirt`` is the file of
``virsh save``, ``domain`` the XML in it, and ``layout`` tells where the blocks of a migration stream are in guest
memory. ``new_file`` is a file that is complete or absent.
"""

from vmsnap.exchange.exporting import ExportReport, export_file
from vmsnap.exchange.importing import ImportReport, import_file

__all__ = ["ExportReport", "ImportReport", "export_file", "import_file"]
