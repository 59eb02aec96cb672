//! Snapshots that are complete or absent: they are staged in a hidden directory and then renamed into place. Also seals
//! snapshots that were written in place.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::cipher::{SecretKey, fill_random};
use crate::durability;
use crate::error::{Error, Kind, Result};
use crate::fragment::ledger::Ledger;
use crate::fragment::lock::LockedRoot;
use crate::fragment::{FragmentReader, folder};
use crate::key_metadata;
use crate::manifest::{Entry, Manifest, Proof};
use crate::name::{KEY_METADATA, MANIFEST, SnapshotPath};
use crate::open_manifest;
use crate::options::SnapshotOptions;
use crate::process::OwnerProcess;
use crate::threads::{self, Interrupt, for_each};
use crate::writer::SnapshotWriter;

/// Identifies a sealed snapshot. Keep it outside the snapshot to check later that the snapshot is unchanged, with
/// [`SnapshotOptions::expect_seal_digest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealId {
    /// Random bytes, different for each snapshot.
    pub snapshot_id: [u8; 16],
    /// The BLAKE3 hash of the manifest's plaintext.
    pub seal_digest: [u8; 32],
}

/// A snapshot that is being created: nothing exists at its location until [`StagedSnapshot::commit`], which puts the
/// complete snapshot there.
///
/// It is written in a hidden directory beside its location, through [`StagedSnapshot::writer`] and the handles made
/// from that writer. Dropping it without a commit removes the hidden directory, in the process that created it. A
/// process that is killed leaves at most the hidden directory behind, which [`crate::clean`] removes.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// let mut staged = vmsnap::SnapshotOptions::new().create(&path)?;
/// staged.writer().write_fragment("clock", &12_u64)?;
/// assert!(!path.exists());
/// let id = staged.commit()?;
/// let reader = vmsnap::SnapshotOptions::new().expect_seal_digest(id.seal_digest).open(&path)?;
/// assert_eq!(reader.read_fragment::<u64>("clock")?, 12);
/// # Ok::<(), vmsnap::Error>(())
/// ```
pub struct StagedSnapshot {
    writer: SnapshotWriter,
    location: PathBuf,
    parent: OwnedFd,
    snapshot_id: [u8; 16],
    durable: bool,
    owner: OwnerProcess,
    state: State,
}

enum State {
    /// The staged directory exists. Its lock tells `clean` to leave it alone.
    Staged(LockedRoot),
    Committed,
    Discarded,
}

impl SnapshotOptions {
    /// Begins a snapshot that is complete or absent: nothing is at `location` until [`StagedSnapshot::commit`].
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if something exists at `location` or the parent directory does not exist,
    /// [`Error::is_invalid_argument`] if an option or the file name is not allowed, and [`Error::is_key_unavailable`]
    /// if the data key cannot be wrapped. After an error nothing is left behind.
    pub fn create(&self, location: impl AsRef<Path>) -> Result<StagedSnapshot> {
        self.create_interruptible(location, &mut || Ok(()))
    }

    /// Begins a snapshot as [`SnapshotOptions::create`] does, and calls `interrupt` while that takes time.
    pub(crate) fn create_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<StagedSnapshot> {
        let location = folder::absolute(location.as_ref())?;
        let (Some(parent_path), Some(_)) = (location.parent(), location.file_name()) else {
            return Err(Error::invalid_argument(format!(
                "{} cannot be the location of a new snapshot",
                location.display()
            )));
        };
        if location.file_name().and_then(|name| name.to_str()).is_some_and(folder::is_temporary) {
            let text = format!(
                "{} cannot be the location of a snapshot: clean() removes directories with such a name",
                location.display()
            );
            return Err(Error::invalid_argument(text));
        }
        let prepared = self.prepare(&location, true, interrupt)?;
        let snapshot_id = match &prepared.payload {
            Some((payload, _)) => payload.snapshot_id(),
            None => random_id()?,
        };
        let failed = |error: Error| error.context(format!("cannot create the snapshot {}", location.display()));
        let parent = folder::open(parent_path, "").map_err(failed)?;
        let (root, locked) = new_staged_root(parent_path, &location).map_err(failed)?;
        let writer = prepared.write_at(root).map_err(failed)?;
        Ok(StagedSnapshot {
            writer,
            location,
            parent,
            snapshot_id,
            durable: self.durable,
            owner: OwnerProcess::current(),
            state: State::Staged(locked),
        })
    }

    /// Seals the snapshot at `location`, which was written in place: writes the manifest that lists its fragments and
    /// their digests. From then on vmsnap refuses to change the snapshot, and finds changes that others make. Sealing
    /// reads the whole snapshot. Returns the snapshot's id and seal digest.
    ///
    /// # Errors
    ///
    /// [`Error::is_sealed`] if the snapshot is sealed already, [`Error::is_state`] if a fragment is still being
    /// written, and the errors of [`SnapshotOptions::open`]. After an error the snapshot is unchanged, with one
    /// exception: if only the last sync fails, the snapshot is sealed, and the error's text says so.
    pub fn seal(&self, location: impl AsRef<Path>) -> Result<SealId> {
        self.seal_interruptible(location, &mut || Ok(()))
    }

    pub(crate) fn seal_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let threads = threads::resolve(self.threads)?;
        let location = folder::absolute(location.as_ref())?;
        let payload = key_metadata::unlock(&location, self, interrupt)?;
        let locked = LockedRoot::exclusive(&location)?;
        if payload.as_ref().is_some_and(crate::key::KeyPayload::is_sealed) {
            return Err(open_manifest::incomplete(&location));
        }
        let snapshot_id = match &payload {
            Some(payload) => payload.snapshot_id(),
            None => random_id()?,
        };
        let data_key = payload.as_ref().map(crate::key::KeyPayload::data_key);
        let scanned = Scanned::of(&location, data_key, None, threads, interrupt)?;
        if self.durable {
            scanned.sync(&location, threads, interrupt)?;
        }
        let id = scanned.write_manifest(locked.folder(), &location, data_key, snapshot_id, self.durable)?;
        if self.durable {
            // The entry of the snapshot in its parent directory.
            folder::parent_of(locked.folder())
                .and_then(durability::sync_directory)
                .map_err(|errno| not_durable(&location, errno))?;
        }
        Ok(id)
    }
}

/// The error for a snapshot that is complete and in place, if only the last sync failed.
fn not_durable(path: &Path, errno: Errno) -> Error {
    let text = format!(
        "the snapshot {} is complete and in place, but the last sync failed, so it may not survive a power failure",
        path.display()
    );
    Error::io(text, errno)
}

/// The error for a staged directory that cannot be renamed to the snapshot's location.
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
fn remove_all(folder: &Path) -> std::io::Result<()> {
    let mut attempts = 0..100;
    loop {
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && attempts.next().is_some() => {}
            removed => return removed,
        }
    }
}

/// Creates a hidden directory in `parent`, locked before it contains anything.
fn new_staged_root(parent: &Path, path: &Path) -> Result<(PathBuf, LockedRoot)> {
    loop {
        let root = parent.join(folder::temporary_name()?);
        folder::create_root(&root, path)?;
        let locked = LockedRoot::of_new(&root).inspect_err(|_| {
            let _ = std::fs::remove_dir(&root);
        })?;
        if let Some(locked) = locked {
            return Ok((root, locked));
        }
    }
}

fn random_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    fill_random(&mut id)?;
    Ok(id)
}

impl StagedSnapshot {
    /// The writer at the root of the snapshot. It can be cloned and sent to other processes.
    #[must_use]
    pub fn writer(&self) -> &SnapshotWriter {
        &self.writer
    }

    /// Where the snapshot will be, as an absolute path. The location of [`StagedSnapshot::writer`] is the hidden
    /// directory.
    #[must_use]
    pub fn location(&self) -> &Path {
        &self.location
    }

    /// Completes the snapshot: lists all its fragments in the manifest, syncs them unless
    /// [`SnapshotOptions::durable`] is off, and renames the directory into place. Returns the snapshot's id and seal
    /// digest.
    ///
    /// # Errors
    ///
    /// [`Error::is_state`] if a fragment is still being written, in any process, or was begun and never finished;
    /// [`Error::is_io`] if something exists at the location by now, or the disk is full. After an error the snapshot
    /// stays staged, with one exception: if only the last sync fails, the snapshot is complete and in place, and the
    /// error's text says so.
    pub fn commit(&mut self) -> Result<SealId> {
        self.commit_interruptible(&mut || Ok(()))
    }

    pub(crate) fn commit_interruptible(&mut self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<SealId> {
        let context = |error: Error| error.context(format!("cannot commit the snapshot {}", self.location.display()));
        self.owner.check_snapshot().map_err(context)?;
        let locked = match &self.state {
            State::Staged(locked) => locked,
            State::Committed => return Err(context(Error::new(Kind::State, "it was committed"))),
            State::Discarded => return Err(context(Error::new(Kind::State, "it was discarded"))),
        };
        locked.take_alone(self.writer.location()).map_err(context)?;
        let id = self.complete(locked, interrupt).map_err(|error| {
            // Restore the staged state: not sealed, and open to its writers. A second error here would hide the cause.
            let _ = rustix::fs::unlinkat(locked.folder(), MANIFEST, rustix::fs::AtFlags::empty());
            locked.share();
            context(error)
        })?;
        // The snapshot is in place now. The lock stays: its descriptor refers to the renamed directory.
        self.state = State::Committed;
        if self.durable {
            durability::sync_directory(&self.parent).map_err(|errno| not_durable(&self.location, errno))?;
        }
        Ok(id)
    }

    fn complete(&self, locked: &LockedRoot, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<SealId> {
        let root = self.writer.location();
        let threads = self.writer.threads();
        let data_key = self.writer.data_key();
        let scanned = Scanned::of(root, data_key, self.writer.ledger(), threads, interrupt)?;
        if self.durable {
            scanned.sync(root, threads, interrupt)?;
        }
        let id = scanned.write_manifest(locked.folder(), root, data_key, self.snapshot_id, self.durable)?;
        interrupt()?;
        let name = self.location.file_name().unwrap_or_default();
        folder::rename_new(&self.parent, root.file_name().unwrap_or_default(), &self.parent, name)
            .map_err(not_placed)?;
        Ok(id)
    }

    /// Removes everything that was written. Does nothing if the snapshot was committed.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if something cannot be removed, [`Error::is_state`] in a forked process.
    pub fn discard(mut self) -> Result<()> {
        self.remove()
    }

    /// Removes the staged directory, if the snapshot is still staged.
    pub(crate) fn remove(&mut self) -> Result<()> {
        self.owner.check_snapshot()?;
        if !matches!(self.state, State::Staged(_)) {
            return Ok(());
        }
        // Rename it first, so that writers in other processes do not find it. The lock is held until it is removed.
        let (root, parent) = (self.writer.location(), self.location.parent().unwrap_or(Path::new("/")));
        let failed = |error| Error::io(format!("cannot remove the staged directory {}", root.display()), error);
        let name = folder::temporary_name()?;
        let renamed = folder::rename_new(&self.parent, root.file_name().unwrap_or_default(), &self.parent, &name);
        let removed = match renamed {
            Ok(()) => parent.join(name),
            Err(Errno::NOENT) => return Err(failed(Errno::NOENT.into())),
            // If the file system cannot rename, remove it under its own name.
            Err(_) => root.to_owned(),
        };
        let _locked = std::mem::replace(&mut self.state, State::Discarded);
        remove_all(&removed).map_err(failed)
    }
}

impl Drop for StagedSnapshot {
    fn drop(&mut self) {
        if self.owner.is_current() {
            // A destructor cannot report an error; `clean` removes the remainder.
            let _ = self.remove();
        }
    }
}

impl fmt::Debug for StagedSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Staged(_) => "staged",
            State::Committed => "committed",
            State::Discarded => "discarded",
        };
        f.debug_struct("StagedSnapshot")
            .field("location", &self.location)
            .field("state", &state)
            .finish_non_exhaustive()
    }
}

/// Everything that a snapshot contains.
struct Scanned {
    namespaces: BTreeSet<Box<str>>,
    fragments: BTreeMap<String, Entry>,
}

impl Scanned {
    /// Lists the snapshot. Reads only fragments that `ledger` does not have.
    fn of(
        root: &Path,
        data_key: Option<&SecretKey>,
        ledger: Option<&Ledger>,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let (mut namespaces, mut fragments) = (BTreeSet::new(), BTreeMap::new());
        let mut pending = vec![SnapshotPath::default()];
        while let Some(namespace) = pending.pop() {
            interrupt()?;
            let (names, inner) = folder::list(root, namespace.as_str())?;
            let opened = folder::open(root, namespace.as_str())?;
            for name in names {
                let path = namespace.join(&name)?;
                let stat = folder::stat(&opened, &name)
                    .map_err(|errno| Error::io(format!("{path} cannot be examined"), errno))?;
                if folder::is_unfinished(&stat) {
                    let text = format!(
                        "{path} was never finished, so the snapshot is not complete: discard it and write it again"
                    );
                    return Err(Error::new(Kind::State, text));
                }
                let known = ledger.and_then(|ledger| ledger.get(path.as_str()));
                let entry = match known {
                    Some(entry) if u64::try_from(stat.st_size) == Ok(entry.stored_size) => entry,
                    Some(_) => return Err(Error::corrupt(format!("{path} was changed after it was written"))),
                    None => examine(root, &path, data_key, threads, interrupt)?,
                };
                fragments.insert(path.into(), entry);
            }
            for name in inner {
                let path = namespace.join(&name)?;
                namespaces.insert(path.as_str().into());
                pending.push(path);
            }
        }
        if let Some(path) = ledger.and_then(|ledger| ledger.missing_in(&fragments)) {
            return Err(Error::corrupt(format!("the fragment {path:?} was removed after it was written")));
        }
        Ok(Self { namespaces, fragments })
    }

    /// Syncs all files that were found, and the directories that contain them.
    fn sync(&self, root: &Path, threads: usize, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let failed = |path: &str, error: Error| error.context(format!("cannot sync {path:?}"));
        let sync_file = |opened: &OwnedFd, name: &str| durability::sync_file(&folder::open_file(opened, name)?.0);
        let sync_directory = |opened: &OwnedFd, named: &str| {
            durability::sync_directory(opened).map_err(|errno| Error::io(format!("cannot sync {named}"), errno))
        };
        let paths: Vec<_> = self.fragments.keys().collect();
        let mut workers = vec![(); threads.min(paths.len())];
        for_each(&mut workers, paths.into_iter(), &mut Interrupt::new(interrupt), |(), path, _| {
            let (namespace, name) = path.rsplit_once('/').unwrap_or(("", path));
            sync_file(&folder::open(root, namespace)?, name).map_err(|error| failed(path, error))
        })?;
        for namespace in self.namespaces.iter().rev() {
            sync_directory(&folder::open(root, namespace)?, &format!("{namespace:?}"))?;
        }
        let root_folder = folder::open(root, "")?;
        if folder::exists(&root_folder, KEY_METADATA)? {
            sync_file(&root_folder, KEY_METADATA).map_err(|error| failed(KEY_METADATA, error))?;
        }
        sync_directory(&root_folder, "the snapshot's directory")
    }

    fn write_manifest(
        self,
        root_folder: &OwnedFd,
        root: &Path,
        data_key: Option<&SecretKey>,
        snapshot_id: [u8; 16],
        durable: bool,
    ) -> Result<SealId> {
        let manifest = Manifest::new(snapshot_id, data_key.is_some(), self.namespaces, self.fragments);
        let (stored, seal_digest) = manifest.encode(data_key)?;
        folder::place_file(root_folder, MANIFEST, &stored, false, durable, &mut || ())
            .map_err(|error| error.context(format!("{MANIFEST} of {}", root.display())))?;
        Ok(SealId { snapshot_id, seal_digest })
    }
}

/// Returns the manifest's entry for a fragment that this process did not write.
fn examine(
    root: &Path,
    path: &SnapshotPath,
    data_key: Option<&SecretKey>,
    threads: usize,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Entry> {
    let fragment = FragmentReader::open(root, path, data_key, threads, None)?;
    if let Some(entry) = fragment.encrypted_entry() {
        return Ok(entry);
    }
    let digest = fragment.blake3(&mut Vec::new(), interrupt)?;
    Ok(Entry { size: fragment.size(), stored_size: fragment.size(), proof: Proof::Blake3(digest) })
}
