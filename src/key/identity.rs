//! age identities, from a text or from a file that is read when it is needed.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::secret_file::{OTHERS, read_secret};
use super::secret_text::{Passphrase, SecretText};
use crate::error::{Error, Kind, Result};

const AGE_BINARY: &[u8] = b"age-encryption.org/";

/// One or more identities, which open snapshots that are encrypted to their recipients: of age, of a plugin, or an SSH
/// key.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// # #[cfg(feature = "age")] {
/// let (identity, recipient) = vmsnap::generate_identity()?;
/// vmsnap::SnapshotOptions::new().recipients([recipient]).create_in_place(&path)?.write_fragment("clock", &12_u64)?;
/// let options = vmsnap::SnapshotOptions::new().identities([vmsnap::Identity::text(identity)]);
/// assert_eq!(options.open(&path)?.read_fragment::<u64>("clock")?, 12);
/// # }
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Clone)]
pub struct Identity {
    source: IdentitySource,
    passphrase: Option<Passphrase>,
}

#[derive(Clone)]
enum IdentitySource {
    Text(Arc<SecretText>),
    File(PathBuf),
}

impl Identity {
    /// An identity from a text: `AGE-SECRET-KEY-1…`, `AGE-PLUGIN-…`, several lines of these, or an SSH private key.
    #[must_use]
    pub fn text(text: impl Into<Zeroizing<String>>) -> Self {
        Self { source: IdentitySource::Text(Arc::new(text.into())), passphrase: None }
    }

    /// An identity from a file with such a text, or from a file that `age -p` encrypted. If the file is not encrypted,
    /// only its owner may be able to read it. Two kinds of files are exempt, because their mode cannot be changed: the
    /// group may read a file of another owner, and everybody a file on a read-only file system.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { source: IdentitySource::File(path.into()), passphrase: None }
    }

    /// Sets the passphrase of an encrypted file or SSH key.
    #[must_use]
    pub fn with_passphrase(mut self, passphrase: Passphrase) -> Self {
        self.passphrase = Some(passphrase);
        self
    }

    /// Its name in errors.
    pub(super) fn place(&self) -> String {
        match &self.source {
            IdentitySource::Text(_) => "an identity".to_owned(),
            IdentitySource::File(path) => format!("the identity file {}", path.display()),
        }
    }

    pub(super) fn passphrase(&self) -> Result<Arc<SecretText>> {
        let passphrase = self.passphrase.as_ref().ok_or_else(|| {
            Error::new(Kind::KeyUnavailable, format!("{} is encrypted; pass its passphrase with it", self.place()))
        })?;
        passphrase.reveal()
    }

    /// Reads its text.
    pub(super) fn load(&self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Zeroizing<Vec<u8>>> {
        let content = match &self.source {
            IdentitySource::Text(text) => Ok(Zeroizing::new(text.as_bytes().to_vec())),
            IdentitySource::File(path) => read_secret(path, OTHERS, interrupt),
        };
        content.and_then(plain_text).map_err(|error| error.context(self.place()))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            IdentitySource::Text(_) => f.write_str("Identity(…)"),
            IdentitySource::File(path) => write!(f, "Identity({})", path.display()),
        }
    }
}

/// The text of identities without the additions of editors: a byte order mark, line ends of two bytes, spaces around a
/// line.
pub(super) fn plain_text(content: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>> {
    if content.starts_with(AGE_BINARY) {
        return Ok(content);
    }
    if is_utf16(&content) {
        return Err(Error::invalid_argument("it is encoded in UTF-16; save it in UTF-8"));
    }
    // Large enough: a vector that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(content.len() + 1));
    for line in without_mark(&content).split(|byte| *byte == b'\n') {
        text.extend_from_slice(line.trim_ascii());
        text.push(b'\n');
    }
    Ok(text)
}

/// Whether a text begins with the byte order mark of UTF-16, the default encoding of some editors and shells.
pub(super) fn is_utf16(content: &[u8]) -> bool {
    content.starts_with(b"\xff\xfe") || content.starts_with(b"\xfe\xff")
}

/// A text without the byte order mark of UTF-8.
pub(super) fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content)
}

/// Whether a file was encrypted by age, in binary or armored.
pub(super) fn is_encrypted(content: &[u8]) -> bool {
    content.starts_with(AGE_BINARY) || content.starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----")
}
