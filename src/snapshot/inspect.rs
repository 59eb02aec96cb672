//! A snapshot as it looks without its key.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::key_metadata;
use crate::error::Result;
use crate::key::KeyWrapping;
use crate::location::Location;
use crate::store::{RemoteOptions, Store, StoredFragment};

/// A snapshot as it looks to anybody who may read its directory, encrypted or not: how its key is wrapped, and the
/// names, sizes and times of its fragments.
///
/// Nothing of it is authenticated. Paths are names joined with `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inspection {
    /// The location of the snapshot, as an absolute path.
    pub location: PathBuf,
    /// How the data key is wrapped; none if the snapshot is not encrypted.
    pub key_wrapping: Option<KeyWrapping>,
    /// Whether the snapshot has a manifest. [`crate::SnapshotOptions::verify`] reads it.
    pub sealed: bool,
    /// The paths of all namespaces, each after the namespace that contains it.
    pub namespaces: Vec<String>,
    /// All fragments; the fragments of one namespace are adjacent.
    pub fragments: Vec<InspectedFragment>,
}

/// A fragment as it looks without the key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InspectedFragment {
    /// The path of the fragment in the snapshot.
    pub path: String,
    /// The size of the fragment's file in bytes.
    pub stored_size_bytes: u64,
    /// When the fragment was last written to.
    pub modified: SystemTime,
    /// Whether the fragment was finished. Only staged snapshots record this; in one written in place it is always true.
    pub finished: bool,
}

impl Inspection {
    /// Whether the snapshot is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.key_wrapping.is_some()
    }
}

/// Inspects the snapshot at `location` without its key.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let location = folder.path().join("vm1");
/// let options = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?);
/// let mut staged = options.create(&location)?;
/// staged.writer().add_namespace("cpu")?.write_fragment("clock", &12_u64)?;
/// staged.commit()?;
///
/// let found = vmsnap::inspect(&location)?;
/// assert!(found.is_encrypted() && found.sealed);
/// assert_eq!(found.key_wrapping, Some(vmsnap::KeyWrapping::RawKey));
/// assert_eq!(found.namespaces, ["cpu"]);
/// assert_eq!(found.fragments[0].path, "cpu/clock");
/// # Ok::<(), vmsnap::Error>(())
/// ```
///
/// # Errors
///
/// [`crate::Error::is_io`] if there is no such directory, [`crate::Error::is_corrupt`] if it contains something that a snapshot
/// cannot contain (a link, a special file, a name that is not allowed) or if `enc_metadata` is not a wrapped key.
pub fn inspect(location: impl AsRef<Path>) -> Result<Inspection> {
    inspect_interruptible(location, &RemoteOptions::default(), &mut || Ok(()))
}

/// Inspects a snapshot as [`inspect`] does, with options of its object store, and calls `interrupt` while that takes
/// time.
pub(crate) fn inspect_interruptible(
    location: impl AsRef<Path>,
    options: &RemoteOptions,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Inspection> {
    let store = Store::at(Location::new(location.as_ref())?, options)?;
    let key_wrapping = key_metadata::wrapping(&store, interrupt)?;
    let sealed = store.is_sealed()?;
    let survey = store.survey(None, interrupt)?.strict()?;
    let fragment = |stored: StoredFragment| InspectedFragment {
        path: stored.path.into(),
        stored_size_bytes: stored.stored_size,
        modified: stored.modified,
        finished: stored.finished,
    };
    Ok(Inspection {
        location: store.path().to_owned(),
        key_wrapping,
        sealed,
        namespaces: survey.namespaces.into_iter().map(String::from).collect(),
        fragments: survey.fragments.into_iter().map(fragment).collect(),
    })
}
