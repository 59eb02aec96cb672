//! Guest memory: the fragments `mem` and `mem_metadata`, crosvm's, written and read by all threads.
//!
//! ```text
//! source.rs    where guest memory comes from: bytes at hand,
//! file.rs      a file,
//! process.rs   a live process
//! process_range.rs  a range of its addresses
//! mappings.rs  what is mapped in it
//! pagemap.rs   which pages it has
//! stop.rs      StoppedProcess: it stands still meanwhile
//! zeros.rs     pages of zeros
//! reorder.rs   one stream of bytes, brought by several threads
//! lz4.rs       one LZ4 frame, made and read block by block
//! metadata.rs  the fragment `mem_metadata`: which memory is where
//! ranges.rs    ranges of data: put together, and found among zeros
//! options.rs   what is asked of a dump, and what it tells
//! dump.rs      SnapshotWriter::write_memory
//! data.rs      the data in `mem`, whatever form that has
//! pages.rs     pages of this process, before they are touched and after
//! own_mappings.rs  what is behind a buffer of this process
//! guest_memory.rs  GuestMemory: which there is, and some of it at random
//! destination.rs   where regions are restored to
//! restore.rs   all of it at once
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
mod pagemap;
mod pages;
mod process;
mod process_range;
mod ranges;
mod reorder;
mod restore;
mod source;
mod stop;
mod zeros;

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
pub use stop::StoppedProcess;
