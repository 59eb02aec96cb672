//! Removing what killed processes left behind.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fragment::folder;
use crate::fragment::lock::LockedRoot;

/// What [`clean`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// What was removed.
    pub removed: Vec<PathBuf>,
    /// What is left because a living process holds it.
    pub held: Vec<PathBuf>,
}

/// Removes what killed processes left behind in `parent`: the hidden folders of snapshots that were never committed, and, where
/// `parent` is itself a snapshot, files that were to replace one of its own. What a living process holds stays.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// let staged = vmsnap::SnapshotOptions::new().create(folder.path().join("vm1"))?;
/// let cleaned = vmsnap::clean(folder.path())?;
/// assert_eq!((cleaned.removed.len(), cleaned.held.len()), (0, 1));
/// # Ok::<(), vmsnap::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::is_io`] where `parent` is no folder, or something in it cannot be removed; [`Error::is_state`] where the file system
/// has no locks that would tell whether somebody holds it: on NFS, SMB, 9p, FUSE and others that several hosts write to, a lock on
/// a directory does not reach the other hosts. What is left there is for the user to remove.
pub fn clean(parent: impl AsRef<Path>) -> Result<Cleaned> {
    let parent = folder::absolute(parent.as_ref())?;
    let failed = |error| Error::io(format!("cannot clean {}", parent.display()), error);
    let (mut cleaned, mut first_error) = (Cleaned::default(), None);
    let (mut folders, mut files) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&parent).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_str().is_some_and(folder::is_temporary) {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => folders.push(entry.path()),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            // Whatever it is, it is not of ours; or it went meanwhile.
            Ok(_) | Err(_) => {}
        }
    }
    // A hidden file is of whoever uses the folder it lies in, a hidden folder a snapshot being made.
    let jobs = folders.into_iter().map(|path| (path.clone(), vec![path]));
    for (locked, paths) in jobs.chain((!files.is_empty()).then(|| (parent.clone(), files))) {
        let _locked = match LockedRoot::abandoned(&locked) {
            Ok(Some(alone)) => alone,
            Ok(None) => {
                cleaned.held.extend(paths);
                continue;
            }
            Err(error) if error.is_not_found() => continue,
            Err(error) => {
                first_error.get_or_insert(error);
                continue;
            }
        };
        for path in paths {
            let removed = if path == locked { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            match removed {
                Ok(()) => cleaned.removed.push(path),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    first_error.get_or_insert(Error::io(format!("cannot remove {}", path.display()), error));
                }
            }
        }
    }
    cleaned.removed.sort_unstable();
    cleaned.held.sort_unstable();
    first_error.map_or(Ok(cleaned), Err)
}
