//! Passphrases and other secret texts.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::error::{Error, Kind, Result};

/// A text that is wiped when it is dropped.
pub(crate) type SecretText = Zeroizing<String>;

/// A passphrase, or a function that returns one when it is needed. `Debug` does not show it.
///
/// ```
/// let options = vmsnap::SnapshotOptions::new().passphrase("correct horse battery staple".into());
/// # let _ = options;
/// ```
#[derive(Clone)]
pub struct Passphrase(PassphraseSource);

#[derive(Clone)]
enum PassphraseSource {
    Text(Arc<SecretText>),
    Ask(Arc<dyn Fn() -> Result<SecretText> + Send + Sync>),
}

impl Passphrase {
    /// A passphrase from the function `ask`, which is called only if the passphrase is needed.
    pub fn ask(ask: impl Fn() -> std::io::Result<String> + Send + Sync + 'static) -> Self {
        Self::ask_for(move || match ask() {
            Ok(text) => Ok(Zeroizing::new(text)),
            Err(error) => Err(Error::with_source(Kind::KeyUnavailable, "asking for the passphrase failed", error)),
        })
    }

    pub(crate) fn ask_for(ask: impl Fn() -> Result<SecretText> + Send + Sync + 'static) -> Self {
        Self(PassphraseSource::Ask(Arc::new(ask)))
    }

    pub(super) fn reveal(&self) -> Result<Arc<SecretText>> {
        let text = match &self.0 {
            PassphraseSource::Text(text) => Arc::clone(text),
            PassphraseSource::Ask(ask) => Arc::new(ask()?),
        };
        if text.is_empty() { Err(Error::invalid_argument("a passphrase cannot be empty")) } else { Ok(text) }
    }
}

impl From<String> for Passphrase {
    fn from(text: String) -> Self {
        Self(PassphraseSource::Text(Arc::new(Zeroizing::new(text))))
    }
}

impl From<&str> for Passphrase {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}
