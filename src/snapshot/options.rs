//! Options for writing and reading snapshots.

use std::path::Path;
#[cfg(feature = "object-store")]
use std::path::PathBuf;
use std::sync::Arc;

use crate::cipher::SecretKey;
use crate::error::Result;
use crate::key::{Credentials, Identity, KeyProvider, OnNewIdentity, Passphrase};
use crate::location::LocalPath;
use crate::serialization::Format;
#[cfg(feature = "object-store")]
use crate::store::CacheOptions;
use crate::store::RemoteOptions;

/// The end of the usual file name of an archive.
const ARCHIVE_SUFFIX: &[u8] = b".vmsnap.tar";

/// Options for writing and reading snapshots: the key, the number of threads, the format of values and others.
///
/// [`crate::SnapshotWriter::new`] and [`crate::SnapshotReader::new`] are shorthands for the defaults.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// let options = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?).threads(2);
/// let mut staged = options.create(&path)?;
/// staged.writer().write_fragment("clock", &12_u64)?;
/// staged.commit()?;
/// assert_eq!(options.open(&path)?.read_fragment::<u64>("clock")?, 12);
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub struct SnapshotOptions {
    pub(crate) encrypt: bool,
    pub(crate) credentials: Credentials,
    pub(crate) threads: Option<usize>,
    pub(crate) format: Option<Format>,
    pub(crate) durable: bool,
    pub(crate) archive: Option<bool>,
    pub(crate) require_sealed: bool,
    pub(crate) seal_digest: Option<[u8; 32]>,
    pub(crate) remote: RemoteOptions,
    #[cfg_attr(not(feature = "object-store"), allow(dead_code, reason = "for object stores"))]
    pub(crate) take_over: bool,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            encrypt: false,
            credentials: Credentials::default(),
            threads: None,
            format: None,
            durable: true,
            archive: None,
            require_sealed: false,
            seal_digest: None,
            remote: RemoteOptions::default(),
            take_over: false,
        }
    }
}

impl SnapshotOptions {
    /// Default options: no encryption, all threads, values as CBOR.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a commit, a seal, `pack` or `unpack` waits until everything is on the disk, so that the snapshot survives a power failure.
    /// On by default. The option changes nothing else.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }

    /// Whether [`SnapshotOptions::create`] makes one file, an archive, instead of a directory. By default it does so if
    /// the file name ends in `.vmsnap.tar`.
    ///
    /// Until the commit, the snapshot is a hidden directory. The commit makes an archive of it. If the file system cannot
    /// move blocks from file to file, the commit copies the contents, and needs space for both.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("vm1.vmsnap.tar");
    /// let mut staged = vmsnap::SnapshotOptions::new().create(&path)?;
    /// staged.writer().write_fragment("clock", &12_u64)?;
    /// staged.commit()?;
    /// assert!(path.is_file());
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    #[must_use]
    pub fn archive(mut self, archive: bool) -> Self {
        self.archive = Some(archive);
        self
    }

    /// Whether a new snapshot at `location` becomes an archive.
    pub(crate) fn is_archive_at(&self, location: &LocalPath) -> bool {
        let name = location.path().file_name().unwrap_or_default();
        self.archive.unwrap_or_else(|| name.as_encoded_bytes().ends_with(ARCHIVE_SUFFIX))
    }

    /// Refuses to open a snapshot that is not sealed: one without a manifest.
    #[must_use]
    pub fn require_sealed(mut self, require_sealed: bool) -> Self {
        self.require_sealed = require_sealed;
        self
    }

    /// Refuses to open any snapshot but the one with this seal digest. Keep the digest outside the snapshot: it detects
    /// changes that nothing inside a snapshot can detect, namely an older state of the snapshot, another snapshot at
    /// its location, and a forgery by somebody who once had the key.
    #[must_use]
    pub fn expect_seal_digest(mut self, seal_digest: [u8; 32]) -> Self {
        self.seal_digest = Some(seal_digest);
        self
    }

    /// Options of the client of an object store, such as `region` or `endpoint`, by the names that the crate
    /// `object_store` gives them. They override the variables of the environment, such as `AWS_REGION`.
    ///
    /// A serialized handle contains them, so a secret among them goes to the other process in the clear.
    ///
    /// ```
    /// let local = [("endpoint", "http://127.0.0.1:7070"), ("region", "us-east-1")];
    /// let options = vmsnap::SnapshotOptions::new().storage_options(local);
    /// ```
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn storage_options<K, V>(mut self, options: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<String>,
        V: Into<String>,
    {
        self.remote.storage_options = options.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        self
    }

    /// Keeps the bytes that are read from an object store in this directory, up to 10 GiB or a tenth of the free
    /// space, so that they are not fetched again. Encrypted bytes stay encrypted. By default nothing is kept.
    ///
    /// The directory is created if it does not exist. Other users must not be able to write to it. If the disk is full,
    /// nothing more is kept, and reading goes on.
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn cache(mut self, directory: impl Into<PathBuf>) -> Self {
        self.remote.cache = Some(CacheOptions::new(directory.into()));
        self
    }

    /// The most requests to an object store that are under way at once, from 1 to 256; 16 by default.
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.remote.connections = connections;
        self
    }

    /// Whether requests to an object store may go to another machine without TLS. A loopback address never needs TLS.
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn allow_http(mut self, allow_http: bool) -> Self {
        self.remote.allow_http = allow_http;
        self
    }

    /// Whether [`SnapshotOptions::create`] and [`SnapshotOptions::push`] replace a snapshot that another writer has
    /// begun at the same URL and not completed. Only for a writer that was killed: one that still runs would mix its objects into the
    /// new snapshot.
    #[cfg(feature = "object-store")]
    #[must_use]
    pub fn take_over(mut self, take_over: bool) -> Self {
        self.take_over = take_over;
        self
    }

    /// Encrypts a new snapshot, and refuses to open a plain one.
    ///
    /// Without a key, recipients, a passphrase or a key provider, the snapshot is encrypted to the user's own age
    /// identity: from `VMSNAP_IDENTITY` (the text), `VMSNAP_IDENTITY_FILE`, `$CREDENTIALS_DIRECTORY/vmsnap-identity` or
    /// `$XDG_CONFIG_HOME/vmsnap/identity.txt`. If none of these exists, creating a snapshot makes the last one; see
    /// [`SnapshotOptions::on_new_identity`].
    #[must_use]
    pub fn encrypt(mut self, encrypt: bool) -> Self {
        self.encrypt = encrypt;
        self
    }

    /// The key that wraps the snapshot's data key.
    ///
    /// A key, recipients, identities, a passphrase and a key provider each imply encryption. Only one of them can be
    /// set.
    #[must_use]
    pub fn key(mut self, key: SecretKey) -> Self {
        self.credentials.key = Some(key);
        self
    }

    /// The recipients that can open a new snapshot: age recipients (`age1…`, also of plugins) and SSH public keys. They
    /// only encrypt; opening takes [`SnapshotOptions::identities`].
    #[must_use]
    pub fn recipients(mut self, recipients: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.credentials.recipients = Some(recipients.into_iter().map(Into::into).collect());
        self
    }

    /// The identities that open a snapshot written for recipients.
    #[must_use]
    pub fn identities(mut self, identities: impl IntoIterator<Item = Identity>) -> Self {
        self.credentials.identities = Some(identities.into_iter().collect());
        self
    }

    /// The passphrase that wraps the snapshot's data key. Scrypt derives a key from it, which takes about a second.
    #[must_use]
    pub fn passphrase(mut self, passphrase: Passphrase) -> Self {
        self.credentials.passphrase = Some(passphrase);
        self
    }

    /// The key service that wraps the snapshot's data key.
    #[must_use]
    pub fn key_provider(mut self, provider: Arc<dyn KeyProvider>) -> Self {
        self.credentials.key_provider = Some(provider);
        self
    }

    /// Calls `callback` with the path of the user's own identity before vmsnap makes it there, so that the user can be
    /// told to back it up: snapshots encrypted to it cannot be opened without it. An error of the callback prevents the
    /// identity and the snapshot, and is returned. Without a callback the identity is made silently.
    ///
    /// ```
    /// let options = vmsnap::SnapshotOptions::new().encrypt(true).on_new_identity(|path| {
    ///     eprintln!("Creating the identity {}. Back it up.", path.display());
    ///     Ok(())
    /// });
    /// ```
    #[must_use]
    pub fn on_new_identity(mut self, callback: impl Fn(&Path) -> Result<()> + Send + Sync + 'static) -> Self {
        self.credentials.on_new_identity = OnNewIdentity::new(callback);
        self
    }

    /// Whether a new snapshot is encrypted, and whether an existing one must be.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.encrypt || self.credentials.are_some()
    }

    /// The largest number of threads that one call uses, including the calling thread and limited by the size of the
    /// process's pool. The default is the environment variable `VMSNAP_THREADS`, or the number of processors that the
    /// process may use.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// The serialization format of values. By default a writer uses CBOR, and a reader detects the format of each
    /// fragment. A reader cannot detect JSON that is a bare number: it reads it as CBOR.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = Some(format);
        self
    }
}
