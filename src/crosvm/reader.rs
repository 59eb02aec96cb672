//! Reading a snapshot, with crosvm's signatures.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::into_anyhow;

/// Reads a snapshot: [`crate::SnapshotReader`] with crosvm's signatures. Plain snapshots of crosvm can be read too.
///
/// The handle can be cloned, and serialized to travel to another process. **Serialized, it holds the data key in the
/// clear.** `Debug` never shows the key.
///
/// ```
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("vm1");
/// # vmsnap::crosvm::SnapshotWriter::new(path.clone(), false)?.write_fragment("clock", &12_u64)?;
/// use vmsnap::crosvm::SnapshotReader;
///
/// let reader = SnapshotReader::new(&path, false)?;
/// assert_eq!(reader.list_fragments()?, ["clock"]);
/// let clock: u64 = reader.read_fragment("clock")?;
/// assert_eq!(clock, 12);
/// # anyhow::Ok(())
/// ```
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotReader(crate::SnapshotReader);

impl SnapshotReader {
    /// Opens the snapshot at `root`: an encrypted one with the default identity, see [the module's page](super#keys).
    ///
    /// # Errors
    ///
    /// If there is no snapshot, if it is plain and `require_encrypted` is set, or if its key is not available.
    pub fn new(root: &Path, require_encrypted: bool) -> anyhow::Result<Self> {
        crate::SnapshotReader::new(root, require_encrypted).map(Self).map_err(into_anyhow)
    }

    /// Opens a fragment.
    ///
    /// # Errors
    ///
    /// If the fragment does not exist, or if its contents were changed.
    pub fn raw_fragment(&self, name: &str) -> anyhow::Result<Box<dyn Read>> {
        Ok(Box::new(self.0.raw_fragment(name).map_err(into_anyhow)?))
    }

    /// Reads a fragment that holds one serialized value.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotReader::raw_fragment`], and an error if the fragment holds anything but one value of
    /// that type.
    pub fn read_fragment<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<T> {
        self.0.read_fragment(name).map_err(into_anyhow)
    }

    /// Returns the names of all fragments in this namespace, sorted.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read, or contains something that does not belong to a snapshot.
    pub fn list_fragments(&self) -> anyhow::Result<Vec<String>> {
        self.0.list_fragments().map_err(into_anyhow)
    }

    /// Opens a namespace.
    ///
    /// # Errors
    ///
    /// If the namespace does not exist.
    pub fn namespace(&self, name: &str) -> anyhow::Result<Self> {
        self.0.namespace(name).map(Self).map_err(into_anyhow)
    }

    /// Returns the names of all namespaces in this namespace, sorted.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotReader::list_fragments`].
    pub fn list_namespaces(&self) -> anyhow::Result<Vec<String>> {
        self.0.list_namespaces().map_err(into_anyhow)
    }
}

impl From<crate::SnapshotReader> for SnapshotReader {
    fn from(reader: crate::SnapshotReader) -> Self {
        Self(reader)
    }
}

impl From<SnapshotReader> for crate::SnapshotReader {
    fn from(reader: SnapshotReader) -> Self {
        reader.0
    }
}

impl fmt::Debug for SnapshotReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
