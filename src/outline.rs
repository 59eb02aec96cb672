//! What shows of a snapshot without its key.

use std::path::Path;
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::fragment::folder;
use crate::name::SnapshotPath;

/// What anybody sees of a snapshot who may read its folder: names, sizes and times, encrypted or not.
///
/// Nothing of it is authenticated. Paths are names joined with `/`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outline {
    /// The paths of all namespaces, each after the one it is in.
    pub namespaces: Vec<String>,
    /// All fragments, those of a namespace together.
    pub fragments: Vec<OutlinedFragment>,
}

/// A fragment as its folder shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlinedFragment {
    /// Its path from the root.
    pub path: String,
    /// Bytes of its file.
    pub stored_size_bytes: u64,
    /// When it was last written to.
    pub modified: SystemTime,
}

impl Outline {
    /// Reads the outline of the snapshot at `root`.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let root = folder.path().join("vm1");
    /// # vmsnap::SnapshotWriter::new(&root, false)?.add_namespace("cpu")?.write_fragment("clock", &12_u64)?;
    /// let outline = vmsnap::Outline::read(&root)?;
    /// assert_eq!(outline.namespaces, ["cpu"]);
    /// assert_eq!(outline.fragments[0].path, "cpu/clock");
    /// assert_eq!(outline.fragments[0].stored_size_bytes, 1);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] where there is no such folder, [`Error::is_corrupt`] where something in it cannot be a snapshot's: a
    /// link, a special file, a name that is not allowed.
    pub fn read(root: impl AsRef<Path>) -> Result<Self> {
        let root = folder::absolute(root.as_ref())?;
        let mut outline = Self::default();
        let mut pending = vec![SnapshotPath::default()];
        while let Some(namespace) = pending.pop() {
            let (fragments, namespaces) = folder::list(&root, namespace.as_str())?;
            let opened = folder::open(&root, namespace.as_str())?;
            for name in fragments {
                let path = namespace.join(&name)?;
                let context = |error: Error| error.context(format!("{path} of {}", root.display()));
                let (file, stored_size_bytes) = folder::open_file(&opened, &name).map_err(context)?;
                let modified = file
                    .metadata()
                    .and_then(|metadata| metadata.modified())
                    .map_err(|error| context(Error::io("cannot be examined", error)))?;
                outline.fragments.push(OutlinedFragment { path: path.into(), stored_size_bytes, modified });
            }
            for name in namespaces.iter().rev() {
                pending.push(namespace.join(name)?);
            }
            if !namespace.as_str().is_empty() {
                outline.namespaces.push(namespace.into());
            }
        }
        Ok(outline)
    }
}
