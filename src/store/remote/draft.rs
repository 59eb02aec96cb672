//! A snapshot that is written straight into a bucket. Nothing of it is on a local disk.
//!
//! The claim comes first, and the manifest last: without a manifest, no reader takes the objects for a snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::Bytes;
use object_store::Attributes;
use rustix::io::Errno;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

use super::Bucket;
use super::claim::{CLAIM, Claim};
use super::flights::Flights;
use super::objects::{Created, Listed, Wanted};
use super::patience::patience;
use super::upload::{UploadedObject, abort_all};
use crate::error::{Error, Kind, Result};
use crate::location::StoreUrl;
use crate::name::{KEY_METADATA, MANIFEST, SnapshotPath, shown};
use crate::process::OwnerProcess;
use crate::store::bytes::NewObject;
use crate::store::{StoredFragment, Survey};
use crate::threads::{Interrupt, lock};

/// A snapshot that is being written into a bucket, as a handle for its writers.
#[derive(Clone)]
pub(crate) struct SnapshotUpload(Arc<Inner>);

struct Inner {
    bucket: Bucket,
    claim: Claim,
    flights: Arc<Flights>,
    owner: OwnerProcess,
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    /// Whether a commit is under way, or the snapshot is committed or discarded.
    is_closed: bool,
    is_discarded: bool,
    namespaces: BTreeSet<String>,
    objects: BTreeMap<String, UploadedObject>,
    key_metadata: Option<Bytes>,
    /// Whether the key metadata may be stored.
    is_key_sent: bool,
    /// The manifest that a failed commit may have stored.
    attempt: Option<Bytes>,
}

impl SnapshotUpload {
    /// Refuses a prefix at which no new snapshot can be.
    ///
    /// # Errors
    ///
    /// `Io` with `EEXIST` if there is a snapshot or anything else, `State` if another writer has it.
    pub(crate) fn check_free(bucket: &Bucket, take_over: bool, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let listed = bucket.list(interrupt)?;
        let is_claimed = listed.iter().any(|object| object.name == CLAIM);
        if is_claimed && take_over {
            return remains(&listed).map(drop);
        }
        if is_claimed && !listed.iter().any(|object| object.name == MANIFEST) {
            Claim::check_absent(bucket, interrupt)?;
        }
        check_empty(&listed)
    }

    /// Claims the prefix of `bucket` for a new snapshot.
    ///
    /// # Errors
    ///
    /// `State` if another writer has it, `Io` with `EEXIST` if there is a snapshot or anything else.
    pub(crate) fn create(bucket: Bucket, take_over: bool, interrupt: &mut Interrupt<'_>) -> Result<Self> {
        let (claim, taken) = Claim::take(&bucket, None, take_over, interrupt)?;
        let flights = Flights::new(bucket.options().connections);
        let contents = Mutex::default();
        let upload = Self(Arc::new(Inner { bucket, claim, flights, owner: OwnerProcess::current(), contents }));
        // Only now: before the claim, another writer could complete a snapshot at any moment.
        upload.prepare(taken, interrupt).inspect_err(|_| {
            // Nothing else was written. A second error would hide the cause; `clean` removes the claim.
            let _ = Claim::release(&upload.0.bucket, &mut Interrupt::new(&mut || Ok(())));
        })?;
        Ok(upload)
    }

    fn prepare(&self, taken: super::Taken, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let listed = self.0.bucket.list(interrupt)?;
        if taken == super::Taken::Replaced {
            let remains = remains(&listed)?;
            return self.0.bucket.delete(&remains, interrupt);
        }
        check_empty(&listed)
    }

    pub(crate) fn url(&self) -> &StoreUrl {
        self.0.bucket.url()
    }

    /// Keeps the key metadata for the commit, which stores it.
    pub(crate) fn write_key_metadata(&self, wrapped: &[u8]) {
        lock(&self.0.contents).key_metadata = Some(Bytes::copy_from_slice(wrapped));
    }

    /// Creates a fragment with at most `most_bytes`, if that is known.
    pub(crate) fn create_object(&self, path: &SnapshotPath, most_bytes: Option<u64>) -> Result<Arc<dyn NewObject>> {
        let failed = |error: Error| error.context(format!("{path} of {}", self.url()));
        self.0.owner.check_snapshot().map_err(failed)?;
        let Inner { bucket, flights, contents, .. } = &*self.0;
        let mut contents = lock(contents);
        contents.check_new(path).map_err(failed)?;
        let objects = bucket.objects().map_err(failed)?;
        let object = UploadedObject::new(objects, path.as_str(), Attributes::new(), most_bytes, flights);
        let object = object.map_err(failed)?;
        contents.objects.insert(path.as_str().to_owned(), object.share());
        Ok(Arc::new(object))
    }

    /// Adds a namespace. Only the manifest mentions it.
    pub(crate) fn add_namespace(&self, namespace: &SnapshotPath) -> Result<()> {
        let failed = |error: Error| error.context(format!("namespace {:?} of {}", namespace.as_str(), self.url()));
        self.0.owner.check_snapshot().map_err(failed)?;
        let mut contents = lock(&self.0.contents);
        contents.check_new(namespace).map_err(failed)?;
        contents.namespaces.insert(namespace.as_str().to_owned());
        Ok(())
    }

    pub(crate) fn check_namespace(&self, namespace: &SnapshotPath) -> Result<()> {
        if lock(&self.0.contents).has_namespace(namespace.as_str()) {
            return Ok(());
        }
        let text = format!("the snapshot {} has no namespace {:?}", self.url(), namespace.as_str());
        Err(Error::io(text, Errno::NOENT))
    }

    /// Refuses new fragments from now on. Fails if one is still being written.
    pub(crate) fn stop_writers(&self) -> Result<()> {
        let mut contents = lock(&self.0.contents);
        contents.check_open()?;
        if let Some((path, _)) = contents.objects.iter().find(|(_, object)| object.is_finished().is_none()) {
            let text = format!(
                "the snapshot {} is still being written: finish all its fragments first ({} is not finished)",
                self.url(),
                shown(path)
            );
            return Err(Error::new(Kind::State, text));
        }
        contents.is_closed = true;
        Ok(())
    }

    /// Undoes a failed commit: the snapshot is open to its writers.
    pub(crate) fn reopen(&self) {
        lock(&self.0.contents).is_closed = false;
    }

    /// Lists everything that was written.
    pub(crate) fn survey(&self) -> Result<Survey> {
        let contents = lock(&self.0.contents);
        let mut survey = Survey::default();
        // The order of bytes: a namespace comes after the one that contains it.
        for namespace in &contents.namespaces {
            survey.namespaces.push(namespace.clone().try_into()?);
        }
        for (path, object) in contents.objects.iter().filter(|(_, object)| !object.is_discarded()) {
            survey.fragments.push(StoredFragment {
                path: path.clone().try_into()?,
                stored_size: object.stored_size()?,
                modified: SystemTime::now(),
                finished: object.is_finished() == Some(true),
            });
        }
        Ok(survey)
    }

    /// Stores the key metadata and the manifest, and removes the claim. The writers were stopped.
    ///
    /// # Errors
    ///
    /// `Io` with `EEXIST` if another snapshot is there by now, `State` if another process took the claim over. After an
    /// error the snapshot can be published again, or discarded.
    pub(crate) fn publish(&self, manifest: Vec<u8>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let Inner { bucket, claim, contents, .. } = &*self.0;
        claim.check(bucket, interrupt)?;
        self.withdraw(interrupt)?;
        let key_metadata = lock(contents).key_metadata.clone();
        if let Some(key_metadata) = key_metadata {
            lock(contents).is_key_sent = true;
            bucket
                .put(KEY_METADATA, key_metadata, Attributes::new(), None, interrupt)
                .map_err(|error| error.context(KEY_METADATA))?;
        }
        interrupt.check_now()?;
        let manifest = Bytes::from(manifest);
        lock(contents).attempt = Some(manifest.clone());
        // The last step is not interrupted: a request that was cancelled may still be carried out.
        let go_on = &mut || Ok(());
        let last = &mut Interrupt::new(go_on);
        match bucket.create(MANIFEST, manifest, last).map_err(|error| error.context(MANIFEST))? {
            Created::New | Created::Same => {}
            Created::Other(_) => return Err(exists()),
        }
        // The snapshot is complete. Readers ignore the claim, and `clean` removes it.
        let _ = Claim::release(bucket, last);
        Ok(())
    }

    /// Removes the manifest of a commit that seemed to fail, if it is there.
    fn withdraw(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let Inner { bucket, contents, .. } = &*self.0;
        let Some(attempt) = lock(contents).attempt.clone() else { return Ok(()) };
        let wanted = [(MANIFEST, Wanted::Whole { max_bytes: attempt.len() as u64 })];
        match bucket.get_many(&wanted, interrupt)?.pop() {
            Some(Ok(Some(found))) if found.bytes == attempt => bucket.delete(&[MANIFEST.to_owned()], interrupt)?,
            Some(Err(error)) if !error.is_corrupt() => return Err(error),
            // It is absent, or that of another writer.
            _ => {}
        }
        lock(contents).attempt = None;
        Ok(())
    }

    /// Removes everything that was written, and then the claim. It may be called again. If another process took the
    /// claim over, the objects are its own to remove.
    pub(crate) fn discard(&self) -> Result<()> {
        let Inner { bucket, claim, contents, owner, .. } = &*self.0;
        owner.check_snapshot()?;
        let objects: Vec<_> = {
            let mut contents = lock(contents);
            if contents.is_discarded {
                return Ok(());
            }
            contents.is_closed = true;
            contents.objects.values().map(UploadedObject::share).collect()
        };
        let patience = &mut patience();
        let interrupt = &mut Interrupt::new(patience);
        let remains: Vec<_> = objects.iter().map(UploadedObject::stop).collect();
        let mut names: Vec<_> = remains.iter().map(|object| object.name().to_owned()).collect();
        let aborted = abort_all(remains);
        if claim.is_held(bucket, interrupt)? {
            self.withdraw(interrupt)?;
            names.extend(lock(contents).is_key_sent.then(|| KEY_METADATA.to_owned()));
            bucket.delete(&names, interrupt)?;
            Claim::release(bucket, interrupt)?;
        }
        lock(contents).is_discarded = true;
        aborted
    }
}

impl Contents {
    fn check_open(&self) -> Result<()> {
        if self.is_closed {
            return Err(Error::new(Kind::State, "the snapshot is being committed, or was committed or discarded"));
        }
        Ok(())
    }

    fn has_namespace(&self, path: &str) -> bool {
        path.is_empty() || self.namespaces.contains(path)
    }

    fn has_object(&self, path: &str) -> bool {
        self.objects.get(path).is_some_and(|object| !object.is_discarded())
    }

    /// Checks that a fragment or namespace can be created, as a file system does.
    fn check_new(&self, path: &SnapshotPath) -> Result<()> {
        self.check_open()?;
        let (namespace, _) = path.split();
        if !self.has_namespace(namespace) {
            let text = format!("cannot be created: the namespace {namespace:?} does not exist");
            return Err(Error::io(text, Errno::NOENT));
        }
        if self.has_object(path.as_str()) || self.has_namespace(path.as_str()) {
            return Err(Error::io("exists already", Errno::EXIST));
        }
        Ok(())
    }
}

/// The error for a prefix at which another snapshot is.
pub(crate) fn exists() -> Error {
    Error::io("another snapshot is there already: choose another prefix, or remove that snapshot", Errno::EXIST)
}

/// Refuses a prefix with anything but a claim.
fn check_empty(listed: &[Listed]) -> Result<()> {
    if listed.iter().any(|object| object.name == MANIFEST) {
        return Err(exists());
    }
    match listed.iter().find(|object| object.name != CLAIM) {
        Some(object) => Err(occupied(&object.name)),
        None => Ok(()),
    }
}

/// The error for a prefix with an object that does not belong there.
pub(crate) fn occupied(name: &str) -> Error {
    let text = format!("the prefix is not empty: it contains {}; choose another one, or empty this one", shown(name));
    Error::io(text, Errno::EXIST)
}

/// The objects that another writer left, whose claim was taken over: everything but the claim.
///
/// # Errors
///
/// `Io` with `EEXIST` if there is a snapshot at the prefix or below it.
pub(crate) fn remains(listed: &[Listed]) -> Result<Vec<String>> {
    let is_snapshot = |object: &&Listed| {
        let (above, name) = object.name.rsplit_once('/').unwrap_or(("", &object.name));
        name == MANIFEST || (name == CLAIM && !above.is_empty())
    };
    match listed.iter().find(is_snapshot) {
        Some(object) if object.name == MANIFEST => Err(exists()),
        Some(object) => Err(occupied(&object.name)),
        None => Ok(listed.iter().map(|object| object.name.clone()).filter(|name| name != CLAIM).collect()),
    }
}

const ELSEWHERE: &str = "a snapshot that is written into an object store has its writers in one process: a fragment that \
                         another process writes would be missing; write it from this process";

/// A writer in another process could not tell this one about its fragments.
impl Serialize for SnapshotUpload {
    fn serialize<S: Serializer>(&self, _serializer: S) -> std::result::Result<S::Ok, S::Error> {
        Err(ser::Error::custom(ELSEWHERE))
    }
}

impl<'de> Deserialize<'de> for SnapshotUpload {
    fn deserialize<D: Deserializer<'de>>(_deserializer: D) -> std::result::Result<Self, D::Error> {
        Err(de::Error::custom(ELSEWHERE))
    }
}

impl fmt::Debug for SnapshotUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SnapshotUpload").field(self.url()).finish()
    }
}
