//! The location and path of a fragment, for errors and the cipher.

use std::fmt;

use crate::name::SnapshotPath;

/// The location and path of a fragment, for errors.
#[derive(Clone, Debug)]
pub(crate) struct FragmentPlace {
    location: String,
    pub(crate) path: SnapshotPath,
}

impl FragmentPlace {
    pub(crate) fn new(location: &dyn fmt::Display, path: &SnapshotPath) -> Self {
        Self { location: location.to_string(), path: path.clone() }
    }
}

impl fmt::Display for FragmentPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.path, self.location)
    }
}

/// The AAD that binds an encrypted fragment to its path: after a move, swap or rename it does not decrypt.
pub(crate) fn aad(path: &SnapshotPath) -> Vec<u8> {
    [b"vmsnap/1/fragment\0", path.as_str().as_bytes()].concat()
}
