//! Removes a directory and everything in it. A stranger decides how deep an unpacked snapshot nests, so this neither
//! recurses nor keeps a directory open for each level.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::entries;

const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes a hidden directory. It tries again if a writer that has the directory open adds a file. If the directory does
/// not exist, that is an error.
pub(super) fn remove_all(directory: &Path) -> io::Result<()> {
    let mut attempts = 0..100;
    loop {
        let removed = match empty(directory) {
            Ok(()) => std::fs::remove_dir(directory),
            // If the file system cannot rename, std removes the directory level by level.
            Err(_) => std::fs::remove_dir_all(directory),
        };
        match removed {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && attempts.next().is_some() => {}
            removed => return removed,
        }
    }
}

/// Removes the snapshot in the directory `root`, which it gives the new `name` first, so that nobody finds a part of it.
pub(super) fn remove_unseen(parent: &OwnedFd, root: &Path, name: &str) -> io::Result<()> {
    let old = root.file_name().unwrap_or_default();
    let removed = match entries::rename_new(parent, old, parent, name) {
        Ok(()) => root.with_file_name(name),
        Err(Errno::NOENT) => return Err(Errno::NOENT.into()),
        // If the file system cannot rename, it is removed under its own name.
        Err(_) => root.to_owned(),
    };
    match remove_all(&removed) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes everything in a directory. Each directory in it moves its own directories up before it is removed.
fn empty(directory: &Path) -> io::Result<()> {
    let root = openat(CWD, directory, FLAGS, Mode::empty())?;
    loop {
        let found = entries::entries(&root)?;
        if found.is_empty() {
            return Ok(());
        }
        for (name, kind) in found {
            if kind == FileType::Directory {
                let inner = openat(&root, &*name, FLAGS, Mode::empty())?;
                for (name, kind) in entries::entries(&inner)? {
                    if kind == FileType::Directory {
                        renameat(&inner, &*name, &root, entries::temporary_name()?)?;
                    } else {
                        remove(&inner, &name, AtFlags::empty())?;
                    }
                }
                remove(&root, &name, AtFlags::REMOVEDIR)?;
            } else {
                remove(&root, &name, AtFlags::empty())?;
            }
        }
    }
}

fn remove(directory: &OwnedFd, name: &[u8], flags: AtFlags) -> Result<(), Errno> {
    match unlinkat(directory, name, flags) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn a_directory_that_nests_deeper_than_files_can_be_open_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("deep");
        std::fs::create_dir(&path).unwrap();
        let mut directory = openat(CWD, &path, FLAGS, Mode::empty()).unwrap();
        for _ in 0..1500 {
            for name in ["a", "b"] {
                mkdirat(&directory, name, Mode::RWXU).unwrap();
            }
            entries::create_small(&directory, "fragment", b"x").unwrap();
            directory = openat(&directory, "a", FLAGS, Mode::empty()).unwrap();
        }
        std::os::unix::fs::symlink(parent.path(), path.join("link")).unwrap();
        remove_all(&path).unwrap();
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
        assert_eq!(remove_all(&path).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
