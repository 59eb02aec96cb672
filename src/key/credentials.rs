//! The keys that a caller passed, and the way in which they wrap or unwrap a data key.

use std::fmt;

use zeroize::Zeroizing;

use super::identity::Identity;
use super::new_identity::OnNewIdentity;
use super::payload::KeyPayload;
use super::provider::{self, SharedProvider};
use super::secret_text::Passphrase;
use super::{KeyWrapping, age, default_identity, raw};
use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};

/// All keys that were passed. That they are of one kind is checked on use.
#[derive(Clone, Default)]
pub(crate) struct Credentials {
    pub(crate) key: Option<SecretKey>,
    pub(crate) recipients: Option<Vec<String>>,
    pub(crate) identities: Option<Vec<Identity>>,
    pub(crate) passphrase: Option<Passphrase>,
    pub(crate) key_provider: Option<SharedProvider>,
    /// Called before the default identity is made.
    pub(crate) on_new_identity: OnNewIdentity,
}

/// The way to wrap a new data key.
pub(crate) enum Wrapper<'a> {
    Key(&'a SecretKey),
    Recipients(&'a [String]),
    Passphrase(&'a Passphrase),
    Provider(&'a SharedProvider),
    DefaultIdentity(&'a OnNewIdentity),
}

/// The way to unwrap a data key.
pub(crate) enum Unwrapper<'a> {
    Key(&'a SecretKey),
    Identities(&'a [Identity]),
    Passphrase(&'a Passphrase),
    Provider(&'a SharedProvider),
    DefaultIdentity,
}

impl Credentials {
    /// Whether any key was passed, which means that the snapshot must be encrypted.
    pub(crate) fn are_some(&self) -> bool {
        self.names().next().is_some()
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        [
            ("a key", self.key.is_some()),
            ("recipients", self.recipients.is_some()),
            ("identities", self.identities.is_some()),
            ("a passphrase", self.passphrase.is_some()),
            ("a key provider", self.key_provider.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is_passed)| is_passed.then_some(name))
    }

    fn check_one(&self) -> Result<()> {
        let names: Vec<_> = self.names().collect();
        if names.len() < 2 {
            return Ok(());
        }
        Err(Error::invalid_argument(format!(
            "{} cannot be passed together: a snapshot has one kind of key",
            names.join(" and ")
        )))
    }

    /// The way to wrap a new data key: with the default identity if no key was passed.
    pub(crate) fn wrapper(&self) -> Result<Wrapper<'_>> {
        self.check_one()?;
        Ok(match self {
            Self { key: Some(key), .. } => Wrapper::Key(key),
            Self { recipients: Some(recipients), .. } => Wrapper::Recipients(recipients),
            Self { passphrase: Some(passphrase), .. } => Wrapper::Passphrase(passphrase),
            Self { key_provider: Some(provider), .. } => Wrapper::Provider(provider),
            Self { identities: Some(_), .. } => {
                return Err(Error::invalid_argument(
                    "identities only open snapshots; to create one pass recipients (recipients_of() derives them)",
                ));
            }
            _ => Wrapper::DefaultIdentity(&self.on_new_identity),
        })
    }

    /// The way to unwrap a data key: with the default identity if no key was passed.
    pub(crate) fn unwrapper(&self) -> Result<Unwrapper<'_>> {
        self.check_one()?;
        Ok(match self {
            Self { key: Some(key), .. } => Unwrapper::Key(key),
            Self { identities: Some(identities), .. } => Unwrapper::Identities(identities),
            Self { passphrase: Some(passphrase), .. } => Unwrapper::Passphrase(passphrase),
            Self { key_provider: Some(provider), .. } => Unwrapper::Provider(provider),
            Self { recipients: Some(_), .. } => {
                return Err(Error::invalid_argument("recipients only create snapshots; to open one pass identities"));
            }
            _ => Unwrapper::DefaultIdentity,
        })
    }
}

impl Wrapper<'_> {
    /// The contents of `enc_metadata` for a payload.
    pub(crate) fn wrap(&self, payload: &KeyPayload, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Vec<u8>> {
        let bytes = payload.bytes();
        match self {
            Self::Key(key) => raw::wrap(bytes, key),
            Self::Recipients(recipients) => age::wrap(bytes, age::parse_recipients(recipients)?, interrupt),
            Self::Passphrase(passphrase) => age::wrap_with_passphrase(bytes, &*passphrase.reveal()?, interrupt),
            Self::Provider(provider) => provider::wrap(bytes, payload.data_key().expose(), provider, interrupt),
            Self::DefaultIdentity(on_new_identity) => {
                age::check_present()?;
                let found = default_identity::find_or_make(on_new_identity, interrupt)?;
                age::wrap(bytes, age::recipients_of(&found.content, &found.place)?, interrupt)
            }
        }
    }
}

impl Unwrapper<'_> {
    /// The payload of the contents of `enc_metadata`.
    pub(crate) fn unwrap(&self, wrapped: &[u8], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<KeyPayload> {
        let payload: Zeroizing<Vec<u8>> = match (super::wrapping(wrapped)?, self) {
            (KeyWrapping::RawKey, Self::Key(key)) => raw::unwrap(wrapped, key)?,
            (KeyWrapping::Age { .. }, Self::Identities(identities)) => {
                age::unwrap(wrapped, age::load(identities, interrupt)?, interrupt)?
            }
            (KeyWrapping::Age { .. }, Self::DefaultIdentity) => {
                age::check_present()?;
                let found = default_identity::find(interrupt)?;
                let identities = age::parse_default(&found.content, &found.place)?;
                age::unwrap(wrapped, identities, interrupt).map_err(|error| error.context(&found.place))?
            }
            (KeyWrapping::Passphrase, Self::Passphrase(passphrase)) => {
                age::unwrap_with_passphrase(wrapped, || passphrase.reveal(), interrupt)?
            }
            (KeyWrapping::KeyProvider { .. }, Self::Provider(provider)) => {
                provider::unwrap(wrapped, provider, interrupt)?
            }
            (wrapping, _) => return Err(self.unfit(&wrapping)),
        };
        KeyPayload::decode(payload).map_err(|error| match self {
            // The other kinds authenticate the payload. A key service must do so, but may not.
            Self::Provider(provider) if error.is_corrupt() => Error::new(
                Kind::Authentication,
                format!("the key service {:?} returned bytes that are not a vmsnap key", provider.name()),
            ),
            _ => error,
        })
    }

    fn unfit(&self, wrapping: &KeyWrapping) -> Error {
        let (how, remedy) = match wrapping {
            KeyWrapping::RawKey => ("with a 32-byte key".to_owned(), "pass the key that it was written with"),
            KeyWrapping::Age { .. } => ("to age recipients".to_owned(), "pass identities"),
            KeyWrapping::Passphrase => ("with a passphrase".to_owned(), "pass the passphrase"),
            KeyWrapping::KeyProvider { name } => {
                (format!("by the key service {name:?}"), "pass a key provider of that name")
            }
        };
        let passed = match self {
            Self::Key(_) => ", not with a key",
            Self::Identities(_) => ", not to age recipients",
            Self::Passphrase(_) => ", not with a passphrase",
            Self::Provider(_) => ", not by a key service",
            Self::DefaultIdentity => "",
        };
        Error::new(Kind::KeyUnavailable, format!("the snapshot is encrypted {how}{passed}: {remedy}"))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
