//! Where age identities come from: a text or a file, read when they are needed.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::secret_file::{OTHERS, read_secret};
use super::secret_text::{Passphrase, SecretText};
use crate::error::{Error, Kind, Result};

const AGE_BINARY: &[u8] = b"age-encryption.org/";

/// What opens snapshots that were encrypted to an age recipient: one identity or several, of age, of a plugin or an SSH key.
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
    /// The text itself: `AGE-SECRET-KEY-1…`, `AGE-PLUGIN-…`, several of them in lines, or an SSH private key.
    #[must_use]
    pub fn text(text: impl Into<Zeroizing<String>>) -> Self {
        Self { source: IdentitySource::Text(Arc::new(text.into())), passphrase: None }
    }

    /// A file with such a text, or one that `age -p` encrypted. Unless it is encrypted, only its owner may be able to read it; a
    /// group may read another owner's file, and anybody one on a read-only file system, for its mode cannot be changed.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { source: IdentitySource::File(path.into()), passphrase: None }
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
            IdentitySource::Text(_) => "an identity".to_owned(),
            IdentitySource::File(path) => format!("the identity file {}", path.display()),
        }
    }

    pub(super) fn passphrase(&self) -> Result<Arc<SecretText>> {
        let passphrase = self.passphrase.as_ref().ok_or_else(|| {
            Error::new(Kind::KeyUnavailable, format!("{} is encrypted: give its passphrase with it", self.place()))
        })?;
        passphrase.reveal()
    }

    /// The bytes of it.
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

/// The text of identities without what an editor of another system adds to it: a byte order mark, line ends of two bytes, spaces
/// around a line.
pub(super) fn plain_text(content: Zeroizing<Vec<u8>>) -> Result<Zeroizing<Vec<u8>>> {
    if content.starts_with(AGE_BINARY) {
        return Ok(content);
    }
    if is_utf16(&content) {
        return Err(Error::invalid_argument("it is in UTF-16: save it in UTF-8"));
    }
    // With room for all, so that it does not grow and leave a copy behind.
    let mut text = Zeroizing::new(Vec::with_capacity(content.len() + 1));
    for line in without_mark(&content).split(|byte| *byte == b'\n') {
        text.extend_from_slice(line.trim_ascii());
        text.push(b'\n');
    }
    Ok(text)
}

/// Whether a text begins with the byte order mark of UTF-16, in which some editors and shells save by default.
pub(super) fn is_utf16(content: &[u8]) -> bool {
    content.starts_with(b"\xff\xfe") || content.starts_with(b"\xfe\xff")
}

/// A text without the byte order mark that it may have in UTF-8.
pub(super) fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content)
}

/// Whether a file was encrypted by age, in binary or armored.
pub(super) fn is_encrypted(content: &[u8]) -> bool {
    content.starts_with(AGE_BINARY) || content.starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----")
}
