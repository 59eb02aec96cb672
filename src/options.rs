//! What a snapshot is written or read with.

use crate::cipher::SecretKey;
use crate::serialization::Format;

/// What a snapshot is written or read with, where [`crate::SnapshotWriter::new`] and [`crate::SnapshotReader::new`] do not
/// say enough: the key, the number of threads, the format of values.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// let options = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?).threads(2);
/// options.create(&path)?.write_fragment("clock", &12_u64)?;
/// assert_eq!(options.open(&path)?.read_fragment::<u64>("clock")?, 12);
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct SnapshotOptions {
    pub(crate) encrypt: bool,
    pub(crate) key: Option<SecretKey>,
    pub(crate) threads: Option<usize>,
    pub(crate) format: Option<Format>,
}

impl SnapshotOptions {
    /// Plain, all threads, CBOR.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Encrypts a new snapshot, and refuses to open a plain one.
    #[must_use]
    pub fn encrypt(mut self, encrypt: bool) -> Self {
        self.encrypt = encrypt;
        self
    }

    /// The key that wraps the snapshot's data key; implies encryption.
    #[must_use]
    pub fn key(mut self, key: SecretKey) -> Self {
        self.key = Some(key);
        self
    }

    /// The most threads that one call uses, itself included; no more than the process's pool has. The default is the
    /// environment variable `VMSNAP_THREADS`, or as many as the process may run on.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// How values are serialized. Without it, a writer takes CBOR, and a reader finds out for each fragment; what it cannot
    /// tell from CBOR is a bare number in JSON.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }
}
