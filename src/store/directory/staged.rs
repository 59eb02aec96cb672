//! The hidden directory in which a snapshot is written until it is committed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::{Directory, LockedRoot, entries, remove};
use crate::durability;
use crate::error::{Error, Result};
use crate::location::LocalPath;
use crate::name::MANIFEST;
use crate::process::OwnerProcess;

/// The file of an archive in its hidden directory. The name is reserved for vmsnap, so it is not that of a fragment.
const ARCHIVE: &str = ".vmsnap-archive";

/// A snapshot in a hidden directory beside its location. Its lock tells `clean` to leave it alone.
pub(crate) struct StagedDirectory {
    directory: Directory,
    location: LocalPath,
    parent: OwnedFd,
    lock: LockedRoot,
}

impl StagedDirectory {
    /// Refuses a location that no staged snapshot can get.
    pub(crate) fn check(location: &LocalPath) -> Result<()> {
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
    pub(crate) fn create(location: LocalPath) -> Result<Self> {
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
                return Ok(Self { directory: Directory::new(LocalPath::new(&root)?), location, parent, lock });
            }
        }
    }

    /// Creates the hidden directory and calls `fill`. If that fails, removes the directory, but not in a forked child.
    pub(crate) fn filled<T>(location: LocalPath, fill: impl FnOnce(&Self) -> Result<T>) -> Result<(Self, T)> {
        let owner = OwnerProcess::current();
        let staged = Self::create(location)?;
        match fill(&staged) {
            Ok(value) => Ok((staged, value)),
            Err(error) => {
                if owner.is_current() {
                    // A second error would hide the cause; `clean` removes the remainder.
                    let _ = staged.discard();
                }
                Err(error)
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
        self.remove_archive();
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

    /// Creates the file of an archive in the hidden directory. It can be read, too.
    pub(crate) fn create_archive(&self) -> Result<File> {
        self.remove_archive();
        entries::create_readable(self.lock.folder(), ARCHIVE)
            .map_err(|errno| Error::io("the file of the archive cannot be created", errno))
    }

    /// Removes the file of an archive that is not complete.
    pub(crate) fn remove_archive(&self) {
        let _ = unlinkat(self.lock.folder(), ARCHIVE, AtFlags::empty());
    }

    /// Renames the file of the archive to the location of the snapshot.
    pub(crate) fn place_archive(&self) -> Result<()> {
        self.place_file(self.lock.folder(), ARCHIVE)
    }

    /// Replaces the archive at the location of the snapshot by the new file.
    pub(crate) fn replace_by_archive(&self) -> Result<()> {
        renameat(self.lock.folder(), ARCHIVE, &self.parent, file_name(self.location.path())).map_err(not_placed)
    }

    /// Renames a file in the hidden directory to the location of the snapshot.
    pub(crate) fn place_file(&self, namespace: &OwnedFd, name: &str) -> Result<()> {
        entries::rename_new_file(namespace, name, &self.parent, file_name(self.location.path())).map_err(not_placed)
    }

    /// Fails if something is at the location of the snapshot, before much work is done.
    pub(crate) fn check_free(&self) -> Result<()> {
        match statat(&self.parent, file_name(self.location.path()), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(not_placed(Errno::EXIST)),
            Err(_) => Ok(()),
        }
    }

    /// Removes the hidden directory, from which the archive was renamed away, and syncs the entry of the archive in its
    /// parent directory. A directory that cannot be removed is left to `clean`.
    pub(crate) fn finish_archive(self, durable: bool) -> std::result::Result<(), Errno> {
        let _ = self.discard();
        if durable { self.sync_entry() } else { Ok(()) }
    }

    /// Unlocks the committed snapshot, and syncs its entry in its parent directory.
    pub(crate) fn sync_entry(self) -> std::result::Result<(), Errno> {
        drop(self.lock);
        durability::sync_directory(&self.parent)
    }

    /// Removes the directory and everything in it.
    pub(crate) fn discard(&self) -> Result<()> {
        // The lock is held until it is removed.
        let root = self.directory.root();
        remove::remove_unseen(&self.parent, root, &entries::temporary_name()?)
            .map_err(|error| Error::io(format!("cannot remove the staged directory {}", root.display()), error))
    }

    fn name(&self) -> &OsStr {
        file_name(self.directory.root())
    }
}

fn file_name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

/// The error for a staged snapshot that cannot be renamed to its location.
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
