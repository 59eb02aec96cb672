//! The location and path of a fragment, for errors and the cipher.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::name::SnapshotPath;

/// The location and path of a fragment, for errors.
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

/// The AAD that binds an encrypted fragment to its path: after a move, swap or rename it does not decrypt.
pub(super) fn aad(path: &SnapshotPath) -> Vec<u8> {
    [b"vmsnap/1/fragment\0", path.as_str().as_bytes()].concat()
}
