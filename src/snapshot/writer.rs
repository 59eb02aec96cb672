//! Writing a snapshot.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::handle_version::HandleVersion;
use super::key_metadata::Unlocked;
use super::{SnapshotOptions, open_manifest};
use crate::cipher::{DEFAULT_CHUNK_SIZE_BYTES, SecretKey, wipe_stack};
use crate::error::{Error, Kind, Result};
use crate::fragment::ledger::Ledger;
use crate::fragment::scratch::ScratchWriter;
use crate::fragment::{Fragment, Writing};
use crate::key::KeyPayload;
use crate::location::Location;
use crate::name::SnapshotPath;
use crate::serialization::{self, Format};
use crate::store::directory::{Directory, entries};
use crate::store::{Draft, Store};
use crate::threads;

/// Writes a snapshot: a directory of fragments, nested by namespaces.
///
/// The handle is small. It can be cloned, and serialized to write into the snapshot from another process. **The
/// serialized form contains the data key in the clear.** `Debug` never shows the key.
///
/// ```
/// use std::io::Write;
///
/// # let folder = tempfile::tempdir()?;
/// let writer = vmsnap::SnapshotWriter::new(folder.path().join("vm1"), false)?;
/// writer.write_fragment("clock", &12_u64)?;
/// let mut disk = writer.add_namespace("disks")?.raw_fragment("sda")?;
/// disk.write_all(&[0; 512])?;
/// disk.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Serialize, Deserialize)]
pub struct SnapshotWriter {
    version: HandleVersion,
    draft: Draft,
    namespace: SnapshotPath,
    data_key: Option<SecretKey>,
    threads: usize,
    format: Format,
    /// The entries of the fragments that this process wrote into the snapshot that it staged.
    #[serde(skip)]
    ledger: Option<Arc<Ledger>>,
}

impl SnapshotWriter {
    /// Creates a snapshot in place at `location`; shorthand for [`SnapshotOptions::create_in_place`].
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if something exists at `location` or the parent directory does not exist. With `encrypt`,
    /// [`Error::is_key_unavailable`] if the user's own identity cannot be used or made. After an error nothing is left
    /// behind.
    pub fn new(location: impl Into<PathBuf>, encrypt: bool) -> Result<Self> {
        SnapshotOptions::new().encrypt(encrypt).create_in_place(location.into())
    }

    /// Opens the plain snapshot at `location` to add to it. Existing fragments are never overwritten.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotOptions::append`].
    pub fn open(location: impl AsRef<Path>) -> Result<Self> {
        SnapshotOptions::new().append(location)
    }

    /// Creates a fragment. If the snapshot is encrypted, the chunk size is 4 KiB.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotWriter::raw_fragment_with_chunk_size`].
    pub fn raw_fragment(&self, name: &str) -> Result<Fragment> {
        self.raw_fragment_with_chunk_size(name, DEFAULT_CHUNK_SIZE_BYTES)
    }

    /// Creates a fragment. If the snapshot is encrypted, it is encrypted in chunks of `chunk_size_bytes`: 32 bytes to
    /// 64 MiB.
    ///
    /// Larger chunks make sequential writes faster. Smaller chunks make random reads faster, because a read decrypts
    /// whole chunks.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if the name or the size is not allowed, [`Error::is_io`] if the fragment exists.
    pub fn raw_fragment_with_chunk_size(&self, name: &str, chunk_size_bytes: usize) -> Result<Fragment> {
        self.create_fragment(name, chunk_size_bytes, None)
    }

    /// Creates a fragment with at most `most_bytes`, of which fewer may be written. It is else that of
    /// [`SnapshotWriter::raw_fragment_with_chunk_size`].
    ///
    /// An object store needs the size of a fragment of more than 78 GiB in advance. A directory does not.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotWriter::raw_fragment_with_chunk_size`], and [`Error::is_invalid_argument`] if an object
    /// store cannot have a fragment of that size.
    pub fn raw_fragment_with_size(&self, name: &str, chunk_size_bytes: usize, most_bytes: u64) -> Result<Fragment> {
        self.create_fragment(name, chunk_size_bytes, Some(most_bytes))
    }

    fn create_fragment(&self, name: &str, chunk_size_bytes: usize, most_bytes: Option<u64>) -> Result<Fragment> {
        let path = self.namespace.join(name)?;
        crate::cipher::check_chunk_size(chunk_size_bytes)?;
        let writing = Writing {
            key: self.data_key.as_ref(),
            chunk_size_bytes,
            threads: threads::clamp(self.threads),
            most_bytes,
            ledger: self.ledger.as_ref(),
        };
        Fragment::create(&self.draft, &path, &writing)
    }

    /// Writes a fragment with the serialized `value`. The value is serialized before a file is created.
    ///
    /// # Errors
    ///
    /// [`Error::is_serialization`] if the format cannot represent the value, and the errors of
    /// [`SnapshotWriter::raw_fragment_with_chunk_size`].
    pub fn write_fragment<T: Serialize + ?Sized>(&self, name: &str, value: &T) -> Result<()> {
        self.write_whole(name, &self.encode(name, value)?, &mut || Ok(()))
    }

    /// The bytes that [`SnapshotWriter::write_fragment`] writes.
    pub(crate) fn encode<T: Serialize + ?Sized>(&self, name: &str, value: &T) -> Result<Vec<u8>> {
        let path = self.namespace.join(name)?;
        serialization::encode(value, self.format).map_err(|error| {
            let place = format!("{path} of {}", self.draft.location());
            let error = match error.downcast::<Error>() {
                Ok(own) => return own.context(place),
                Err(error) => error,
            };
            Error::with_source(Kind::Serialization, format!("{place} cannot be serialized"), error)
        })
    }

    /// Writes a fragment whose contents are all in memory.
    pub(crate) fn write_whole(
        &self,
        name: &str,
        bytes: &[u8],
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut fragment = self.raw_fragment(name)?;
        fragment.write_all_interruptible(bytes, interrupt)?;
        fragment.finish_interruptible(interrupt)
    }

    /// Creates a namespace, and returns a writer into it.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if the name is not allowed, [`Error::is_io`] if the namespace exists.
    pub fn add_namespace(&self, name: &str) -> Result<Self> {
        let namespace = self.namespace.join(name)?;
        self.draft.add_namespace(&namespace)?;
        Ok(Self { namespace, ..self.clone() })
    }

    /// Returns a writer into a namespace that exists.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no namespace of that name.
    pub fn namespace(&self, name: &str) -> Result<Self> {
        let namespace = self.namespace.join(name)?;
        self.draft.check_namespace(&namespace)?;
        Ok(Self { namespace, ..self.clone() })
    }

    /// The location of the snapshot: the absolute path of its directory, or its URL.
    #[must_use]
    pub fn location(&self) -> &Path {
        self.draft.path()
    }

    /// The path of this writer's namespace: names joined with `/`, empty at the root.
    #[must_use]
    pub fn namespace_path(&self) -> &str {
        self.namespace.as_str()
    }

    /// The serialization format of values.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether the snapshot is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.data_key.is_some()
    }
}

/// Everything that is needed to create a snapshot: the options are checked, and the key is wrapped.
pub(crate) struct Prepared {
    /// The key, and the contents of `enc_metadata` that wrap it.
    pub(crate) payload: Option<(KeyPayload, Vec<u8>)>,
    pub(crate) threads: usize,
    format: Format,
}

impl Prepared {
    /// Writes the key metadata into the new, empty snapshot. Removes its directory if this fails.
    pub(crate) fn writer(&self, draft: Draft) -> Result<SnapshotWriter> {
        if let Some((_, wrapped)) = &self.payload {
            draft.write_key_metadata(wrapped)?;
        }
        Ok(SnapshotWriter {
            version: HandleVersion,
            ledger: draft.is_staged().then(Arc::default),
            draft,
            namespace: SnapshotPath::default(),
            data_key: self.payload.as_ref().map(|(payload, _)| payload.data_key().clone()),
            threads: self.threads,
            format: self.format,
        })
    }
}

impl SnapshotWriter {
    /// The entries of fragments that this process wrote into the staged snapshot.
    pub(crate) fn ledger(&self) -> Option<&Ledger> {
        self.ledger.as_deref()
    }

    pub(crate) fn threads(&self) -> usize {
        threads::clamp(self.threads)
    }

    /// Creates a scratch file on the file system of the snapshot, encrypted if the snapshot is. Nothing of it is ever a
    /// part of the snapshot. For a snapshot in an object store, it is in the temporary directory, and always encrypted.
    pub(crate) fn scratch(&self, aad: &'static [u8]) -> Result<ScratchWriter> {
        let is_encrypted = self.is_encrypted() || self.draft.is_scratch_elsewhere();
        ScratchWriter::new(self.draft.create_nameless()?, is_encrypted, aad, self.threads())
    }

    /// Whether the snapshot is in the file system of this machine.
    pub(crate) fn is_local(&self) -> bool {
        !self.draft.is_scratch_elsewhere()
    }

    /// The directory of scratch files.
    pub(crate) fn scratch_directory(&self) -> PathBuf {
        self.draft.scratch_directory()
    }

    pub(crate) fn data_key(&self) -> Option<&SecretKey> {
        self.data_key.as_ref()
    }
}

impl SnapshotOptions {
    /// Creates a snapshot in place: it is visible at `location` from the start, whether or not it is ever finished.
    ///
    /// Use [`SnapshotOptions::create`] for a snapshot that is complete or absent, and for an archive. A snapshot created
    /// in place is not sealed; [`SnapshotOptions::seal`] seals it.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if something exists at `location` or the parent directory does not exist,
    /// [`Error::is_invalid_argument`] if an option is not allowed, and [`Error::is_key_unavailable`] if the data key
    /// cannot be wrapped. After an error nothing is left behind.
    pub fn create_in_place(&self, location: impl AsRef<Path>) -> Result<SnapshotWriter> {
        self.create_in_place_interruptible(location, &mut || Ok(()))
    }

    /// Creates a snapshot as [`SnapshotOptions::create_in_place`] does, and calls `interrupt` while that takes time.
    pub(crate) fn create_in_place_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SnapshotWriter> {
        let location = Location::new(location.as_ref())?.local("writing in place")?;
        if self.is_archive_at(&location) {
            let text = format!(
                "{location} cannot be created in place: an archive is written as a whole; use create(), or archive(false) \
                 for a directory with such a name"
            );
            return Err(Error::invalid_argument(text));
        }
        let prepared = self.prepare(&location, false, |_| entries::check_new(location.path()), interrupt)?;
        prepared.writer(Draft::InPlace(Directory::create_in_place(location)?))
    }

    /// Checks the options and wraps a key for a new snapshot at `location`, of which `check_free` says whether it can be
    /// there. Nothing is created yet.
    pub(crate) fn prepare(
        &self,
        location: &dyn fmt::Display,
        staged: bool,
        check_free: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> Result<()>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Prepared> {
        let threads = threads::resolve(self.threads)?;
        let wrapper = self.credentials.wrapper()?;
        // Before the key is wrapped, because that may ask for a passphrase and take seconds.
        check_free(interrupt)?;
        let payload = if self.is_encrypted() {
            let payload = KeyPayload::generate(staged)?;
            let wrapped = wrapper.wrap(&payload, interrupt);
            wipe_stack();
            let wrapped =
                wrapped.map_err(|error| error.context(format!("cannot create the encrypted snapshot {location}")))?;
            Some((payload, wrapped))
        } else {
            None
        };
        Ok(Prepared { payload, threads, format: self.format.unwrap_or_default() })
    }

    /// Opens the snapshot at `location` to add fragments and namespaces to it, with the key that it was written with. A
    /// key implies that the snapshot must be encrypted.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?);
    /// options.create_in_place(&path)?.add_namespace("cpu")?.write_fragment("clock", &12_u64)?;
    /// options.append(&path)?.namespace("cpu")?.write_fragment("timer", &13_u64)?;
    /// assert_eq!(options.open(&path)?.namespace("cpu")?.list_fragments()?, ["clock", "timer"]);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_sealed`] if the snapshot is sealed, and the errors of [`SnapshotOptions::open`].
    pub fn append(&self, location: impl AsRef<Path>) -> Result<SnapshotWriter> {
        self.append_interruptible(location, &mut || Ok(()))
    }

    pub(crate) fn append_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SnapshotWriter> {
        let threads = threads::resolve(self.threads)?;
        let store = Store::at_path(Location::new(location.as_ref())?.local("adding to a snapshot")?);
        let directory = store.directory()?;
        let Unlocked { payload, .. } = Unlocked::open(&store, self, interrupt)?;
        directory.check_unsealed()?;
        if payload.as_ref().is_some_and(KeyPayload::is_sealed) {
            return Err(open_manifest::incomplete(store.location()));
        }
        Ok(SnapshotWriter {
            version: HandleVersion,
            draft: Draft::InPlace(directory.clone()),
            namespace: SnapshotPath::default(),
            data_key: payload.map(|payload| payload.data_key().clone()),
            threads,
            format: self.format.unwrap_or_default(),
            ledger: None,
        })
    }
}

impl fmt::Debug for SnapshotWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotWriter")
            .field("location", &self.location())
            .field("namespace", &self.namespace.as_str())
            .field("encrypted", &self.is_encrypted())
            .finish_non_exhaustive()
    }
}
