//! A fragment's snapshot and path, as errors and the cipher name it.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::name::SnapshotPath;

/// Where a fragment is, for errors.
#[derive(Clone, Debug)]
pub(super) struct FragmentPlace {
    pub(super) root: PathBuf,
    pub(super) path: SnapshotPath,
}

impl FragmentPlace {
    pub(super) fn new(root: &Path, path: &SnapshotPath) -> Self {
        Self { root: root.to_owned(), path: path.clone() }
    }
}

impl fmt::Display for FragmentPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.path, self.root.display())
    }
}

/// Binds an encrypted fragment to its path: moved, swapped or renamed, it does not decrypt.
pub(super) fn aad(path: &SnapshotPath) -> Vec<u8> {
    [b"vmsnap/1/fragment\0", path.as_str().as_bytes()].concat()
}

pub(super) fn not_written(error: std::io::Error) -> Error {
    Error::io("cannot be written", error)
}
