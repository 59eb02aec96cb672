//! The caller's callback for a new identity.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;

type Callback = dyn Fn(&Path) -> Result<()> + Send + Sync;

/// Called before an identity is made; an error of the callback prevents it. Does nothing by default.
#[derive(Clone, Default)]
pub(crate) struct OnNewIdentity(Option<Arc<Callback>>);

impl OnNewIdentity {
    pub(crate) fn new(callback: impl Fn(&Path) -> Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(callback)))
    }

    pub(super) fn call(&self, identity: &Path) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |callback| callback(identity))
    }
}

impl fmt::Debug for OnNewIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnNewIdentity").field(&self.0.is_some()).finish()
    }
}
