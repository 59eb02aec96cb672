//! The numbers of the migration stream. All of them are big-endian. They are from QEMU's migration/savevm.c,
//! migration/ram.c and migration/migration.h.

use crate::error::{Error, Kind};

/// The first bytes of a stream.
pub(super) const MAGIC: [u8; 4] = *b"QEVM";
pub(super) const VERSION: u32 = 3;

/// The byte with which a section begins.
pub(super) mod section {
    pub(in super::super) const END_OF_STREAM: u8 = 0;
    pub(in super::super) const START: u8 = 1;
    pub(in super::super) const PART: u8 = 2;
    pub(in super::super) const END: u8 = 3;
    pub(in super::super) const FULL: u8 = 4;
    pub(in super::super) const SUBSECTION: u8 = 5;
    pub(in super::super) const VMDESCRIPTION: u8 = 6;
    pub(in super::super) const CONFIGURATION: u8 = 7;
    pub(in super::super) const COMMAND: u8 = 8;
    pub(in super::super) const FOOTER: u8 = 0x7e;
}

/// The name of the section with guest memory, and the only version of it.
pub(super) const RAM: &str = "ram";
pub(super) const RAM_VERSION: u32 = 4;

/// The flags of a record in section `ram`. They are the low bits of an address.
pub(super) mod flag {
    pub(in super::super) const ZERO: u64 = 0x02;
    pub(in super::super) const MEM_SIZE: u64 = 0x04;
    pub(in super::super) const PAGE: u64 = 0x08;
    pub(in super::super) const EOS: u64 = 0x10;
    /// The page is in the block of the record before; otherwise the name of its block follows.
    pub(in super::super) const CONTINUE: u64 = 0x20;
    pub(in super::super) const XBZRLE: u64 = 0x40;
    pub(in super::super) const HOOK: u64 = 0x80;
    pub(in super::super) const COMPRESS_PAGE: u64 = 0x100;
    pub(in super::super) const MULTIFD_FLUSH: u64 = 0x200;
}

/// The only command that a destination obeys without a return path, and that does not begin a postcopy migration.
pub(super) const SWITCHOVER_START: u16 = 11;

/// The names of QEMU's commands, by their numbers.
const COMMANDS: [&str; 12] = [
    "INVALID",
    "OPEN_RETURN_PATH",
    "PING",
    "POSTCOPY_ADVISE",
    "POSTCOPY_LISTEN",
    "POSTCOPY_RUN",
    "POSTCOPY_RAM_DISCARD",
    "POSTCOPY_RESUME",
    "PACKAGED",
    "RECV_BITMAP",
    "ENABLE_COLO",
    "SWITCHOVER_START",
];

pub(super) fn command_name(command: u16) -> String {
    let name = COMMANDS.get(usize::from(command));
    name.map_or_else(|| command.to_string(), |name| format!("{command} ({name})"))
}

/// The most blocks of a stream. QEMU makes a block for each memory backend and each ROM.
pub(super) const MAX_BLOCKS: usize = 1024;

/// The most guest memory. It bounds the index of a hostile stream, which needs nine bytes for a page of zeros.
pub(super) const MAX_MEMORY_BYTES: u64 = 16 << 40;

/// The most bytes of a machine type.
pub(super) const MAX_MACHINE_TYPE_BYTES: usize = 256;

/// The most capabilities that a configuration lists.
pub(super) const MAX_CAPABILITIES: u32 = 64;

/// The error for a stream that is malformed at `offset`.
pub(super) fn malformed(offset: u64, what: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("{what}, at byte {offset} of the migration stream"))
}

/// The error for a stream that has at `offset` something that vmsnap does not read.
pub(super) fn refused(offset: u64, what: impl std::fmt::Display) -> Error {
    Error::new(Kind::Unsupported, format!("{what}, at byte {offset} of the migration stream"))
}
