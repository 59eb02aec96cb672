"""Formats of memory and disk images that are not raw, recognized by their first bytes.

A dump of such a file would contain headers and compressed data instead of guest memory. A raw image may begin with the
same bytes by chance, so ``vmsnap dump --format raw`` skips this check.
"""

import re
from dataclasses import dataclass

# The signature at the highest offset is at the end of the first page of a swap partition.
HEAD_BYTES = 4096


@dataclass(frozen=True)
class Foreign:
    """A format that is not raw."""

    name: str
    """With its article, as in "is an ELF file"."""
    remedy: str
    """How to get a raw image from the file, or its memory into a snapshot."""
    begins: re.Pattern[bytes]
    """A pattern for the first bytes."""


def _format(begins: bytes, name: str, remedy: str) -> Foreign:
    return Foreign(name, remedy, re.compile(begins, re.DOTALL))


_VOLATILITY = "Volatility 3 makes a raw image of it: vol -f FILE layerwriter"
_IMPORT = "vmsnap import FILE NEW-SNAPSHOT"
_LOAD_AGAIN = "load it into its virtual machine monitor, and save the guest from there with vmsnap qemu save"
_DISK = "make a raw image of it: qemu-img convert -O raw FILE RAM"

FORMATS = (
    # Memory. doc/README.md of 504ensicsLabs/LiME and src/image.rs of microsoft/avml: numbers, little-endian.
    _format(rb"EMiL", "a LiME image", "avml-convert --source-format lime --format raw FILE RAM"),
    _format(rb"AVML", "an AVML image", "avml-convert --source-format lime_compressed --format raw FILE RAM"),
    # elf(5). virsh dump --memory-only, dump-guest-memory, VBoxManage dumpvmcore and xl dump-core write it too.
    _format(
        rb"\x7fELF",
        "an ELF file, such as a core dump",
        "store its LOAD segments, which readelf -lW lists, with --range and --format raw",
    ),
    # src/qemu/qemu_saveimage.h of libvirt for the first; libxl_conf.h and ch_conf.h of libvirt for the second.
    _format(rb"LibvirtQemud(Save|Part)", "a guest saved by libvirt", _IMPORT),
    _format(rb"libvirt-xml\n \0 \r", "a guest saved by libvirt", _LOAD_AGAIN),
    # QEMU_VM_FILE_MAGIC in migration/savevm.h of QEMU, big-endian.
    _format(rb"QEVM", "a migration stream of QEMU", _IMPORT),
    # docs/specs/libxl-migration-stream.pandoc of Xen, and xl_vmcontrol.c.
    _format(rb"Xen saved domain, xl format|LibxlFmt", "a guest saved by Xen", _LOAD_AGAIN),
    # diskdump.h of crash, and include/sysemu/dump.h of QEMU.
    _format(
        rb"makedumpfile\0", "a flattened dump of makedumpfile", "makedumpfile -R DUMP < FILE, then makedumpfile -E"
    ),
    _format(rb"KDUMP   |DISKDUMP", "a compressed dump of makedumpfile", "makedumpfile -E makes an ELF dump of it"),
    # lkcd_dump_v5.h of crash: DUMP_MAGIC_NUMBER and DUMP_MAGIC_LIVE, in either byte order.
    _format(
        rb"[\xcd\xed]\x23\x8f\x61\x73\x01\x19\xa8|\xa8\x19\x01\x73\x61\x8f\x23[\xcd\xed]",
        "an LKCD dump",
        "crash and libkdumpfile read it",
    ),
    # _DMP_HEADER and _DMP_HEADER64: Windows' full and kernel dumps. Minidumps have only parts of a process.
    _format(rb"PAGEDU(MP|64)", "a crash dump of Windows", _VOLATILITY),
    _format(rb"MDMP\x93\xa7", "a minidump of Windows", "it has no whole memory: make a complete memory dump"),
    # PO_MEMORY_IMAGE; libhibr's documentation lists the signatures.
    _format(rb"(HIBR|hibr|WAKE|wake|RSTR)", "a hibernation file of Windows", _VOLATILITY),
    # HIBERNATE_SIG in kernel/power/swap.c of Linux, at the end of a page of 4096 bytes.
    _format(rb".{4086}S1SUSPEND", "a hibernation image of Linux", "resume it, and dump the running system"),
    # vmware_vmss.h of crash: CPTDUMP_*_MAGIC_NUMBER, little-endian.
    _format(
        rb"\xd0\xbe\xd0\xbe|\xd1\xbe\xd1\xbe|\xd2\xbe\xd2\xbe|\xd3\xbe\xd3\xbe|\xd1\xba\xd1\xba|\xd2\xba\xd2\xba",
        "a state file (.vmss, .vmsn) of VMware",
        "the raw memory is in the .vmem file beside it",
    ),
    # SSMFILEHDR_MAGIC_BASE in src/VBox/VMM/VMMR3/SSM.cpp of VirtualBox.
    _format(
        rb"\x7fVirtualBox SavedState ", "a saved state of VirtualBox", "VBoxManage debugvm VM dumpvmcore, then its ELF"
    ),
    # Disks: docs/interop/qcow2.rst of QEMU, block/qed.h, block/vmdk.c, block/vhdx.h, block/vpc.c, block/vdi.c.
    _format(rb"QFI\xfb", "a qcow2 image", _DISK),
    _format(rb"QED\0", "a QED image", _DISK),
    _format(rb"KDMV|COWD|# Disk DescriptorFile", "a VMDK image", _DISK),
    _format(rb"vhdxfile", "a VHDX image", _DISK),
    _format(rb"conectix", "a VHD image", _DISK),
    _format(rb".{64}\x7f\x10\xda\xbe", "a VDI image", _DISK),
    # libewf's documentation of the EWF format.
    _format(rb"EVF\x09\x0d\x0a\xff\0", "an EWF (Expert Witness) image", "ewfexport -f raw FILE"),
    # Compressed: RFC 1952, RFC 8878 (with its skippable frames), doc/xz-file-format.txt, bzip2's manual,
    # doc/lz4_Frame_format.md of LZ4 (and its legacy frames), lzop's magic, framing_format.txt of snappy.
    _format(rb"\x1f\x8b\x08", "compressed by gzip", "gzip -d FILE"),
    _format(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed by zstd", "zstd -d FILE"),
    _format(rb"\xfd7zXZ\0", "compressed by xz", "xz -d FILE"),
    _format(rb"BZh[1-9]1AY&SY", "compressed by bzip2", "bzip2 -d FILE"),
    _format(
        rb"[\x04\x02]\x22\x4d\x18|\x02\x21\x4c\x18",
        "compressed by lz4",
        "lz4 -d FILE; of the fragment mem of a snapshot, vmsnap restore",
    ),
    _format(rb"\x89LZO\0\r\n\x1a\n", "compressed by lzop", "lzop -d FILE"),
    _format(rb"\xff\x06\0\0sNaPpY", "compressed by snappy", "snzip -d FILE"),
    # Archives: APPNOTE.TXT of zip, POSIX ustar, 7zFormat.txt, technote.txt of rar.
    _format(rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive", "unzip FILE"),
    # docs/format.md, section 7; it is a tar archive as well.
    _format(
        rb"pax_global_header\0.{494}\d+ comment=vmsnap archive ",
        "a snapshot in one file",
        "vmsnap restore FILE RAM writes its guest memory",
    ),
    _format(rb".{257}ustar", "a tar archive", "tar -xf FILE"),
    _format(rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x FILE"),
    _format(rb"Rar!\x1a\x07", "a rar archive", "unrar x FILE"),
    # https://age-encryption.org/v1, binary and armored.
    _format(rb"age-encryption\.org/|-----BEGIN AGE ENCRYPTED FILE-----", "encrypted by age", "age -d FILE"),
)


def recognize(head: bytes) -> Foreign | None:
    """Return the format of a file that begins with these bytes, None if it may be raw memory."""
    return next((each for each in FORMATS if each.begins.match(head)), None)
