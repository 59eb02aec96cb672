//! The wrapped data key of a snapshot: the file `enc_metadata`.
//!
//! ```text
//! payload.rs           the unwrapped contents of enc_metadata: data key, snapshot id, required features
//! raw.rs               wrapping with a 32-byte key of the caller
//! age.rs               wrapping by age, for recipients or with a passphrase
//! provider.rs          wrapping by a key service of the caller
//! credentials.rs       the keys that a caller passed
//! identity.rs          age identities and their files
//! default_identity.rs  the identity that is used if the caller passes no key
//! new_identity.rs      the caller's callback for a new identity
//! recipients_file.rs   files of recipients
//! secret_file.rs       files with secrets, and the modes that they may have
//! secret_text.rs       passphrases
//! background.rs        long work in a thread of its own
//! ```
//!
//! The first bytes of the file identify the wrapping.

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

const AGE_PREFIX: &[u8] = b"age-encryption.org/";

/// The wrapping of the data key of an encrypted snapshot, with its recipients as far as they are visible.
/// [`crate::inspect`](fn@crate::inspect) reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyWrapping {
    /// A 32-byte key of the caller.
    RawKey,
    /// age recipients.
    Age {
        /// The kind of each recipient; for an SSH key, also a part of its hash.
        recipients: Vec<String>,
    },
    /// A passphrase, by age.
    Passphrase,
    /// A key service of the caller.
    KeyProvider {
        /// The name of the service.
        name: String,
    },
}

/// The wrapping of the key in `enc_metadata`, not authenticated.
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
        Err(Error::corrupt("it does not contain a wrapped vmsnap key: it is damaged, or another program wrote it"))
    }
}

/// Makes a new age identity; returns it and its recipient. The identity is the secret.
///
/// # Errors
///
/// [`Error::is_unsupported_format`] in a build without the feature `age`.
pub fn generate_identity() -> Result<(Zeroizing<String>, String)> {
    age::generate()
}

/// The contents of an identity file in the format of `age-keygen`, with the time and the recipient as comments.
#[must_use]
pub fn identity_file(identity: &str, recipient: &str) -> Zeroizing<String> {
    Zeroizing::new(age::identity_file(identity, recipient))
}

/// The recipients of an identity: a snapshot that is encrypted to one of them opens with the identity.
///
/// # Errors
///
/// [`Error::is_invalid_argument`] if it is not an identity or is an identity of a plugin, and the errors of opening a
/// snapshot with it.
pub fn recipients_of(identity: &Identity) -> Result<Vec<String>> {
    recipients_of_interruptible(identity, &mut || Ok(()))
}

/// Like [`recipients_of`], with a callback that can interrupt it.
pub(crate) fn recipients_of_interruptible(
    identity: &Identity,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<String>> {
    age::public_halves(identity, interrupt)
}

/// Reads a file with a secret, which only its owner may be able to use.
#[cfg(feature = "python")]
pub(crate) fn read_secret_file(
    path: impl AsRef<std::path::Path>,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Zeroizing<Vec<u8>>> {
    let path = path.as_ref();
    secret_file::read_secret(path, secret_file::OTHERS, interrupt).map_err(|error| error.context(path.display()))
}
