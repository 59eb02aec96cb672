//! Files and directories in a snapshot. Links are never followed: directories are opened one component after the other
//! with `O_NOFOLLOW`, and each name is resolved in the directory opened before.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::cipher::fill_random;
use crate::durability;
use crate::error::{Error, Result};
use crate::name::SnapshotPath;

/// Only its owner may read guest memory.
const FOLDER_MODE: Mode = Mode::RWXU;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

const FOLDER_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The mode of a staged fragment's file until it is finished. So a commit finds the unfinished files of killed
/// processes.
const UNFINISHED_MODE: Mode = Mode::WUSR;

/// Creates the directory of a new snapshot, whose final location is `path`.
pub(crate) fn create_root(root: &Path, path: &Path) -> Result<()> {
    fs::mkdirat(CWD, root, FOLDER_MODE).map_err(|errno| not_created(path, errno))
}

/// Checks in advance, as far as possible, that [`create_root`] can succeed.
pub(crate) fn check_new(root: &Path) -> Result<()> {
    match fs::statat(CWD, root, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => return Err(not_created(root, Errno::EXIST)),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(not_created(root, errno)),
    }
    let parent = root.parent().unwrap_or(root);
    fs::statat(CWD, parent, AtFlags::empty()).map(drop).map_err(|errno| not_created(root, errno))
}

fn not_created(root: &Path, errno: Errno) -> Error {
    let reason = match errno {
        Errno::EXIST => "the path already exists",
        Errno::NOENT => "the parent directory does not exist",
        _ => "the directory cannot be created",
    };
    Error::io(format!("cannot create the snapshot {}: {reason}", root.display()), errno)
}

/// Opens the directory of a namespace, or of the root.
pub(crate) fn open(root: &Path, namespace: &str) -> Result<OwnedFd> {
    // The path of the root is the caller's, and may contain links.
    let folder = fs::openat(CWD, root, FOLDER_FLAGS, Mode::empty()).map_err(|errno| {
        let staged = root.file_name().and_then(|name| name.to_str()).is_some_and(is_temporary);
        let text = if staged && errno == Errno::NOENT {
            format!("the snapshot that was staged in {} was committed or discarded", root.display())
        } else {
            format!("cannot open the snapshot {}", root.display())
        };
        Error::io(text, errno)
    })?;
    open_below(folder, root, namespace)
}

/// Opens the directory of a namespace in an open root; `root` is for errors.
pub(crate) fn open_below(mut folder: OwnedFd, root: &Path, namespace: &str) -> Result<OwnedFd> {
    for name in namespace.split('/').filter(|name| !name.is_empty()) {
        folder = fs::openat(&folder, name, FOLDER_FLAGS | OFlags::NOFOLLOW, Mode::empty()).map_err(|errno| {
            let place = format!("namespace {namespace:?} of {}", root.display());
            match (errno, kind_of(&folder, name)) {
                (Errno::NOTDIR | Errno::LOOP, Some(kind)) if kind != FileType::RegularFile => {
                    stray_named(name, kind).context(place)
                }
                (Errno::NOENT, _) => Error::io(format!("{place} does not exist"), errno),
                _ => Error::io(format!("cannot open {place}"), errno),
            }
        })?;
    }
    Ok(folder)
}

/// Whether an open directory is the one at a path.
pub(crate) fn is_at(folder: &OwnedFd, path: &Path) -> bool {
    match (fs::fstat(folder), fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)) {
        (Ok(own), Ok(there)) => (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino),
        _ => false,
    }
}

/// Opens the parent directory.
pub(crate) fn parent_of(folder: &OwnedFd) -> std::result::Result<OwnedFd, Errno> {
    fs::openat(folder, "..", FOLDER_FLAGS, Mode::empty())
}

/// Creates the directory of a namespace.
pub(crate) fn create(opened: OwnedFd, root: &Path, namespace: &SnapshotPath) -> Result<()> {
    let (parent, name) = namespace.split();
    fs::mkdirat(open_below(opened, root, parent)?, name, FOLDER_MODE).map_err(|errno| {
        let reason = if errno == Errno::EXIST { "exists already" } else { "cannot be created" };
        Error::io(format!("namespace {:?} of {} {reason}", namespace.as_str(), root.display()), errno)
    })
}

/// Creates a file that must not exist.
pub(crate) fn create_file(folder: &OwnedFd, name: &str) -> std::result::Result<File, Errno> {
    create_file_with(folder, name, OFlags::WRONLY, FILE_MODE)
}

/// Creates a file that must not exist, to write it and read it back.
pub(crate) fn create_readable(folder: &OwnedFd, name: &str) -> std::result::Result<File, Errno> {
    create_file_with(folder, name, OFlags::RDWR, FILE_MODE)
}

/// Creates a file without a name, to write it and read it back. It is gone when its last descriptor is closed, also
/// after a crash.
pub(crate) fn create_nameless(folder: &OwnedFd) -> Result<File> {
    // Exclusive: no process can give it a name later.
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = fs::openat(folder, ".", flags, FILE_MODE) {
        return Ok(file.into());
    }
    // The file system, or an old kernel, does not support that.
    create_and_unlink(folder)
}

fn create_and_unlink(folder: &OwnedFd) -> Result<File> {
    let name = temporary_name()?;
    let file = create_readable(folder, &name).map_err(|errno| Error::io("cannot be created", errno))?;
    fs::unlinkat(folder, &name, AtFlags::empty()).map_err(|errno| Error::io("cannot be unlinked", errno))?;
    Ok(file)
}

/// Opens a file that exists, to write into it.
pub(crate) fn open_writable(folder: &OwnedFd, name: &str) -> std::result::Result<File, Errno> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    fs::openat(folder, name, flags, Mode::empty()).map(File::from)
}

/// Creates the file of a staged fragment, which counts as unfinished until [`mark_finished`].
pub(crate) fn create_unfinished(folder: &OwnedFd, name: &str) -> std::result::Result<File, Errno> {
    create_file_with(folder, name, OFlags::RDWR, UNFINISHED_MODE)
}

fn create_file_with(folder: &OwnedFd, name: &str, access: OFlags, mode: Mode) -> std::result::Result<File, Errno> {
    let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(folder, name, flags, mode).map(File::from)
}

/// Creates a small file of vmsnap's own.
pub(crate) fn create_small(folder: &OwnedFd, name: &str, contents: &[u8]) -> io::Result<()> {
    create_file(folder, name)?.write_all_at(contents, 0)
}

/// Marks the file of a staged fragment as finished.
pub(crate) fn mark_finished(file: &File) -> io::Result<()> {
    match fs::fchmod(file, FILE_MODE) {
        // A file system without modes does not have the mark.
        Err(_) if !is_unfinished(&fs::fstat(file)?) => Ok(()),
        marked => Ok(marked?),
    }
}

/// Marks the file of a staged fragment as unfinished again, so that a commit refuses it.
pub(crate) fn mark_unfinished(file: &File) -> io::Result<()> {
    Ok(fs::fchmod(file, UNFINISHED_MODE)?)
}

/// Whether the file belongs to a staged fragment that was never finished.
pub(crate) fn is_unfinished(stat: &fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && Mode::from_raw_mode(stat.st_mode) & Mode::RUSR != Mode::RUSR
}

/// Examines an entry of a directory; links are not followed.
pub(crate) fn stat(folder: &OwnedFd, name: &str) -> std::result::Result<fs::Stat, Errno> {
    fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// Reads a small file of vmsnap's own; returns `None` if it does not exist.
pub(crate) fn read_small(folder: &OwnedFd, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>> {
    let (file, size) = match open_file(folder, name) {
        Ok(opened) => opened,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    if size > max_bytes {
        return Err(Error::corrupt(format!("is {size} bytes long; the limit is {max_bytes}")));
    }
    let mut contents = Vec::new();
    file.take(size).read_to_end(&mut contents).map_err(|error| Error::io("cannot be read", error))?;
    Ok(Some(contents))
}

/// A name for a file or directory that is renamed when it is complete; readers ignore such names.
pub(crate) fn temporary_name() -> Result<String> {
    let mut number = [0; 8];
    fill_random(&mut number)?;
    Ok(format!(".vmsnap-{:016x}", u64::from_ne_bytes(number)))
}

/// Whether [`temporary_name`] could have made a name.
pub(crate) fn is_temporary(name: &str) -> bool {
    let digits = name.strip_prefix(".vmsnap-").unwrap_or_default();
    digits.len() == 16 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Creates or replaces a small file atomically: at any moment, also after a crash, the old contents or the new ones are
/// in place. `between` is called between the steps.
pub(crate) fn place_file(
    folder: &OwnedFd,
    name: &str,
    contents: &[u8],
    replace: bool,
    durable: bool,
    between: &mut dyn FnMut(),
) -> Result<()> {
    let temporary = temporary_name()?;
    let file = create_file(folder, &temporary).map_err(|errno| Error::io("cannot be created", errno))?;
    let mut written = || -> Result<()> {
        between();
        file.write_all_at(contents, 0).map_err(|error| Error::io("cannot be written", error))?;
        between();
        if durable {
            durability::sync_file(&file)?;
        }
        between();
        let renamed = if replace {
            fs::renameat(folder, &temporary, folder, name)
        } else {
            rename_new(folder, &temporary, folder, name)
        };
        renamed.map_err(|errno| Error::io("cannot be renamed into place", errno))
    };
    written().inspect_err(|_| {
        // The first error is more useful than a failure to clean up.
        let _ = fs::unlinkat(folder, &temporary, AtFlags::empty());
    })?;
    between();
    if durable {
        durability::sync_directory(folder).map_err(|errno| Error::io("its directory cannot be synced", errno))?;
    }
    Ok(())
}

/// Renames without overwriting.
pub(crate) fn rename_new(
    from: &OwnedFd,
    old: impl AsRef<Path>,
    to: &OwnedFd,
    new: impl AsRef<Path>,
) -> std::result::Result<(), Errno> {
    let (old, new) = (old.as_ref(), new.as_ref());
    match fs::renameat_with(from, old, to, new, fs::RenameFlags::NOREPLACE) {
        // The file system, or an old kernel, does not support it. A plain rename could replace only an empty directory.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match fs::statat(to, new, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => fs::renameat(from, old, to, new),
            Err(errno) => Err(errno),
        },
        renamed => renamed,
    }
}

/// Renames a file without overwriting.
pub(crate) fn rename_new_file(
    from: &OwnedFd,
    old: &str,
    to: &OwnedFd,
    new: impl AsRef<Path>,
) -> std::result::Result<(), Errno> {
    match fs::renameat_with(from, old, to, new.as_ref(), fs::RenameFlags::NOREPLACE) {
        // The file system, or an old kernel, does not support it. A plain rename would replace a file that another
        // process creates meanwhile; a hard link does not.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            match fs::linkat(from, old, to, new.as_ref(), AtFlags::empty()) {
                Ok(()) => fs::unlinkat(from, old, AtFlags::empty()),
                Err(Errno::EXIST) => Err(Errno::EXIST),
                Err(_) => rename_new(from, old, to, new),
            }
        }
        renamed => renamed,
    }
}

/// Opens a regular file for reading; returns it and its size. Anything else is refused.
pub(crate) fn open_file(folder: &OwnedFd, name: &str) -> Result<(File, u64)> {
    // Non-blocking: opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file =
        fs::openat(folder, name, flags, Mode::empty()).map_err(|errno| match (errno, kind_of(folder, name)) {
            (Errno::LOOP | Errno::NXIO, Some(kind)) if kind != FileType::RegularFile => stray(kind),
            (Errno::NOENT, _) => Error::io("does not exist", errno),
            _ => Error::io("cannot be opened", errno),
        })?;
    let stat = fs::fstat(&file).map_err(|errno| Error::io("cannot be examined", errno))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let size = u64::try_from(stat.st_size).map_err(|_| Error::corrupt("has a negative size"))?;
            Ok((File::from(file), size))
        }
        FileType::Directory => Err(Error::io("is a namespace, not a fragment", Errno::ISDIR)),
        kind => Err(stray(kind)),
    }
}

/// Removes `name` if it is still the file `file`.
pub(crate) fn remove_file(folder: &OwnedFd, name: &str, file: &File) -> io::Result<()> {
    let own = fs::fstat(file)?;
    let there = match fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        there => there?,
    };
    if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino) {
        fs::unlinkat(folder, name, AtFlags::empty())?;
    }
    Ok(())
}

/// Lists all entries of a directory.
pub(crate) fn entries(folder: &OwnedFd) -> std::result::Result<Vec<(Vec<u8>, FileType)>, Errno> {
    let mut entries = Vec::new();
    for entry in fs::Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let kind = match entry.file_type() {
            // Not every file system returns the kind together with the name.
            FileType::Unknown => fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
                .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
            kind => kind,
        };
        entries.push((name.to_bytes().to_vec(), kind));
    }
    Ok(entries)
}

/// Whether an entry of any kind has that name.
pub(crate) fn exists(folder: &OwnedFd, name: &str) -> Result<bool> {
    match stat(folder, name) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(Error::io(format!("{name:?} cannot be examined"), errno)),
    }
}

fn kind_of(folder: impl AsFd, name: &str) -> Option<FileType> {
    let stat = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}

/// The error for an entry of a wrong kind; the caller adds its name.
fn stray(kind: FileType) -> Error {
    Error::corrupt(format!("is {}, {NOT_ALLOWED}", kind_text(kind)))
}

/// The error for an entry of a wrong kind, with its name.
pub(super) fn stray_named(name: &str, kind: FileType) -> Error {
    Error::corrupt(format!("{name:?} is {}, {NOT_ALLOWED}", kind_text(kind)))
}

const NOT_ALLOWED: &str = "but a snapshot contains only files and directories";

fn kind_text(kind: FileType) -> &'static str {
    match kind {
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "a special file",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_nameless_file_is_its_owners_and_in_no_listing() {
        let root = tempfile::tempdir().unwrap();
        let folder = open(root.path(), "").unwrap();
        for create in [create_nameless, create_and_unlink] {
            let file = create(&folder).unwrap();
            file.write_all_at(b"scratch", 3).unwrap();
            let mut back = [9; 10];
            file.read_exact_at(&mut back, 0).unwrap();
            assert_eq!(&back, b"\0\0\0scratch");
            let found = file.metadata().unwrap();
            assert_eq!((found.nlink(), found.mode() & 0o7777), (0, 0o600));
            assert_eq!(found.dev(), root.path().metadata().unwrap().dev());
            assert!(entries(&folder).unwrap().is_empty());
        }
    }
}
