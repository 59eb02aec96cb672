//! Fragments: files that are written once, front to back, and read at random.
//!
//! ```text
//! writing.rs   Fragment (Write): open, failed or finished
//! reading.rs   FragmentReader (Read, Seek, read_at)
//! plain.rs     the bytes themselves
//! parts.rs     a fragment written in parts, by several threads
//! rope.rs      bytes that follow each other, and lie apart in memory
//! encrypted_sink.rs, sealing.rs    one FLOE message, sealed by all threads
//! encrypted_source.rs, pieces.rs   the same, opened by all threads
//! digest.rs, ledger.rs          what the manifest is to say of a fragment
//! lock.rs      who writes into a snapshot now
//! file_system.rs                where a lock on a directory reaches all writers
//! folder.rs    files and folders below the root, no link ever followed
//! ```

pub(crate) mod digest;
mod encrypted_sink;
mod encrypted_source;
mod encryptors;
mod file_system;
pub(crate) mod folder;
pub(crate) mod ledger;
pub(crate) mod lock;
pub(crate) mod parts;
mod pieces;
mod plain;
mod reading;
pub(crate) mod rope;
mod writing;

use std::fmt;
use std::path::{Path, PathBuf};

pub use reading::FragmentReader;
pub use writing::Fragment;
pub(crate) use writing::Writing;

use crate::error::{Error, Kind, Result};
use crate::name::SnapshotPath;
use crate::process;

/// What one thread seals, opens, reads or writes at a time: it fits the second-level cache of every processor of interest
/// twice, and a system call for each costs nothing.
const STRIP_BYTES: usize = 256 << 10;

/// Bytes of the chunks that make a strip.
fn strip_bytes(chunk_size_bytes: usize) -> usize {
    (STRIP_BYTES / chunk_size_bytes).max(1) * chunk_size_bytes
}

/// Binds an encrypted fragment to its path: moved, swapped or renamed, it does not open.
fn aad(path: &SnapshotPath) -> Vec<u8> {
    [b"vmsnap/1/fragment\0", path.as_str().as_bytes()].concat()
}

fn not_written(error: std::io::Error) -> Error {
    Error::io("cannot be written", error)
}

/// Where a fragment is, for errors.
#[derive(Clone, Debug)]
struct Place {
    root: PathBuf,
    path: SnapshotPath,
}

impl Place {
    fn new(root: &Path, path: &SnapshotPath) -> Self {
        Self { root: root.to_owned(), path: path.clone() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.path, self.root.display())
    }
}

/// The process a fragment was opened in: cipher state must not be used in another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home(u64);

impl Home {
    pub(crate) fn here() -> Self {
        Self(process::token())
    }

    pub(crate) fn is_here(self) -> bool {
        self.0 == process::token()
    }

    /// The same of a staged snapshot.
    pub(crate) fn check_snapshot(self) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        let text = "the snapshot was begun in the process this one was forked from, which alone commits or discards it";
        Err(Error::new(Kind::State, text))
    }

    pub(crate) fn check(self) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(Error::new(
            Kind::State,
            "the fragment was opened in the process this one was forked from; open it again in this process",
        ))
    }
}
