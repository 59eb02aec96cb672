//! Guest memory: writes and reads the fragments `mem` and `mem_metadata`, in crosvm's format, with all threads.
//!
//! ```text
//! source.rs           trait GuestMemorySource, and memory of this process as a source
//! file.rs             FileMemory: a file, memfd or block device as a source
//! process.rs          ProcessMemory: a live process
//! process_range.rs    ProcessRange: a range of its addresses as a source
//! mappings.rs         its mappings, and the page faults that it may serve
//! pagemap.rs          the pages that it has
//! stop.rs             StoppedProcess: stops it, and lets it go on
//! spool.rs            Spool: pages that arrive in any order, kept in a scratch file, as a source
//! straight.rs         Straight: pages that arrive in the order of `mem`, written to it at once
//! page_index.rs       where the last copy of each page is
//!
//! options.rs          GuestRegion, MemoryOptions, MemoryReport, MemoryProgress
//! dump.rs             SnapshotWriter::write_memory
//! ranges.rs           merges data ranges, and finds them between zeros
//! reorder.rs          joins the batches of several threads into one stream
//! lz4.rs              writes and reads an LZ4 frame block by block
//! metadata.rs         the fragment `mem_metadata`
//!
//! guest_memory.rs     GuestMemory: regions, ranges and random access
//! data.rs             reads the stream in `mem`, compressed or not
//! destination.rs      GuestDestination: a buffer or file to restore to
//! restore.rs          GuestMemory::restore
//! own_mappings.rs     the mappings of this process behind a buffer
//! pages.rs            pages of this process: populated before use, and released
//! ```

mod data;
mod destination;
mod dump;
mod file;
mod guest_memory;
mod lz4;
mod mappings;
mod metadata;
mod options;
mod own_mappings;
mod page_index;
mod pagemap;
mod pages;
mod process;
mod process_range;
mod ranges;
mod reorder;
mod restore;
mod source;
mod spool;
mod stop;
mod straight;

pub(crate) use data::ReadBuffers;
pub use destination::GuestDestination;
pub use file::FileMemory;
pub use guest_memory::GuestMemory;
#[cfg(any(test, fuzzing))]
pub(crate) use metadata::Metadata;
pub use options::{GuestRegion, MemoryOptions, MemoryProgress, MemoryReport};
#[cfg(feature = "python")]
pub(crate) use pages::{populate, readable};
pub use process::ProcessMemory;
pub use process_range::ProcessRange;
pub use source::GuestMemorySource;
#[cfg(feature = "python")]
pub(crate) use source::{ChangingBytes, StableBytes};
pub(crate) use spool::{Spool, Spooled, SpooledPages};
pub use stop::StoppedProcess;
pub(crate) use straight::{AreaRegion, Straight};
