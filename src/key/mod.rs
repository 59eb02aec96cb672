//! How a snapshot's data key is kept: the file `enc_metadata`.
//!
//! ```text
//! payload.rs           what enc_metadata holds once unwrapped: data key, snapshot id, what a reader must know
//! raw.rs               wrapped with a 32-byte key of the caller's
//! age.rs               wrapped by age, for recipients or with a passphrase
//! provider.rs          wrapped by a key service of the caller's
//! credentials.rs       which of these a caller asks for
//! identity.rs          age identities, and the files they are in
//! default_identity.rs  the identity of somebody who did not say which
//! new_identity.rs      the caller's callback for a new identity
//! recipients_file.rs   files of recipients
//! secret_file.rs       files with secrets, and who may use them
//! secret_text.rs       passphrases
//! background.rs        work that may take long
//! ```
//!
//! How a payload is wrapped shows in the file's first bytes.

#[cfg(feature = "age")]
mod age;
#[cfg(not(feature = "age"))]
#[path = "age_absent.rs"]
mod age;
mod background;
mod credentials;
mod default_identity;
#[cfg_attr(not(feature = "age"), expect(dead_code, reason = "nothing reads identities"))]
mod identity;
mod new_identity;
mod payload;
mod provider;
mod raw;
#[cfg_attr(not(feature = "python"), expect(dead_code, reason = "the command line reads these files"))]
mod recipients_file;
mod secret_file;
mod secret_text;

pub(crate) use credentials::Credentials;
pub use identity::Identity;
pub(crate) use new_identity::OnNewIdentity;
pub(crate) use payload::KeyPayload;
pub use provider::{KeyProvider, ProviderError};
#[cfg(feature = "python")]
pub(crate) use recipients_file::RecipientsFile;
pub use secret_text::Passphrase;

use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// Larger files are no key metadata.
pub(crate) const MAX_KEY_METADATA_BYTES: u64 = 1 << 20;

const AGE_PREFIX: &[u8] = b"age-encryption.org/";

/// How the data key of an encrypted snapshot is kept in it, and for whom as far as it tells; [`crate::inspect`] reads
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyWrapping {
    /// With a 32-byte key of the caller's.
    RawKey,
    /// By age, for recipients.
    Age {
        /// The kind of each. Those of age's own tell nothing else; of an SSH key there is a part of the hash.
        recipients: Vec<String>,
    },
    /// By age, with a passphrase.
    Passphrase,
    /// By a key service of the caller's.
    KeyProvider {
        /// What the service is called.
        name: String,
    },
}

/// How the key in the contents of `enc_metadata` is wrapped. Nothing of it is authenticated.
pub(crate) fn wrapping(wrapped: &[u8]) -> Result<KeyWrapping> {
    if raw::is_wrapped(wrapped) {
        Ok(KeyWrapping::RawKey)
    } else if wrapped.starts_with(AGE_PREFIX) {
        let recipients = age::stanzas(wrapped)?;
        let is_passphrase = recipients.iter().any(|recipient| recipient.starts_with("scrypt"));
        Ok(if is_passphrase { KeyWrapping::Passphrase } else { KeyWrapping::Age { recipients } })
    } else if wrapped.starts_with(provider::PREFIX) {
        provider::name_of(wrapped).map(|name| KeyWrapping::KeyProvider { name })
    } else {
        Err(Error::corrupt("its contents are no wrapped key of vmsnap's (damaged, or written by another program)"))
    }
}

/// A new age identity, and the recipient that snapshots are encrypted to for it. The first is the secret.
///
/// # Errors
///
/// [`Error::is_unsupported_format`] in a build without the feature `age`.
pub fn generate_identity() -> Result<(Zeroizing<String>, String)> {
    age::generate()
}

/// A file with an identity as `age-keygen` writes it: with the time and the recipient as comments.
#[must_use]
pub fn identity_file(identity: &str, recipient: &str) -> Zeroizing<String> {
    Zeroizing::new(age::identity_file(identity, recipient))
}

/// The recipients of an identity: what to encrypt to so that it opens the snapshot.
///
/// # Errors
///
/// [`Error::is_invalid_argument`] where it is no identity or one of a plugin's, and as for opening a snapshot with it.
pub fn recipients_of(identity: &Identity) -> Result<Vec<String>> {
    recipients_of_interruptible(identity, &mut || Ok(()))
}

/// [`recipients_of`], which may be interrupted.
pub(crate) fn recipients_of_interruptible(
    identity: &Identity,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<String>> {
    age::public_halves(identity, interrupt)
}

/// The contents of a file with a secret, which only its owner may be able to use.
#[cfg(feature = "python")]
pub(crate) fn read_secret_file(
    path: impl AsRef<std::path::Path>,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Zeroizing<Vec<u8>>> {
    let path = path.as_ref();
    secret_file::read_secret(path, secret_file::OTHERS, interrupt).map_err(|error| error.context(path.display()))
}
