//! QEMU's migration stream: guest memory is taken out of it as it passes, and put back when it is sent. This module
//! knows bytes; it does not talk to QEMU.
//!
//! ```text
//! format.rs    the numbers of the format, and the errors that name an offset
//! input.rs     Input: the bytes of a stream that is read, and their offsets
//! output.rs    Output: the bytes that pass
//! front.rs     Front: header, configuration and list of RAM blocks; SnapshotReader::migration_front
//! passage.rs   Passage: a stream that passes, with every page shown on its way
//! early.rs     the state of virtio-mem devices, which precedes the pages
//! kept.rs      Kept: the stream that is left
//! ending.rs    Ending: whether a stream was truncated
//! receive.rs   SnapshotWriter::receive_migration, BlockRegion, MigrationStream
//! send.rs      SnapshotReader::send_migration, SentBlock
//! records.rs   the page records of guest memory, made by several threads
//! ```
//!
//! A stream is a header, a configuration, the section `ram` in several parts, and the state of the devices:
//!
//! ```text
//! QEVM 3 | CONFIGURATION | START ram: list of blocks | PART ram: pages … | END ram: pages | FULL … | 0 | VMDESCRIPTION
//! └────────────────────── front ────────────────────┘                                     └───────── rest ─────────┘
//! ```
//!
//! QEMU sends the state of a virtio-mem device between START and the first PART, because it tells which pages exist.
//! Nothing after the last part of `ram` is interpreted.

mod early;
mod ending;
mod format;
mod front;
mod input;
mod kept;
mod output;
mod passage;
mod receive;
mod records;
mod send;

#[cfg(test)]
mod tests;

pub use front::MigrationFront;
#[cfg(any(test, fuzzing))]
pub(crate) use passage::pass_all;
pub use receive::{BlockRegion, MigrationStream, RamBlock};
pub use send::SentBlock;
