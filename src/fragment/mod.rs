//! Fragments: files that are written once, front to back, and read at random.
//!
//! ```text
//! writing.rs   Fragment (Write): open, failed or finished
//! reading.rs   FragmentReader (Read, Seek, read_at)
//! plain.rs     the bytes themselves
//! sealed.rs    one FLOE message: chunks sealed and opened by all threads
//! pieces.rs    a buffer cut into what one thread reads at a time
//! folder.rs    files and folders below the root, no link ever followed
//! ```

pub(crate) mod folder;
mod pieces;
mod plain;
mod reading;
mod sealed;
mod writing;

use std::fmt;
use std::path::{Path, PathBuf};

pub use reading::FragmentReader;
pub use writing::Fragment;
pub(crate) use writing::Sealed;

use crate::error::{Error, Kind, Result};
use crate::name::SnapshotPath;
use crate::process;

/// What one thread seals, opens, reads or writes at a time: it fits the second-level cache of every processor of interest
/// twice, and a system call for each costs nothing.
const STRIP_BYTES: usize = 256 << 10;

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

    fn is_here(self) -> bool {
        self.0 == process::token()
    }

    pub(crate) fn check(self) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(Error::new(
            Kind::State,
            "it was opened in the process this one was forked from; open it again in this process",
        ))
    }
}
