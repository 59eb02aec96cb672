//! The hidden directory in which a snapshot is written until it is committed.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;

use super::entries;
use super::{Directory, LockedRoot};
use crate::durability;
use crate::error::{Error, Result};
use crate::location::Location;
use crate::name::MANIFEST;

/// A snapshot in a hidden directory beside its location. Its lock tells `clean` to leave it alone.
pub(crate) struct StagedDirectory {
    directory: Directory,
    location: Location,
    parent: OwnedFd,
    lock: LockedRoot,
}

impl StagedDirectory {
    /// Refuses a location that no staged snapshot can get.
    pub(crate) fn check(location: &Location) -> Result<()> {
        let path = location.path();
        let (Some(_), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::invalid_argument(format!("{location} cannot be the location of a new snapshot")));
        };
        if name.to_str().is_some_and(entries::is_temporary) {
            let text = format!(
                "{location} cannot be the location of a snapshot: clean() removes directories with such a name"
            );
            return Err(Error::invalid_argument(text));
        }
        Ok(())
    }

    /// Creates the hidden directory of a snapshot that will be at `location`.
    pub(crate) fn create(location: Location) -> Result<Self> {
        let parent_path = location.path().parent().unwrap_or(Path::new("/"));
        let parent = entries::open(parent_path, "")?;
        loop {
            let root = parent_path.join(entries::temporary_name()?);
            entries::create_root(&root, location.path())?;
            let locked = LockedRoot::of_new(&root).inspect_err(|_| {
                let _ = std::fs::remove_dir(&root);
            })?;
            // It is locked before it contains anything. If `clean` was faster, there is no such directory any more.
            if let Some(lock) = locked {
                return Ok(Self { directory: Directory::new(Location::new(&root)?), location, parent, lock });
            }
        }
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Locks the snapshot against its writers. Fails if one is not done.
    pub(crate) fn stop_writers(&self) -> Result<()> {
        self.lock.take_alone(self.directory.root())
    }

    /// Undoes a failed commit: the snapshot is not sealed, and open to its writers.
    pub(crate) fn reopen(&self) {
        // A second error would hide the cause.
        let _ = unlinkat(self.lock.folder(), MANIFEST, AtFlags::empty());
        self.lock.share();
    }

    /// Writes the manifest and renames the directory to the location of the snapshot. The lock stays: its descriptor
    /// refers to the renamed directory.
    pub(crate) fn publish(
        &self,
        manifest: &[u8],
        durable: bool,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.directory.write_manifest(&self.lock, manifest, durable)?;
        interrupt()?;
        entries::rename_new(&self.parent, self.name(), &self.parent, file_name(self.location.path()))
            .map_err(not_placed)
    }

    /// Unlocks the committed snapshot, and syncs its entry in its parent directory.
    pub(crate) fn sync_entry(self) -> std::result::Result<(), Errno> {
        drop(self.lock);
        durability::sync_directory(&self.parent)
    }

    /// Removes the directory and everything in it.
    pub(crate) fn discard(&self) -> Result<()> {
        // Renamed first, so that writers in other processes do not find it. The lock is held until it is removed.
        let root = self.directory.root();
        let failed = |error| Error::io(format!("cannot remove the staged directory {}", root.display()), error);
        let name = entries::temporary_name()?;
        let removed = match entries::rename_new(&self.parent, self.name(), &self.parent, &name) {
            Ok(()) => root.with_file_name(name),
            Err(Errno::NOENT) => return Err(failed(Errno::NOENT.into())),
            // If the file system cannot rename, it is removed under its own name.
            Err(_) => root.to_owned(),
        };
        remove_all(&removed).map_err(failed)
    }

    fn name(&self) -> &OsStr {
        file_name(self.directory.root())
    }
}

fn file_name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

/// The error for a staged directory that cannot be renamed to the location of its snapshot.
fn not_placed(errno: Errno) -> Error {
    let text = match errno {
        Errno::EXIST => "the path already exists",
        Errno::XDEV => {
            "the file system cannot rename the staged directory into place (it reports two different file systems); \
             create the snapshot in another directory"
        }
        _ => "the staged directory cannot be renamed into place",
    };
    Error::io(text, errno)
}

/// Removes a directory that has a new name already. It tries again if a writer that has the directory open adds a file.
fn remove_all(directory: &Path) -> std::io::Result<()> {
    let mut attempts = 0..100;
    loop {
        match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && attempts.next().is_some() => {}
            removed => return removed,
        }
    }
}
