//! Removal of the remains of killed writers, here or in an object store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::SnapshotOptions;
use crate::error::{Error, Result};
use crate::location::Location;
use crate::store::directory::clean::{Cleaned, clean};
use crate::store::remote::{self, Bucket};
use crate::threads::Interrupt;

impl SnapshotOptions {
    /// Removes the remains of killed writers at `location` and below it.
    ///
    /// `location` is the URL of a snapshot, or a prefix of several. Where a push or [`SnapshotOptions::create`] has begun
    /// a snapshot and not completed it, all its objects are removed. Snapshots that are complete stay, and so does
    /// everything to which something was added within `age`, because its writer may still run: choose a day, unless you
    /// know that it does not. A local path is cleaned as by [`crate::clean`], which finds out whether a writer runs.
    ///
    /// Parts of objects that were never completed are not visible; the bucket needs a lifecycle rule that removes them.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// let day = std::time::Duration::from_secs(24 * 60 * 60);
    /// let options = vmsnap::SnapshotOptions::new();
    /// let staged = options.create("memory://bucket/fleet/vm1")?;
    /// let cleaned = options.clean("memory://bucket/fleet", day)?;
    /// assert!(cleaned.removed.is_empty());
    /// assert_eq!(cleaned.held, [std::path::Path::new("memory://bucket/fleet/vm1")]);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if objects cannot be listed or removed, and the errors of [`crate::clean`].
    pub fn clean(&self, location: impl AsRef<Path>, age: Duration) -> Result<Cleaned> {
        self.clean_interruptible(location, age, &mut || Ok(()))
    }

    /// Cleans as [`SnapshotOptions::clean`] does, and calls `interrupt` while that takes time.
    pub(crate) fn clean_interruptible(
        &self,
        location: impl AsRef<Path>,
        age: Duration,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Cleaned> {
        let url = match Location::new(location.as_ref())? {
            Location::Path(path) => return clean(path.path()),
            Location::Url(url) => url,
        };
        let failed = |error: Error| error.context(format!("cannot clean {url}"));
        let bucket = Bucket::new(url.clone(), self.remote.clone()).map_err(failed)?;
        let (removed, held) = remote::clean(&bucket, age, &mut Interrupt::new(interrupt)).map_err(failed)?;
        let absolute = |prefix: String| {
            if prefix.is_empty() { url.path().to_owned() } else { PathBuf::from(format!("{url}/{prefix}")) }
        };
        Ok(Cleaned {
            removed: removed.into_iter().map(absolute).collect(),
            held: held.into_iter().map(absolute).collect(),
        })
    }
}
