//! A path in the file system of this machine.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// The location of a snapshot in the local file system, as an absolute path, because another process, or this one
/// later, may have another working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalPath(PathBuf);

impl LocalPath {
    /// The location that a caller names by `path`.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        if path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(Error::invalid_argument("the path of a snapshot cannot contain NUL"));
        }
        std::path::absolute(path).map(Self).map_err(|error| {
            Error::invalid_argument(format!("'{}' cannot be the path of a snapshot: {error}", path.display()))
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for LocalPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// serde's own form of a path must be UTF-8, but a path on Linux need not be.
impl Serialize for LocalPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.0.as_os_str().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LocalPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        OsString::deserialize(deserializer).map(|path| Self(path.into()))
    }
}
