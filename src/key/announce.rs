//! How the user is told of an identity that is made for them.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;

type Tell = dyn Fn(&str) -> Result<()> + Send + Sync;

/// Tells of a new identity, before it is made: where that fails, nothing is made.
#[derive(Clone)]
pub(crate) struct Announce(Arc<Tell>);

impl Announce {
    #[cfg(feature = "python")]
    pub(crate) fn by(tell: impl Fn(&str) -> Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    pub(super) fn announce(&self, identity: &Path) -> Result<()> {
        (self.0)(&format!(
            "a new identity was made in {}: keep a copy of it elsewhere, for without it nobody can open what is written for it",
            identity.display()
        ))
    }
}

/// On standard error; that it takes it is not worth an error.
impl Default for Announce {
    fn default() -> Self {
        Self(Arc::new(|text| {
            let _ = writeln!(std::io::stderr(), "vmsnap: {text}");
            Ok(())
        }))
    }
}

impl fmt::Debug for Announce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Announce(…)")
    }
}
