//! Guest memory: the fragments `mem` and `mem_metadata`, crosvm's, written and read by all threads.
//!
//! ```text
//! source.rs    where guest memory comes from
//! zeros.rs     pages of zeros
//! turns.rs     one stream of bytes, brought by several threads
//! lz4.rs       one LZ4 frame, made and read block by block
//! layout.rs    the metadata: which memory is where
//! dump.rs      SnapshotWriter::write_memory
//! ```

mod dump;
mod layout;
mod lz4;
mod source;
mod turns;
mod zeros;

pub use dump::{GuestRegion, MemoryOptions, MemoryProgress, MemoryReport};
pub use source::{FileMemory, GuestMemorySource};
