//! A snapshot that is a directory: a fragment is a file in it, and a namespace is a directory.
//!
//! ```text
//! entries.rs      files and directories below the root; links are never followed
//! walk.rs         everything that is there
//! new_file.rs     a file that is being written
//! staged.rs       the hidden directory of a snapshot that is not committed yet
//! lock.rs         the lock on the root
//! file_system.rs  file systems on which that lock does not reach every writer
//! clean.rs        removes the remains of killed processes
//! remove.rs       removes a hidden directory, however deep it nests
//! ```

pub(crate) mod clean;
pub(crate) mod entries;
mod file_system;
mod lock;
mod new_file;
mod remove;
mod staged;
mod walk;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Head;
use crate::durability;
use crate::error::{Error, Result};
use crate::location::LocalPath;
use crate::manifest::MAX_MANIFEST_BYTES;
use crate::name::{KEY_METADATA, MANIFEST, MAX_KEY_METADATA_BYTES, SnapshotPath};
use crate::stored_file::StoredFile;
use crate::threads::{Interrupt, for_each};

pub(crate) use lock::LockedRoot;
pub(crate) use new_file::NewFile;
pub(crate) use staged::StagedDirectory;

/// A snapshot that is a directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Directory(LocalPath);

impl Directory {
    /// The snapshot at `location`, which need not exist yet.
    pub(crate) fn new(location: LocalPath) -> Self {
        Self(location)
    }

    /// Creates the directory of a snapshot that is written in place.
    pub(crate) fn create_in_place(location: LocalPath) -> Result<Self> {
        entries::create_root(location.path(), location.path())?;
        Ok(Self(location))
    }

    pub(crate) fn location(&self) -> &LocalPath {
        &self.0
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    /// The files at the root. Each has its own error, because the second may not be needed.
    pub(crate) fn head(&self) -> Result<Head> {
        let root = entries::open(self.root(), "")?;
        // Anything but a file, such as a link, is an error: the snapshot must not count as plain.
        let read = |name: &str, max_bytes| {
            entries::read_small(&root, name, max_bytes).map_err(|error| error.context(self.place_of(name)))
        };
        Ok(Head {
            key_metadata: read(KEY_METADATA, MAX_KEY_METADATA_BYTES),
            manifest: read(MANIFEST, MAX_MANIFEST_BYTES),
        })
    }

    /// Whether an entry of any kind has the name of the manifest.
    pub(crate) fn is_sealed(&self) -> Result<bool> {
        entries::exists(&entries::open(self.root(), "")?, MANIFEST)
    }

    /// Opens the file of a fragment.
    pub(crate) fn object(&self, path: &SnapshotPath) -> Result<StoredFile> {
        let (namespace, name) = path.split();
        let namespace = entries::open(self.root(), namespace)?;
        let (file, size) =
            entries::open_file(&namespace, name).map_err(|error| error.context(place_of(path, self.root())))?;
        Ok(StoredFile::of_size(file, size))
    }

    /// Creates the file of a fragment.
    pub(crate) fn create(&self, path: &SnapshotPath, staged: bool) -> Result<NewFile> {
        NewFile::create(self, path, staged)
    }

    /// Creates a file without a name on the file system of the snapshot: no listing and no commit sees it.
    pub(crate) fn create_nameless(&self) -> Result<File> {
        let locked = LockedRoot::shared(self.root())?;
        entries::create_nameless(locked.folder())
    }

    pub(crate) fn add_namespace(&self, namespace: &SnapshotPath) -> Result<()> {
        let locked = LockedRoot::shared(self.root())?;
        let root = locked.folder().try_clone().map_err(|error| {
            Error::io(format!("namespace {:?} of {} cannot be created", namespace.as_str(), self.0), error)
        })?;
        entries::create(root, self.root(), namespace)
    }

    /// Checks that there is such a namespace.
    pub(crate) fn check_namespace(&self, namespace: &SnapshotPath) -> Result<()> {
        entries::open(self.root(), namespace.as_str()).map(drop)
    }

    /// Removes the snapshot.
    pub(crate) fn remove(&self) -> Result<()> {
        let failed = |error| Error::io(format!("cannot remove the snapshot {}", self.0), error);
        let parent = entries::open(self.root().parent().unwrap_or(self.root()), "")?;
        remove::remove_unseen(&parent, self.root(), &entries::temporary_name()?).map_err(failed)
    }

    /// Locks the snapshot, which must not be sealed, against all other writers.
    pub(crate) fn lock_exclusive(&self) -> Result<LockedRoot> {
        LockedRoot::exclusive(self.root())
    }

    /// Refuses a sealed snapshot.
    pub(crate) fn check_unsealed(&self) -> Result<()> {
        lock::check_unsealed(self.root(), &entries::open(self.root(), "")?)
    }

    /// Writes `enc_metadata` of a new, empty snapshot. Removes the directory if that fails.
    pub(crate) fn write_key_metadata(&self, wrapped: &[u8]) -> Result<()> {
        let written = entries::open(self.root(), "").and_then(|root| {
            entries::create_small(&root, KEY_METADATA, wrapped)
                .map_err(|error| Error::io(format!("cannot write {}", self.place_of(KEY_METADATA)), error))
        });
        written.inspect_err(|_| {
            // The caller created the directory, so nothing else is in it. A second error would hide the cause.
            let _ = std::fs::remove_file(self.root().join(KEY_METADATA));
            let _ = std::fs::remove_dir(self.root());
        })
    }

    /// Replaces `enc_metadata`. `between` is called between the steps, for tests.
    pub(crate) fn replace_key_metadata(&self, wrapped: &[u8], between: &mut dyn FnMut()) -> Result<()> {
        let locked = LockedRoot::shared_even_sealed(self.root())?;
        entries::place_file(locked.folder(), KEY_METADATA, wrapped, true, true, between)
            .map_err(|error| error.context(format!("cannot replace {}", self.place_of(KEY_METADATA))))
    }

    /// Writes the manifest, from which on the snapshot is sealed.
    pub(crate) fn write_manifest(&self, locked: &LockedRoot, manifest: &[u8], durable: bool) -> Result<()> {
        entries::place_file(locked.folder(), MANIFEST, manifest, false, durable, &mut || ())
            .map_err(|error| error.context(self.place_of(MANIFEST)))
    }

    /// Syncs the entry of the snapshot in its parent directory.
    pub(crate) fn sync_entry(locked: &LockedRoot) -> std::result::Result<(), Errno> {
        entries::parent_of(locked.folder()).and_then(durability::sync_directory)
    }

    /// Syncs the files of these fragments and of the key metadata, and all directories.
    pub(crate) fn sync<'a>(
        &self,
        fragments: impl ExactSizeIterator<Item = &'a str> + Send,
        namespaces: impl DoubleEndedIterator<Item = &'a str>,
        threads: usize,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let failed = |path: &str, error: Error| error.context(format!("cannot sync {path:?}"));
        let sync_file = |opened: &OwnedFd, name: &str| durability::sync_file(&entries::open_file(opened, name)?.0);
        let sync_directory = |opened: &OwnedFd, named: &str| {
            durability::sync_directory(opened).map_err(|errno| Error::io(format!("cannot sync {named}"), errno))
        };
        let mut workers = vec![(); threads.min(fragments.len())];
        for_each(&mut workers, fragments, interrupt, |(), path, _| {
            let (namespace, name) = path.rsplit_once('/').unwrap_or(("", path));
            sync_file(&entries::open(self.root(), namespace)?, name).map_err(|error| failed(path, error))
        })?;
        for namespace in namespaces.rev() {
            sync_directory(&entries::open(self.root(), namespace)?, &format!("{namespace:?}"))?;
        }
        let root = entries::open(self.root(), "")?;
        if entries::exists(&root, KEY_METADATA)? {
            sync_file(&root, KEY_METADATA).map_err(|error| failed(KEY_METADATA, error))?;
        }
        sync_directory(&root, "the snapshot's directory")
    }

    /// The name of a file at the root, for errors.
    fn place_of(&self, name: &str) -> String {
        format!("{name} of {}", self.0)
    }
}

/// The name of a fragment, for errors.
fn place_of(path: &SnapshotPath, root: &Path) -> String {
    format!("{path} of {}", root.display())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::{Directory, LocalPath};

    /// Set in the child: the snapshot, and the number of steps after which the child aborts.
    const ROOT: &str = "VMSNAP_TEST_REPLACE_ROOT";
    const STEPS: &str = "VMSNAP_TEST_REPLACE_STEPS";

    fn at(path: &Path) -> Directory {
        Directory::new(LocalPath::new(path).unwrap())
    }

    #[test]
    fn killed_between_any_two_steps_it_is_the_old_or_the_new() {
        if let Some(root) = std::env::var_os(ROOT) {
            let mut left: u32 = std::env::var(STEPS).unwrap().parse().unwrap();
            at(root.as_ref())
                .replace_key_metadata(b"new", &mut || {
                    // Like SIGKILL, `abort` runs no cleanup.
                    left = left.checked_sub(1).unwrap_or_else(|| std::process::abort());
                })
                .unwrap();
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("enc_metadata");
        let mut contents = Vec::new();
        for steps in 0.. {
            std::fs::write(&path, b"old").unwrap();
            let done = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::directory::tests::killed_between_any_two_steps_it_is_the_old_or_the_new"])
                .env(ROOT, folder.path())
                .env(STEPS, steps.to_string())
                .output()
                .unwrap();
            contents.push(String::from_utf8(std::fs::read(&path).unwrap()).unwrap());
            for entry in std::fs::read_dir(folder.path()).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(name == "enc_metadata" || name.starts_with(".vmsnap-"), "{name}");
            }
            if done.status.success() {
                break;
            }
        }
        assert_eq!(contents, ["old", "old", "old", "new", "new"]);
        // Leftover temporary files do not prevent the next replacement.
        at(folder.path()).replace_key_metadata(b"newer", &mut || ()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"newer");
    }
}
