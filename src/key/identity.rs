//! Where age identities come from: a text or a file, read when they are needed.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroize::Zeroizing;

use super::secret_text::{Passphrase, SecretText};
use crate::error::{Error, Kind, Result};

/// As in age.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Bits of the mode that let others than the owner read or write.
pub(super) const OTHERS: u32 = 0o077;

/// What opens snapshots that were encrypted to an age recipient: one identity or several, of age, of a plugin or an SSH key.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// # #[cfg(feature = "age")] {
/// let (identity, recipient) = vmsnap::generate_identity()?;
/// vmsnap::SnapshotOptions::new().recipients([recipient]).create(&path)?.write_fragment("clock", &12_u64)?;
/// let options = vmsnap::SnapshotOptions::new().identities([vmsnap::Identity::text(identity)]);
/// assert_eq!(options.open(&path)?.read_fragment::<u64>("clock")?, 12);
/// # }
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Clone)]
pub struct Identity {
    source: Source,
    passphrase: Option<Passphrase>,
}

#[derive(Clone)]
enum Source {
    Text(Arc<SecretText>),
    File(PathBuf),
}

impl Identity {
    /// The text itself: `AGE-SECRET-KEY-1…`, `AGE-PLUGIN-…`, several of them in lines, or an SSH private key.
    #[must_use]
    pub fn text(text: impl Into<Zeroizing<String>>) -> Self {
        Self { source: Source::Text(Arc::new(text.into())), passphrase: None }
    }

    /// A file with such a text, or one that `age -p` encrypted. Unless it is encrypted, only its owner may be able to read it.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { source: Source::File(path.into()), passphrase: None }
    }

    /// What opens the file or SSH key itself, where that is encrypted.
    #[must_use]
    pub fn with_passphrase(mut self, passphrase: Passphrase) -> Self {
        self.passphrase = Some(passphrase);
        self
    }

    /// Where it is from, as errors name it.
    pub(super) fn place(&self) -> String {
        match &self.source {
            Source::Text(_) => "an identity".to_owned(),
            Source::File(path) => format!("the identity file {}", path.display()),
        }
    }

    pub(super) fn passphrase(&self) -> Result<Arc<SecretText>> {
        let passphrase = self.passphrase.as_ref().ok_or_else(|| {
            Error::new(Kind::KeyUnavailable, format!("{} is encrypted: give its passphrase with it", self.place()))
        })?;
        passphrase.reveal()
    }

    /// The bytes of it.
    pub(super) fn load(&self) -> Result<Zeroizing<Vec<u8>>> {
        match &self.source {
            Source::Text(text) => Ok(Zeroizing::new(text.as_bytes().to_vec())),
            Source::File(path) => read_file(path, OTHERS).map_err(|error| error.context(self.place())),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Text(_) => f.write_str("Identity(…)"),
            Source::File(path) => write!(f, "Identity({})", path.display()),
        }
    }
}

/// Reads a file with secrets. `forbidden` are the bits that its mode must not have, unless it is encrypted.
pub(super) fn read_file(path: &Path, forbidden: u32) -> Result<Zeroizing<Vec<u8>>> {
    // Non-blocking: opening a FIFO that nobody writes to would wait for ever.
    let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY).bits().cast_signed();
    let mut options = File::options();
    options.read(true).custom_flags(flags);
    let failed = |error| Error::io("cannot be read", error);
    let file = options.open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let size = metadata.len();
    if metadata.is_dir() {
        return Err(Error::io("cannot be read", rustix::io::Errno::ISDIR));
    }
    if size > MAX_FILE_BYTES {
        return Err(Error::invalid_argument(format!("{size} bytes are too many for a file of identities")));
    }
    // One byte more than there is, so that the vector does not grow and leave a copy behind.
    let room = if metadata.is_file() { size + 1 } else { MAX_FILE_BYTES };
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(room).unwrap_or_default()));
    file.take(room).read_to_end(&mut content).map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if mode & forbidden != 0 && metadata.is_file() && !is_encrypted(&content) {
        return Err(Error::new(
            Kind::KeyUnavailable,
            format!("others may use it (mode {mode:04o}): chmod 600 '{}'", path.display()),
        ));
    }
    Ok(content)
}

/// Whether a file was encrypted by age, in binary or armored.
pub(super) fn is_encrypted(content: &[u8]) -> bool {
    content.starts_with(b"age-encryption.org/") || content.starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----")
}
