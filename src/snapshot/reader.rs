//! Reading a snapshot.

use std::fmt;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::SnapshotOptions;
use super::handle_version::HandleVersion;
use super::key_metadata::Unlocked;
use super::open_manifest::{self, OpenManifest};
use crate::cipher::SecretKey;
use crate::error::{Error, Result};
use crate::fragment::FragmentReader;
use crate::location::Location;
use crate::manifest::Manifest;
use crate::name::SnapshotPath;
use crate::serialization::{self, Format};
use crate::store::Store;
use crate::store::bytes::ReadAt;
use crate::threads;

/// The size of the buffer through which a serialized value is read.
const VALUE_BUFFER_BYTES: usize = 64 << 10;

/// Reads a snapshot that [`crate::SnapshotWriter`] wrote, or a plain snapshot that crosvm wrote.
///
/// The handle can be cloned, and serialized to read the snapshot in another process. **The serialized form contains the
/// data key in the clear.** `Debug` never shows the key.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let location = folder.path().join("vm1");
/// # let writer = vmsnap::SnapshotWriter::new(location.clone(), false)?;
/// # writer.write_fragment("clock", &12_u64)?;
/// # writer.add_namespace("disks")?;
/// let reader = vmsnap::SnapshotReader::new(&location, false)?;
/// assert_eq!(reader.list_fragments()?, ["clock"]);
/// assert_eq!(reader.list_namespaces()?, ["disks"]);
/// assert_eq!(reader.read_fragment::<u64>("clock")?, 12);
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Clone, Serialize, Deserialize)]
pub struct SnapshotReader {
    version: HandleVersion,
    store: Store,
    namespace: SnapshotPath,
    data_key: Option<SecretKey>,
    threads: usize,
    format: Option<Format>,
    manifest: Option<OpenManifest>,
}

impl SnapshotReader {
    /// Opens the snapshot at `location`.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no such directory, [`Error::is_not_encrypted`] if `require_encrypted` and the
    /// snapshot is not encrypted, [`Error::is_key_unavailable`] if it is encrypted and the user's own identity cannot
    /// be found; and the other errors of [`SnapshotOptions::open`].
    pub fn new(location: impl AsRef<Path>, require_encrypted: bool) -> Result<Self> {
        SnapshotOptions::new().encrypt(require_encrypted).open(location)
    }

    /// Opens a fragment.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no fragment of that name, [`Error::is_invalid_argument`] if the name is not
    /// allowed, [`Error::is_corrupt`] if the name belongs to something else, such as a link, and in an encrypted
    /// snapshot [`Error::is_authentication`] if the fragment is not the one that was written under that name.
    pub fn raw_fragment(&self, name: &str) -> Result<FragmentReader> {
        self.raw_fragment_interruptible(name, &mut || Ok(()))
    }

    /// Opens a fragment as [`SnapshotReader::raw_fragment`] does, and calls `interrupt` while that takes time.
    pub(crate) fn raw_fragment_interruptible(
        &self,
        name: &str,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<FragmentReader> {
        let path = self.namespace.join(name)?;
        let manifest = self.manifest()?;
        if manifest.is_some_and(|manifest| !manifest.fragments.contains_key(path.as_str())) {
            return Err(self.not_listed(&path));
        }
        FragmentReader::open(&self.store, &path, self.data_key.as_ref(), self.threads(), manifest, interrupt)
    }

    /// Begins to read the first bytes of a fragment that is opened soon, if that saves time. The result must live until
    /// then.
    pub(crate) fn begin(&self, name: &str) -> Option<Arc<dyn ReadAt>> {
        self.store.begin(&self.namespace.join(name).ok()?, self.manifest().ok()?)
    }

    /// Returns the manifest, or `None` if the snapshot is not sealed.
    fn manifest(&self) -> Result<Option<&Manifest>> {
        self.manifest
            .as_ref()
            .map(|open_manifest| open_manifest.manifest(&self.store, self.data_key.as_ref()))
            .transpose()
    }

    fn not_listed(&self, path: &SnapshotPath) -> Error {
        let text = format!("the snapshot {} has no {path}", self.store.location());
        Error::io(text, rustix::io::Errno::NOENT)
    }

    /// Reads a fragment that holds one serialized value.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotReader::raw_fragment`], and [`Error::is_corrupt`] if the fragment contains anything but
    /// one value of type `T`.
    pub fn read_fragment<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.decode(name, self.raw_fragment(name)?, &mut || Ok(()))
    }

    /// Reads the value in an open fragment.
    pub(crate) fn decode<T: DeserializeOwned>(
        &self,
        name: &str,
        fragment: FragmentReader,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<T> {
        // Through a small buffer: the value itself determines how much memory it takes, not the size of the file.
        let fragment = BufReader::with_capacity(VALUE_BUFFER_BYTES, fragment.interruptible(interrupt));
        serialization::decode(fragment, self.format, &self.place(name)?)
    }

    pub(crate) fn threads(&self) -> usize {
        threads::clamp(self.threads)
    }

    /// Returns the name of a fragment for error texts.
    pub(crate) fn place(&self, name: &str) -> Result<String> {
        Ok(format!("{} of {}", self.namespace.join(name)?, self.store.location()))
    }

    /// Opens a fragment to read it whole. Refuses it if it is larger than `max_size_bytes`.
    #[cfg(feature = "python")]
    pub(crate) fn whole_fragment(
        &self,
        name: &str,
        max_size_bytes: u64,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<FragmentReader> {
        let fragment = self.raw_fragment_interruptible(name, interrupt)?;
        if fragment.size() <= max_size_bytes {
            return Ok(fragment);
        }
        let text = format!("{} bytes are too many for a value: raise max_size_bytes, or read it raw", fragment.size());
        Err(Error::corrupt(text).context(self.place(name)?))
    }

    /// Returns the names of the fragments in this namespace, sorted.
    ///
    /// # Errors
    ///
    /// [`Error::is_corrupt`] if the directory contains a link, a special file or a name that is not allowed.
    pub fn list_fragments(&self) -> Result<Vec<String>> {
        match self.manifest()? {
            Some(manifest) => Ok(manifest.fragments_in(&self.namespace)),
            None => self.store.directory()?.list(&self.namespace).map(|(fragments, _)| fragments),
        }
    }

    /// Returns the names of the namespaces in this namespace, sorted.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotReader::list_fragments`].
    pub fn list_namespaces(&self) -> Result<Vec<String>> {
        match self.manifest()? {
            Some(manifest) => Ok(manifest.namespaces_in(&self.namespace)),
            None => self.store.directory()?.list(&self.namespace).map(|(_, namespaces)| namespaces),
        }
    }

    /// Returns a reader of a namespace.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no namespace of that name.
    pub fn namespace(&self, name: &str) -> Result<Self> {
        let namespace = self.namespace.join(name)?;
        match self.manifest()? {
            Some(manifest) if manifest.namespaces.contains(namespace.as_str()) => {}
            Some(_) => {
                let text = format!("the snapshot {} has no namespace {:?}", self.store.location(), namespace.as_str());
                return Err(Error::io(text, rustix::io::Errno::NOENT));
            }
            None => self.store.directory()?.check_namespace(&namespace)?,
        }
        Ok(Self { namespace, ..self.clone() })
    }

    /// The location of the snapshot: the absolute path of its directory.
    #[must_use]
    pub fn location(&self) -> &Path {
        self.store.path()
    }

    /// The path of this reader's namespace: names joined with `/`, empty at the root.
    #[must_use]
    pub fn namespace_path(&self) -> &str {
        self.namespace.as_str()
    }

    /// Returns the random bytes that identify the snapshot, from its manifest; `None` if it is not sealed.
    ///
    /// # Errors
    ///
    /// A handle that came from another process reads the manifest here, and returns the errors of reading it.
    pub fn snapshot_id(&self) -> Result<Option<[u8; 16]>> {
        Ok(self.manifest()?.map(|manifest| manifest.snapshot_id))
    }

    /// The digest for [`SnapshotOptions::expect_seal_digest`]; `None` if the snapshot is not sealed.
    #[must_use]
    pub fn seal_digest(&self) -> Option<[u8; 32]> {
        self.manifest.as_ref().map(|manifest| *manifest.digest())
    }

    /// Whether the snapshot is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.data_key.is_some()
    }
}

impl SnapshotOptions {
    /// Opens the snapshot at `location` to read it. A key implies that the snapshot must be encrypted.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no such directory, [`Error::is_not_encrypted`] if the snapshot is required to be
    /// encrypted and is not, [`Error::is_key_unavailable`] if it is encrypted and no fitting key is given,
    /// [`Error::is_authentication`] if the key is wrong, `enc_metadata` is damaged or the seal digest is not the
    /// expected one, [`Error::is_not_sealed`] if it is required to be sealed and is not, [`Error::is_corrupt`] if its
    /// manifest is damaged or missing, and [`Error::is_unsupported_format`] if it needs a newer version of vmsnap.
    pub fn open(&self, location: impl AsRef<Path>) -> Result<SnapshotReader> {
        self.open_interruptible(location, &mut || Ok(()))
    }

    pub(crate) fn open_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SnapshotReader> {
        let threads = threads::resolve(self.threads)?;
        let store = Store::at(Location::new(location.as_ref())?, &self.remote)?;
        let Unlocked { payload, manifest } = Unlocked::open(&store, self, interrupt)?;
        let manifest = OpenManifest::decode(store.location(), manifest?, payload.as_ref())?;
        match (&manifest, &self.seal_digest) {
            (None, _) if store.is_always_sealed() => return Err(open_manifest::incomplete(store.location())),
            (None, expected) if self.require_sealed || expected.is_some() => {
                return Err(open_manifest::unsealed(store.location()));
            }
            (Some(manifest), Some(expected)) if manifest.digest() != expected => {
                return Err(open_manifest::another(store.location()));
            }
            _ => {}
        }
        if let Some(open_manifest) = &manifest {
            store.settle(open_manifest.manifest(&store, None)?)?;
        }
        Ok(SnapshotReader {
            version: HandleVersion,
            store,
            namespace: SnapshotPath::default(),
            data_key: payload.map(|payload| payload.data_key().clone()),
            threads,
            format: self.format,
            manifest,
        })
    }
}

impl fmt::Debug for SnapshotReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotReader")
            .field("location", &self.location())
            .field("namespace", &self.namespace.as_str())
            .field("encrypted", &self.is_encrypted())
            .finish_non_exhaustive()
    }
}
