//! A snapshot that is complete or absent: it is staged, and committed.

use std::fmt;
use std::path::Path;

use super::contents::Contents;
use super::seal::{not_durable, random_id};
use super::writer::Prepared;
use super::{SnapshotOptions, SnapshotWriter};
use crate::error::{Error, Kind, Result};
use crate::location::{LocalPath, Location, StoreUrl};
use crate::manifest::SealId;
use crate::process::OwnerProcess;
use crate::store::archive::assemble;
use crate::store::directory::{StagedDirectory, entries};
#[cfg(feature = "object-store")]
use crate::store::remote::{Bucket, SnapshotUpload};
use crate::store::{Draft, Store};
use crate::threads::Interrupt;

/// A snapshot that is being created: nothing exists at its location until [`StagedSnapshot::commit`], which puts the
/// complete snapshot there, as a directory or as an archive ([`SnapshotOptions::archive`]).
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
    location: Location,
    snapshot_id: [u8; 16],
    durable: bool,
    /// Whether the commit makes one file of it.
    archive: bool,
    owner: OwnerProcess,
    state: State,
}

enum State {
    Staged(StagedDirectory),
    #[cfg(feature = "object-store")]
    Uploading(SnapshotUpload),
    Committed,
    Discarded,
}

impl SnapshotOptions {
    /// Begins a snapshot that is complete or absent: nothing is at `location` until [`StagedSnapshot::commit`].
    ///
    /// The snapshot becomes a directory, or one file if the name ends in `.vmsnap.tar`; see
    /// [`SnapshotOptions::archive`]. At a URL (`s3://`, `gs://`, `az://`) it is written straight into the object store, and
    /// nothing of it to a local disk. In memory are the parts of objects that are under way: as many as there are
    /// [`SnapshotOptions::connections`], and as many bytes as that many times 8 MiB, or two parts if these are larger;
    /// and for each fragment that is being written, the parts that are not full, one more than there are threads. A
    /// part has 8 MiB, or a ten-thousandth of the fragment if that is more. All writers of such a snapshot are in one
    /// process.
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
        match Location::new(location.as_ref())? {
            Location::Path(path) => self.create_local(path, interrupt),
            Location::Url(url) => self.create_remote(url, interrupt),
        }
    }

    fn create_local(&self, location: LocalPath, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<StagedSnapshot> {
        StagedDirectory::check(&location)?;
        let prepared = self.prepare(&location, true, |_| entries::check_new(location.path()), interrupt)?;
        let archive = self.is_archive_at(&location);
        let failed = |error: Error| error.context(format!("cannot create the snapshot {location}"));
        let staged = StagedDirectory::create(location.clone()).map_err(failed)?;
        let draft = Draft::Staged(staged.directory().clone());
        let (writer, snapshot_id) = prepared.staged_writer(draft).map_err(failed)?;
        let (durable, owner, location) = (self.durable, OwnerProcess::current(), Location::Path(location));
        Ok(StagedSnapshot { writer, location, snapshot_id, durable, archive, owner, state: State::Staged(staged) })
    }

    #[cfg(feature = "object-store")]
    fn create_remote(&self, url: StoreUrl, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<StagedSnapshot> {
        if self.archive == Some(true) {
            let text = format!(
                "{url} cannot become an archive: in an object store each fragment is an object; write the archive to a \
                 local path, and copy the file"
            );
            return Err(Error::invalid_argument(text));
        }
        let failed = |error: Error| error.context(format!("cannot create the snapshot {url}"));
        let bucket = Bucket::new(url.clone(), self.remote.clone()).map_err(failed)?;
        let check_free = |interrupt: &mut dyn FnMut() -> Result<()>| {
            SnapshotUpload::check_free(&bucket, self.take_over, &mut Interrupt::new(interrupt)).map_err(failed)
        };
        let prepared = self.prepare(&url, true, check_free, interrupt)?;
        let upload = SnapshotUpload::create(bucket, self.take_over, &mut Interrupt::new(interrupt)).map_err(failed)?;
        let (writer, snapshot_id) = prepared.staged_writer(Draft::Upload(upload.clone())).map_err(failed)?;
        let (durable, owner, location) = (self.durable, OwnerProcess::current(), Location::Url(url));
        let state = State::Uploading(upload);
        Ok(StagedSnapshot { writer, location, snapshot_id, durable, archive: false, owner, state })
    }

    #[cfg(not(feature = "object-store"))]
    #[allow(clippy::unused_self, clippy::needless_pass_by_value, reason = "as with the feature")]
    fn create_remote(&self, url: StoreUrl, _interrupt: &mut dyn FnMut() -> Result<()>) -> Result<StagedSnapshot> {
        Err(crate::store::no_object_storage(&url))
    }
}

impl Prepared {
    /// The writer of a staged snapshot, and the snapshot's id.
    fn staged_writer(&self, draft: Draft) -> Result<(SnapshotWriter, [u8; 16])> {
        let snapshot_id = self.payload.as_ref().map_or_else(random_id, |(payload, _)| Ok(payload.snapshot_id()))?;
        Ok((self.writer(draft)?, snapshot_id))
    }
}

impl StagedSnapshot {
    /// The writer at the root of the snapshot. It can be cloned and sent to other processes.
    #[must_use]
    pub fn writer(&self) -> &SnapshotWriter {
        &self.writer
    }

    /// Where the snapshot will be: an absolute path or a URL. Unless it is a URL, the location of [`StagedSnapshot::writer`] is the hidden
    /// directory.
    #[must_use]
    pub fn location(&self) -> &Path {
        self.location.as_path()
    }

    /// Completes the snapshot: lists all its fragments in the manifest, syncs them unless
    /// [`SnapshotOptions::durable`] is off, and renames the directory into place. Returns the snapshot's id and seal
    /// digest.
    ///
    /// An archive is written into the hidden directory first, and its file is renamed. On file systems with reflinks
    /// (btrfs, XFS) the contents are not copied; on ext4 and XFS those of the largest fragment are not. Everything else
    /// is copied once more, and takes its space twice until the commit ends.
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
        let context = |error: Error| error.context(format!("cannot commit the snapshot {}", self.location));
        self.owner.check_snapshot().map_err(context)?;
        match &self.state {
            State::Staged(staged) => self.commit_directory(staged, interrupt).map_err(context),
            #[cfg(feature = "object-store")]
            State::Uploading(upload) => self.commit_upload(upload, interrupt).map_err(context),
            State::Committed => Err(context(Error::new(Kind::State, "it was committed"))),
            State::Discarded => Err(context(Error::new(Kind::State, "it was discarded"))),
        }
        .and_then(|id| {
            // The snapshot is in place now.
            let State::Staged(placed) = std::mem::replace(&mut self.state, State::Committed) else { return Ok(id) };
            let finished = match (self.archive, self.durable) {
                (true, durable) => placed.finish_archive(durable),
                (false, true) => placed.sync_entry(),
                (false, false) => Ok(()),
            };
            finished.map(|()| id).map_err(|errno| not_durable(&self.location, errno))
        })
    }

    fn commit_directory(&self, staged: &StagedDirectory, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<SealId> {
        staged.stop_writers()?;
        self.complete(staged, interrupt).inspect_err(|_| {
            if self.owner.is_current() {
                staged.reopen();
            }
        })
    }

    #[cfg(feature = "object-store")]
    fn commit_upload(&self, upload: &SnapshotUpload, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<SealId> {
        upload.stop_writers()?;
        let (threads, data_key) = (self.writer.threads(), self.writer.data_key());
        let mut complete = || {
            let contents = Contents::of(upload.survey()?, None, data_key, self.writer.ledger(), threads, interrupt)?;
            let manifest = contents.into_manifest(self.snapshot_id, data_key.is_some());
            let (stored, seal_digest) = manifest.encode(data_key)?;
            upload.publish(stored, &mut Interrupt::new(interrupt))?;
            Ok(SealId { snapshot_id: self.snapshot_id, seal_digest })
        };
        complete().inspect_err(|_: &Error| {
            if self.owner.is_current() {
                upload.reopen();
            }
        })
    }

    fn complete(&self, staged: &StagedDirectory, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<SealId> {
        let directory = staged.directory();
        let threads = self.writer.threads();
        let data_key = self.writer.data_key();
        let (survey, store) = (directory.survey(interrupt)?, Store::Directory(directory.clone()));
        let contents = Contents::of(survey, Some(&store), data_key, self.writer.ledger(), threads, interrupt)?;
        if self.durable && !self.archive {
            contents.sync(directory, threads, interrupt)?;
        }
        let snapshot_id = self.snapshot_id;
        let manifest = contents.into_manifest(snapshot_id, data_key.is_some());
        let (stored, seal_digest) = manifest.encode(data_key)?;
        if self.archive {
            assemble::publish(staged, &manifest, &stored, self.durable, &mut Interrupt::new(interrupt))?;
        } else {
            staged.publish(&stored, self.durable, interrupt)?;
        }
        Ok(SealId { snapshot_id, seal_digest })
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
        if matches!(self.state, State::Committed) {
            return Ok(());
        }
        match std::mem::replace(&mut self.state, State::Discarded) {
            State::Staged(staged) => staged.discard(),
            #[cfg(feature = "object-store")]
            State::Uploading(upload) => upload.discard().map_err(|error| {
                error.context(format!("cannot discard the snapshot {} (vmsnap clean removes it)", self.location))
            }),
            State::Committed | State::Discarded => Ok(()),
        }
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
            #[cfg(feature = "object-store")]
            State::Uploading(_) => "uploading",
            State::Committed => "committed",
            State::Discarded => "discarded",
        };
        f.debug_struct("StagedSnapshot")
            .field("location", &self.location())
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
