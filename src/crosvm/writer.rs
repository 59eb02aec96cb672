//! Writing a snapshot, with crosvm's signatures.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::dropped::{DropError, DroppedFragment};
use super::into_anyhow;
use crate::snapshot::SnapshotOptions;

/// Writes a snapshot: [`crate::SnapshotWriter`] with crosvm's signatures.
///
/// It writes in place, as crosvm does: a snapshot that fails half-way stays, incomplete. To have it complete or absent,
/// let [`SnapshotOptions`] stage it and hand out this type:
///
/// ```
/// use std::io::Write;
/// use vmsnap::SnapshotOptions;
/// use vmsnap::crosvm::SnapshotWriter;
///
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("vm1");
/// let mut staged = SnapshotOptions::new().create(&path)?;
/// let writer = SnapshotWriter::from(staged.writer().clone());
/// let mut w: Box<dyn Write> = writer.raw_fragment("sda")?;
/// w.write_all(b"boot sector")?;
/// drop(w); // finishes the fragment; if that failed, the commit would fail
/// staged.commit()?;
/// # anyhow::Ok(())
/// ```
///
/// The handle can be cloned, and serialized to travel to another process. **Serialized, it holds the data key in the
/// clear.** `Debug` never shows the key.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotWriter {
    writer: crate::SnapshotWriter,
    #[serde(skip)]
    drop_error: DropError,
}

impl SnapshotWriter {
    /// Creates a snapshot at `root`, which must not exist. With `encrypt`, the default identity opens it, see
    /// [the module's page](super#keys).
    ///
    /// # Errors
    ///
    /// If something exists at `root`, if its parent directory does not exist, or if a key is not available.
    pub fn new(root: PathBuf, encrypt: bool) -> anyhow::Result<Self> {
        SnapshotOptions::new().encrypt(encrypt).create_in_place(root).map(Self::from).map_err(into_anyhow)
    }

    /// Creates a fragment, which dropping the box finishes, see [the module's page](super#how-a-fragment-ends).
    ///
    /// # Errors
    ///
    /// If the name is not allowed or taken, or if an earlier fragment was lost when it was dropped.
    pub fn raw_fragment(&self, name: &str) -> anyhow::Result<Box<dyn Write>> {
        self.boxed(|| self.writer.raw_fragment(name))
    }

    /// Creates a fragment that is encrypted in chunks of `chunk_size_bytes` (32 bytes to 64 MiB). A plain snapshot
    /// ignores the size, as crosvm does.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotWriter::raw_fragment`], and an error if the snapshot is encrypted and the size is not
    /// allowed.
    pub fn raw_fragment_with_chunk_size(&self, name: &str, chunk_size_bytes: usize) -> anyhow::Result<Box<dyn Write>> {
        if !self.writer.is_encrypted() {
            return self.raw_fragment(name);
        }
        self.boxed(|| self.writer.raw_fragment_with_chunk_size(name, chunk_size_bytes))
    }

    fn boxed(&self, create: impl FnOnce() -> crate::Result<crate::Fragment>) -> anyhow::Result<Box<dyn Write>> {
        let fragment = self.drop_error.check().and_then(|()| create()).map_err(into_anyhow)?;
        Ok(Box::new(DroppedFragment::new(fragment, self.drop_error.clone())))
    }

    /// Writes a fragment with the serialized value `v`. The fragment is finished when this returns.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotWriter::raw_fragment`], and an error if the value cannot be serialized or written.
    pub fn write_fragment<T: Serialize>(&self, name: &str, v: &T) -> anyhow::Result<()> {
        self.drop_error.check().and_then(|()| self.writer.write_fragment(name, v)).map_err(into_anyhow)
    }

    /// Creates a namespace, and returns a writer into it.
    ///
    /// # Errors
    ///
    /// If the name is not allowed or taken, or if an earlier fragment was lost when it was dropped.
    pub fn add_namespace(&self, name: &str) -> anyhow::Result<Self> {
        let writer = self.drop_error.check().and_then(|()| self.writer.add_namespace(name)).map_err(into_anyhow)?;
        Ok(Self { writer, drop_error: self.drop_error.clone() })
    }

    /// Fails if a fragment of this snapshot could not be finished when its box was dropped. crosvm's crate does not
    /// have this call. Call it at the end of a snapshot, when all boxes are dropped.
    ///
    /// It reports boxes that were made in this process through this handle, its clones, and the handles of namespaces
    /// made from them. A deserialized handle starts without errors, so each process must check its own handles.
    ///
    /// # Errors
    ///
    /// The first error of a dropped fragment that could not be finished. The snapshot is incomplete then.
    pub fn check_dropped(&self) -> anyhow::Result<()> {
        self.drop_error.check().map_err(into_anyhow)
    }
}

impl From<crate::SnapshotWriter> for SnapshotWriter {
    fn from(writer: crate::SnapshotWriter) -> Self {
        Self { writer, drop_error: DropError::default() }
    }
}

impl From<SnapshotWriter> for crate::SnapshotWriter {
    fn from(writer: SnapshotWriter) -> Self {
        writer.writer
    }
}

impl fmt::Debug for SnapshotWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.writer.fmt(f)
    }
}
