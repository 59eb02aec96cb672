//! Removal of files that killed processes left behind.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::entries;
use super::lock::LockedRoot;
use super::remove::remove_all;
use crate::error::{Error, Result};
use crate::location::Location;

/// The result of [`clean`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// The removed files and directories.
    pub removed: Vec<PathBuf>,
    /// Files and directories that were left, because a running process uses them.
    pub held: Vec<PathBuf>,
}

/// Removes the files and directories that killed processes left in `parent`: the hidden directories of snapshots that
/// were never committed and, if `parent` is itself a snapshot, unfinished replacements of its files. Files and
/// directories that a running process uses stay.
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
/// [`Error::is_io`] if `parent` is not a directory, or a file in it cannot be removed. [`Error::is_state`] if locks of
/// the file system cannot show whether a directory is in use: on NFS, SMB, 9p, FUSE and other file systems that several
/// hosts write to, a lock on a directory does not reach the other hosts. Remove abandoned directories there by hand.
pub fn clean(parent: impl AsRef<Path>) -> Result<Cleaned> {
    let parent = Location::new(parent.as_ref())?.local("clean()")?.path().to_owned();
    let failed = |error| Error::io(format!("cannot clean {}", parent.display()), error);
    let (mut cleaned, mut first_error) = (Cleaned::default(), None);
    let (mut folders, mut files) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&parent).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_str().is_some_and(entries::is_temporary) {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => folders.push(entry.path()),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            // vmsnap does not make other kinds of files; or the entry was removed meanwhile.
            Ok(_) | Err(_) => {}
        }
    }
    // A hidden directory is a snapshot that is being made. A hidden file belongs to the process that locks `parent`.
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
            let removed = if path == locked { remove_all(&path) } else { std::fs::remove_file(&path) };
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
