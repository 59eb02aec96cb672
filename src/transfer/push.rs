//! Writes a sealed snapshot into an object store.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use object_store::Attributes;

use super::progress::{Counted, Progress};
use super::sealed::SealedSnapshot;
use crate::error::{Error, Result};
use crate::fragment::checked_copy::{Input, Output, copy_checked};
use crate::location::{Location, StoreUrl};
use crate::manifest::{Entry, MAX_MANIFEST_BYTES, SealId};
use crate::name::{KEY_METADATA, MANIFEST};
use crate::snapshot::SnapshotOptions;
use crate::store::Store;
use crate::store::bytes::NewObject;
use crate::store::remote::{
    Bucket, CLAIM, Claim, Created, Flights, Listed, Objects, Taken, UploadedObject, Wanted, abort_all, exists,
    has_proof, occupied, patience, proof_attributes, remains, runtime,
};
use crate::threads::{Interrupt, for_each, lock};

/// Each thread sends a fragment up to this size alone; all threads send a larger one together.
const MAX_SMALL_FRAGMENT_BYTES: u64 = 4 << 20;

/// The result of [`SnapshotOptions::push`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pushed {
    /// The id and the seal digest of the snapshot.
    pub id: SealId,
    /// Whether this very snapshot was complete at the URL before, so that nothing was sent.
    pub already_there: bool,
    /// The bytes of the fragments that were sent.
    pub sent_bytes: u64,
    /// The bytes of the fragments that an earlier push had sent, which was resumed.
    pub resumed_bytes: u64,
}

impl SnapshotOptions {
    /// Copies the sealed snapshot at `source`, a directory or an archive, into an object store. The copy is complete or
    /// absent: readers take it for a snapshot when its last object is there, and nothing is overwritten. Every byte is
    /// checked before it is sent, for which an encrypted snapshot needs its key.
    ///
    /// If the push is stopped or fails, the objects that were sent stay, and the next push of the same snapshot sends the rest;
    /// [`SnapshotOptions::clean`] removes it instead. If the source is damaged, everything is removed. Memory holds as
    /// many parts as [`SnapshotOptions::create`] does.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new();
    /// let id = options.create(&path)?.commit()?;
    /// let pushed = options.push(&path, "memory://bucket/vm1")?;
    /// assert_eq!((pushed.id, pushed.already_there), (id, false));
    /// assert!(options.push(&path, "memory://bucket/vm1")?.already_there);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_not_sealed`] if the snapshot is not sealed, [`Error::is_corrupt`] or [`Error::is_authentication`] if
    /// it differs from its manifest, [`Error::is_io`] if another snapshot or anything else is at `url`, or the store
    /// cannot be reached ([`Error::is_transient`]), [`Error::is_state`] if another writer is at work there,
    /// [`Error::is_invalid_argument`] if `url` is a local path or the store cannot have a name of a fragment, and the
    /// errors of [`SnapshotOptions::open`].
    pub fn push(&self, source: impl AsRef<Path>, url: impl AsRef<Path>) -> Result<Pushed> {
        self.push_interruptible(source, url, &Progress::default(), &mut || Ok(()))
    }

    /// Pushes a snapshot as [`SnapshotOptions::push`] does, counts the bytes that were read, and calls `interrupt` while that takes
    /// time.
    pub(crate) fn push_interruptible(
        &self,
        source: impl AsRef<Path>,
        url: impl AsRef<Path>,
        progress: &Progress,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Pushed> {
        let source = Location::new(source.as_ref())?.local("pushing")?;
        let url = remote(Location::new(url.as_ref())?)?;
        let failed = |error: Error| error.context(format!("cannot push the snapshot {source} to {url}"));
        let bucket = Bucket::new(url.clone(), self.remote.clone()).map_err(failed)?;
        let sealed = SealedSnapshot::open(self, Store::at_path(source.clone()), interrupt).map_err(failed)?;
        sealed.check_whole(interrupt).map_err(failed)?;
        let push = Push { sealed: &sealed, bucket: &bucket, take_over: self.take_over, progress };
        push.run(&mut Interrupt::new(interrupt)).map_err(failed)
    }
}

fn remote(location: Location) -> Result<StoreUrl> {
    match location {
        Location::Url(url) => Ok(url),
        Location::Path(path) => {
            let text = format!(
                "{path} is a local path: a push goes to an object store (s3://, gs://, az://); write a local copy with pack \
                 and unpack"
            );
            Err(Error::invalid_argument(text))
        }
    }
}

struct Push<'a> {
    sealed: &'a SealedSnapshot,
    bucket: &'a Bucket,
    take_over: bool,
    progress: &'a Progress,
}

impl Push<'_> {
    fn run(&self, interrupt: &mut Interrupt<'_>) -> Result<Pushed> {
        let digest = *blake3::hash(&self.sealed.stored_manifest).as_bytes();
        let already_there = Pushed { id: self.sealed.id, already_there: true, sent_bytes: 0, resumed_bytes: 0 };
        if self.is_there(interrupt)? {
            Claim::release_of_push(self.bucket, digest, interrupt)?;
            return Ok(already_there);
        }
        // Before anything is written.
        let objects = self.bucket.objects()?;
        self.sealed.manifest.fragments.keys().try_for_each(|path| objects.check_name(path))?;

        let (claim, taken) = Claim::take(self.bucket, Some(digest), self.take_over, interrupt)?;
        let listed = self.prepare(taken, interrupt).inspect_err(|error| {
            if taken == Taken::New && !error.is_interrupted() {
                // Nothing else was written. A second error would hide the cause; `clean` removes the claim.
                let _ = Claim::release(self.bucket, &mut Interrupt::new(&mut || Ok(())));
            }
        })?;
        let Some(listed) = listed else {
            Claim::release(self.bucket, interrupt)?;
            return Ok(already_there);
        };
        let sent = self.send(&objects, &listed, interrupt).and_then(|sent| {
            self.publish(&claim, interrupt)?;
            Ok(sent)
        });
        sent.map_err(|error| self.give_up(&claim, error))
    }

    /// Whether this snapshot is complete in the store.
    ///
    /// # Errors
    ///
    /// `Io` with `EEXIST` if another one is.
    fn is_there(&self, interrupt: &mut Interrupt<'_>) -> Result<bool> {
        let wanted = [(MANIFEST, Wanted::Whole { max_bytes: MAX_MANIFEST_BYTES })];
        match self.bucket.get_many(&wanted, interrupt)?.pop() {
            Some(Ok(Some(found))) if found.bytes == self.sealed.stored_manifest => Ok(true),
            Some(Ok(Some(_))) => Err(exists()),
            Some(Err(error)) if error.is_corrupt() => Err(exists()),
            Some(Err(error)) => Err(error),
            Some(Ok(None)) | None => Ok(false),
        }
    }

    /// Looks at the objects at the prefix, now that it is claimed. Returns `None` if the snapshot is complete.
    fn prepare(&self, taken: Taken, interrupt: &mut Interrupt<'_>) -> Result<Option<Vec<Listed>>> {
        let listed = self.bucket.list(interrupt)?;
        if listed.iter().any(|object| object.name == MANIFEST) && self.is_there(interrupt)? {
            return Ok(None);
        }
        let is_strange =
            |name: &str| !matches!(name, CLAIM | KEY_METADATA) && !self.sealed.manifest.fragments.contains_key(name);
        let Some(strange) = listed.iter().find(|object| is_strange(&object.name)) else { return Ok(Some(listed)) };
        if taken == Taken::New || !self.take_over {
            return Err(occupied(&strange.name));
        }
        let mut left = remains(&listed)?;
        left.retain(|name| is_strange(name));
        self.bucket.delete(&left, interrupt)?;
        Ok(Some(listed))
    }

    fn send(&self, objects: &Objects, listed: &[Listed], interrupt: &mut Interrupt<'_>) -> Result<Pushed> {
        let there = self.find_sent(objects, listed, interrupt)?;
        let mut fragments: Vec<_> =
            self.sealed.manifest.fragments.iter().filter(|(path, _)| !there.contains(path.as_str())).collect();
        fragments.sort_by_key(|(_, entry)| Reverse(entry.stored_size));
        let bytes = |entries: &mut dyn Iterator<Item = &Entry>| entries.map(|entry| entry.stored_size).sum::<u64>();
        let all_bytes = bytes(&mut self.sealed.manifest.fragments.values());
        let sent_bytes = bytes(&mut fragments.iter().map(|(_, entry)| *entry));

        self.progress.begin(all_bytes);
        self.progress.add(all_bytes - sent_bytes);
        let sending = Sending {
            progress: self.progress,
            sealed: self.sealed,
            objects,
            flights: Flights::new(self.bucket.options().connections),
            begun: Mutex::default(),
        };
        let sent = sending.send_all(&fragments, interrupt);
        if sent.is_err() {
            sending.stop();
        }
        sent?;
        let resumed_bytes = all_bytes - sent_bytes;
        Ok(Pushed { id: self.sealed.id, already_there: false, sent_bytes, resumed_bytes })
    }

    /// The fragments that an earlier push has sent: their size and metadata are right.
    fn find_sent<'l>(
        &self,
        objects: &Objects,
        listed: &'l [Listed],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<BTreeSet<&'l str>> {
        let mut there = BTreeSet::new();
        let fragments = &self.sealed.manifest.fragments;
        let candidates: Vec<_> = listed
            .iter()
            .filter_map(|object| Some((&*object.name, fragments.get(&object.name)?, object.size)))
            .filter(|(_, entry, size)| entry.stored_size == *size)
            .collect();
        for some in candidates.chunks(self.bucket.options().connections) {
            let tasks = some.iter().map(|(name, ..)| {
                let (objects, name) = (objects.clone(), (*name).to_owned());
                runtime::spawn(async move { objects.head(&name).await })
            });
            for (task, (name, entry, size)) in tasks.collect::<Result<Vec<_>>>()?.into_iter().zip(some) {
                let found = task.wait(interrupt)?;
                if found.is_some_and(|found| found.size == *size && has_proof(&found, &entry.proof)) {
                    there.insert(*name);
                }
            }
        }
        Ok(there)
    }

    /// Makes a snapshot of the objects.
    fn publish(&self, claim: &Claim, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let bucket = self.bucket;
        // Another push of the same snapshot may have been faster.
        if !claim.is_held(bucket, interrupt)? && self.is_there(interrupt)? {
            return Ok(());
        }
        claim.check(bucket, interrupt)?;
        if let Some(key_metadata) = &self.sealed.key_metadata {
            let bytes = Bytes::copy_from_slice(key_metadata);
            bucket
                .put(KEY_METADATA, bytes, Attributes::new(), None, interrupt)
                .map_err(|error| error.context(KEY_METADATA))?;
        }
        let manifest = Bytes::copy_from_slice(&self.sealed.stored_manifest);
        match bucket.create(MANIFEST, manifest, interrupt).map_err(|error| error.context(MANIFEST))? {
            Created::New | Created::Same => {}
            Created::Other(_) => return Err(exists()),
        }
        // The snapshot is complete. Readers ignore the claim, and the next push or `clean` removes it.
        let _ = Claim::release(bucket, interrupt);
        Ok(())
    }

    /// Removes everything if a repetition would fail, too. The error says if objects stay.
    fn give_up(&self, claim: &Claim, error: Error) -> Error {
        if error.is_interrupted() || error.is_state() || error.raw_os_error() == Some(libc::EEXIST) {
            return error;
        }
        if !error.is_corrupt() && !error.is_authentication() {
            return error.context("the objects that were sent stay, and the next push of this snapshot sends the rest");
        }
        let patience = &mut patience();
        let interrupt = &mut Interrupt::new(patience);
        let mut names: Vec<_> = self.sealed.manifest.fragments.keys().cloned().collect();
        names.push(KEY_METADATA.to_owned());
        let removed = claim.is_held(self.bucket, interrupt).and_then(|is_held| {
            if !is_held {
                return Ok(());
            }
            self.bucket.delete(&names, interrupt)?;
            Claim::release(self.bucket, interrupt)
        });
        match removed {
            Ok(()) => error,
            Err(_) => error.context("the objects that were sent could not be removed; vmsnap clean removes them"),
        }
    }
}

/// The fragments on their way.
struct Sending<'a> {
    progress: &'a Progress,
    sealed: &'a SealedSnapshot,
    objects: &'a Objects,
    flights: Arc<Flights>,
    begun: Mutex<Vec<(String, UploadedObject)>>,
}

impl Sending<'_> {
    /// Sends fragments, the largest first.
    fn send_all(&self, fragments: &[(&String, &Entry)], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let large = fragments.partition_point(|(_, entry)| entry.stored_size > MAX_SMALL_FRAGMENT_BYTES);
        let (large, small) = fragments.split_at(large);
        for (path, _) in large {
            self.send_one(path, self.sealed.threads, interrupt)?;
        }
        let mut workers = vec![(); self.sealed.threads];
        for_each(&mut workers, small.iter(), interrupt, |(), (path, _), interrupt| self.send_one(path, 1, interrupt))?;
        // A fragment that was sent is not complete before its last answer has come.
        let begun = std::mem::take(&mut *lock(&self.begun));
        let done = begun.iter().try_for_each(|(path, object)| {
            object.finish(interrupt).map_err(|error| error.context(format!("the object {path:?}")))
        });
        *lock(&self.begun) = begun;
        done
    }

    /// Sends a fragment, and does not wait until it is stored.
    fn send_one(&self, path: &str, threads: usize, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.sealed.with_fragment(path, |path, entry, source| {
            let (attributes, size) = (proof_attributes(&entry.proof), Some(entry.stored_size));
            let object = UploadedObject::new(self.objects.clone(), path.as_str(), attributes, size, &self.flights)?;
            lock(&self.begun).push((path.as_str().to_owned(), object.share()));
            let counted = Counted::new(&object, self.progress);
            let (input, output) = (Input::At(source, 0), Output::At(&counted, 0));
            copy_checked(input, output, path, entry, self.sealed.data_key(), threads, interrupt)?;
            counted.complete(entry.stored_size);
            object.begin_finish(interrupt)
        })
    }

    /// Gives up the fragments that are not complete.
    fn stop(&self) {
        let objects = std::mem::take(&mut *lock(&self.begun));
        // A second error would hide the cause; the store removes old uploads by its lifecycle rule.
        let _ = abort_all(objects.iter().map(|(_, object)| object.stop()).collect());
    }
}

#[cfg(test)]
mod tests;
