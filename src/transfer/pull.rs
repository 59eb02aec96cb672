//! Writes a snapshot of an object store as a directory or an archive.

use std::path::Path;
use std::sync::Arc;

use super::progress::{Counted, Progress};
use super::sealed::SealedSnapshot;
use crate::error::{Error, Result};
use crate::fragment::checked_copy::{Input, Output, copy_checked};
use crate::location::{LocalPath, Location};
use crate::manifest::{Entry, SealId};
use crate::name::SnapshotPath;
use crate::snapshot::{SnapshotOptions, not_durable};
use crate::store::archive::assemble;
use crate::store::bytes::{NewObject, ReadAt};
use crate::store::directory::{StagedDirectory, entries};
use crate::store::{Draft, Store};
use crate::threads::{Interrupt, for_each};

/// Each thread writes a fragment up to this size alone; all threads write a larger one together. Larger ones keep all
/// connections busy by themselves.
const MAX_SMALL_FRAGMENT_BYTES: u64 = 4 << 20;

impl SnapshotOptions {
    /// Copies the snapshot at `url`, in an object store, into a new directory, or into an archive if the name of `target`
    /// ends in `.vmsnap.tar` (see [`SnapshotOptions::archive`]). The copy is complete or absent, and has the same seal
    /// digest. Every byte is checked, for which an encrypted snapshot needs its key. Returns the snapshot's id and seal
    /// digest.
    ///
    /// An archive is made of a hidden directory beside it, as by [`StagedSnapshot::commit`](crate::StagedSnapshot::commit).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// let options = vmsnap::SnapshotOptions::new();
    /// let mut staged = options.create("memory://bucket/vm2")?;
    /// staged.writer().write_fragment("clock", &12_u64)?;
    /// let id = staged.commit()?;
    /// let copy = folder.path().join("copy");
    /// assert_eq!(options.pull("memory://bucket/vm2", &copy)?, id);
    /// assert_eq!(options.open(&copy)?.read_fragment::<u64>("clock")?, 12);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if something exists at `target`, the disk is full, nothing is at `url` or the store cannot be
    /// reached ([`Error::is_transient`]), [`Error::is_corrupt`] or [`Error::is_authentication`] if something differs from
    /// the manifest, [`Error::is_invalid_argument`] if `url` is a local path, and the errors of
    /// [`SnapshotOptions::open`]. After an error nothing is left behind, with one exception: if only the last sync fails,
    /// the snapshot is complete and in place, and the error's text says so.
    pub fn pull(&self, url: impl AsRef<Path>, target: impl AsRef<Path>) -> Result<SealId> {
        self.pull_interruptible(url, target, &Progress::default(), &mut || Ok(()))
    }

    /// Pulls a snapshot as [`SnapshotOptions::pull`] does, counts the written bytes, and calls `interrupt` while that
    /// takes time.
    pub(crate) fn pull_interruptible(
        &self,
        url: impl AsRef<Path>,
        target: impl AsRef<Path>,
        progress: &Progress,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let location = Location::new(url.as_ref())?;
        if let Location::Path(path) = &location {
            let text = format!(
                "{path} is a local path: a pull comes from an object store (s3://, gs://, az://); copy a local snapshot \
                 with pack and unpack"
            );
            return Err(Error::invalid_argument(text));
        }
        let target = Location::new(target.as_ref())?.local("the target of a pull")?;
        let failed = |error: Error| error.context(format!("cannot pull the snapshot {}", location.as_path().display()));
        StagedDirectory::check(&target)?;
        entries::check_new(target.path()).map_err(failed)?;
        // Each byte is read once, so a cache of blocks would only cost.
        let store = Store::at(location.clone(), &self.remote).and_then(Store::uncached).map_err(failed)?;
        let sealed = SealedSnapshot::open(self, store, interrupt).map_err(failed)?;
        self.write_pulled(&sealed, &target, progress, interrupt).map_err(failed)?;
        Ok(sealed.id)
    }

    fn write_pulled(
        &self,
        sealed: &SealedSnapshot,
        target: &LocalPath,
        progress: &Progress,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let is_archive = self.is_archive_at(target);
        progress.begin(sealed.manifest.fragments.values().map(|entry| entry.stored_size).sum());
        let pull = Pull { sealed, connections: self.remote.connections, progress };
        let (placed, ()) = StagedDirectory::filled(target.clone(), |staged| {
            pull.write(&Draft::Staged(staged.directory().clone()), &mut Interrupt::new(interrupt))?;
            let (manifest, stored) = (&sealed.manifest, &sealed.stored_manifest);
            if is_archive {
                return assemble::publish(staged, manifest, stored, self.durable, &mut Interrupt::new(interrupt));
            }
            if self.durable {
                let fragments: Vec<_> = manifest.fragments.keys().map(String::as_str).collect();
                let namespaces = manifest.namespaces.iter().map(|path| &**path);
                let interrupt = &mut Interrupt::new(interrupt);
                staged.directory().sync(fragments.into_iter(), namespaces, sealed.threads, interrupt)?;
            }
            staged.publish(stored, self.durable, interrupt)
        })?;
        let finished = match (is_archive, self.durable) {
            (true, durable) => placed.finish_archive(durable),
            (false, true) => placed.sync_entry(),
            (false, false) => Ok(()),
        };
        finished.map_err(|errno| not_durable(target, errno))
    }
}

struct Pull<'a> {
    sealed: &'a SealedSnapshot,
    connections: usize,
    progress: &'a Progress,
}

impl Pull<'_> {
    /// Writes everything but the manifest.
    fn write(&self, draft: &Draft, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let SealedSnapshot { manifest, key_metadata, threads, .. } = self.sealed;
        if let Some(bytes) = key_metadata {
            draft.write_key_metadata(bytes)?;
        }
        // In the order of bytes, a namespace comes after the one that contains it.
        for namespace in &manifest.namespaces {
            draft.add_namespace(&String::from(&**namespace).try_into()?)?;
        }
        let is_small = |entry: &Entry| entry.stored_size <= MAX_SMALL_FRAGMENT_BYTES;
        let (small, large): (Vec<_>, Vec<_>) = manifest.fragments.iter().partition(|(_, entry)| is_small(entry));
        for (path, _) in large {
            self.copy(path, draft, *threads, interrupt)?;
        }
        let mut workers = vec![(); *threads];
        for some in small.chunks(self.connections) {
            // The first blocks of all of them come at once, however few threads there are.
            let _begun = some.iter().map(|(path, entry)| self.begin(path, entry)).collect::<Result<Vec<_>>>()?;
            for_each(&mut workers, some.iter(), interrupt, |(), (path, _), interrupt| {
                self.copy(path, draft, 1, interrupt)
            })?;
        }
        Ok(())
    }

    /// Begins to read a small fragment. The blocks live as long as the result.
    fn begin(&self, path: &str, entry: &Entry) -> Result<Arc<dyn ReadAt>> {
        let object = self.sealed.store.object(&path.to_owned().try_into()?, Some(&self.sealed.manifest))?;
        object.prefetch(0..entry.stored_size);
        Ok(object)
    }

    fn copy(&self, path: &str, draft: &Draft, threads: usize, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.sealed.with_fragment(path, |path: &SnapshotPath, entry, source| {
            let object = draft.create(path, Some(entry.stored_size))?;
            let output: &dyn NewObject = &*object;
            let counted = Counted::new(output, self.progress);
            let (input, output) = (Input::At(source, 0), Output::At(&counted, 0));
            copy_checked(input, output, path, entry, self.sealed.data_key(), threads, interrupt)?;
            counted.complete(entry.stored_size);
            // Batches of zeros were not written.
            object.set_size(entry.stored_size)?;
            object.finish(interrupt)
        })
    }
}

#[cfg(test)]
mod tests;
