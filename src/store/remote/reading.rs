//! A snapshot in an object store, opened to be read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use bytes::Bytes;
use object_store::Attributes;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::blocks::BlockReader;
use super::cache::BlockCache;
use super::{Bucket, Got, Listed, Version, Wanted};
use crate::error::{Error, Result};
use crate::location::StoreUrl;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::name::{self, KEY_METADATA, MANIFEST, MAX_KEY_METADATA_BYTES, SnapshotPath};
use crate::process::OwnerProcess;
use crate::store::{Head, RemoteOptions, StoredFragment, Strange, StrangeKind, Survey};
use crate::threads::{Interrupt, lock};

/// A snapshot whose fragments are objects below one prefix. It is always sealed: a prefix without a manifest is not a snapshot.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Remote {
    bucket: Bucket,
    #[serde(skip)]
    opened: Arc<Opened>,
}

/// The state that all clones of a handle share.
struct Opened {
    state: Mutex<State>,
    owner: OwnerProcess,
}

impl Default for Opened {
    fn default() -> Self {
        Self { state: Mutex::default(), owner: OwnerProcess::current() }
    }
}

#[derive(Default)]
struct State {
    head: Option<SeenHead>,
    /// The open fragments, by path and size. One that is opened again shares its blocks.
    readers: BTreeMap<(String, u64), Weak<BlockReader>>,
}

/// The files at the root, as they were last read.
#[derive(Default)]
struct SeenHead {
    key_metadata: Option<Version>,
    /// The digest of the stored manifest.
    manifest: Option<[u8; 32]>,
}

impl Remote {
    /// The snapshot at `url`. Nothing is sent.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for options that cannot work.
    pub(crate) fn new(url: StoreUrl, options: &RemoteOptions) -> Result<Self> {
        options.cache.as_ref().map(BlockCache::open).transpose()?;
        Ok(Self { bucket: Bucket::new(url, options.clone())?, opened: Arc::default() })
    }

    pub(crate) fn url(&self) -> &StoreUrl {
        self.bucket.url()
    }

    /// The same snapshot, read without the cache, by a reader that checks the store or reads all of it once.
    pub(crate) fn uncached(&self) -> Result<Self> {
        Self::new(self.url().clone(), &RemoteOptions { cache: None, ..self.bucket.options().clone() })
    }

    /// `None` in a forked child, where another thread may have held the lock.
    fn state(&self) -> Option<MutexGuard<'_, State>> {
        self.opened.owner.is_current().then(|| lock(&self.opened.state))
    }

    fn place_of(&self, name: &str) -> String {
        format!("{name} of {}", self.url())
    }

    /// Reads `enc_metadata` and the manifest, both at once.
    ///
    /// # Errors
    ///
    /// `Io` with `ENOENT` if neither exists.
    pub(crate) fn head(&self, interrupt: &mut Interrupt<'_>) -> Result<Head> {
        let wanted = [
            (KEY_METADATA, Wanted::Whole { max_bytes: MAX_KEY_METADATA_BYTES }),
            (MANIFEST, Wanted::Whole { max_bytes: MAX_MANIFEST_BYTES }),
        ];
        let mut answers = self.bucket.get_many(&wanted, interrupt)?.into_iter();
        let mut next = |name| {
            let answer = answers.next().unwrap_or_else(|| Err(Error::corrupt("was not read")));
            answer.map_err(|error| error.context(self.place_of(name)))
        };
        let (key_metadata, manifest) = (next(KEY_METADATA), next(MANIFEST));
        if let (Ok(None), Ok(None)) = (&key_metadata, &manifest) {
            let text = format!(
                "cannot open the snapshot {}: it has no {MANIFEST}: nothing was pushed to this place, or a push has \
                 not ended",
                self.url()
            );
            return Err(Error::io(text, Errno::NOENT));
        }
        let bytes = |got: Option<Got>| got.map(|got| Vec::from(got.bytes));
        if let (Some(mut state), Ok(key_metadata), Ok(manifest)) = (self.state(), &key_metadata, &manifest) {
            state.head = Some(SeenHead {
                key_metadata: key_metadata.as_ref().map(|got| got.version.clone()),
                manifest: manifest.as_ref().map(|got| *blake3::hash(&got.bytes).as_bytes()),
            });
        }
        Ok(Head { key_metadata: key_metadata.map(bytes), manifest: manifest.map(bytes) })
    }

    /// Whether the snapshot has a manifest.
    pub(crate) fn is_sealed(&self) -> Result<bool> {
        if let Some(head) = self.state().as_ref().and_then(|state| state.head.as_ref()) {
            return Ok(head.manifest.is_some());
        }
        let found = self.bucket.head(MANIFEST, &mut Interrupt::new(&mut || Ok(())));
        found.map(|found| found.is_some()).map_err(|error| error.context(self.place_of(MANIFEST)))
    }

    /// Opens a fragment. With the manifest, nothing is sent: if the fragment is missing, its first read says so.
    pub(crate) fn object(&self, path: &SnapshotPath, manifest: Option<&Manifest>) -> Result<Arc<BlockReader>> {
        let absent = || Error::io(format!("{path} of {}: does not exist", self.url()), Errno::NOENT);
        let size = if let Some(manifest) = manifest {
            manifest.fragments.get(path.as_str()).ok_or_else(absent)?.stored_size
        } else {
            let found = self.bucket.head(path.as_str(), &mut Interrupt::new(&mut || Ok(())));
            found.map_err(|error| error.context(format!("{path} of {}", self.url())))?.ok_or_else(absent)?.size
        };
        self.object_of_size(path, size)
    }

    /// Opens a fragment whose stored size is known.
    pub(crate) fn object_of_size(&self, path: &SnapshotPath, size: u64) -> Result<Arc<BlockReader>> {
        let open = |manifest| {
            let reader = BlockReader::new(&self.bucket, path.as_str(), size, manifest);
            reader.map(Arc::new).map_err(|error| error.context(format!("{path} of {}", self.url())))
        };
        let Some(mut state) = self.state() else { return open(None) };
        let key = (path.as_str().to_owned(), size);
        if let Some(reader) = state.readers.get(&key).and_then(Weak::upgrade) {
            return Ok(reader);
        }
        let reader = open(state.head.as_ref().and_then(|head| head.manifest))?;
        state.readers.retain(|_, reader| reader.strong_count() > 0);
        state.readers.insert(key, Arc::downgrade(&reader));
        Ok(reader)
    }

    /// Lists everything that is there. A namespace without a fragment is only in the manifest.
    pub(crate) fn survey(&self, manifest: Option<&Manifest>, interrupt: &mut Interrupt<'_>) -> Result<Survey> {
        let listed = self.list(interrupt)?;
        interrupt.check_now()?;
        Ok(survey(listed, manifest))
    }

    fn list(&self, interrupt: &mut Interrupt<'_>) -> Result<Vec<Listed>> {
        self.bucket.list(interrupt).map_err(|error| error.context(format!("cannot list the snapshot {}", self.url())))
    }

    /// Replaces the key metadata, if it is still the version that was read.
    ///
    /// # Errors
    ///
    /// `State` if it is another one.
    pub(crate) fn replace_key_metadata(&self, wrapped: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let context = |error: Error| error.context(format!("cannot replace {}", self.place_of(KEY_METADATA)));
        let seen = |state: Option<MutexGuard<'_, State>>| state?.head.as_ref()?.key_metadata.clone();
        let version = if let Some(version) = seen(self.state()) {
            version
        } else {
            let found = self.bucket.head(KEY_METADATA, interrupt).map_err(context)?;
            found.ok_or_else(|| context(Error::io("does not exist", Errno::NOENT)))?.version
        };
        let bytes = Bytes::copy_from_slice(wrapped);
        let written = self.bucket.put(KEY_METADATA, bytes, Attributes::new(), Some(&version), interrupt);
        let version = written.map_err(context)?;
        if let Some(head) = self.state().as_mut().and_then(|state| state.head.as_mut()) {
            head.key_metadata = Some(version);
        }
        Ok(())
    }

    /// Removes the snapshot: the manifest first, so that there is no snapshot any more, and then all else.
    ///
    /// # Errors
    ///
    /// `Io` with `ENOENT` if there is no snapshot, `InvalidArgument` if there is another one below it.
    pub(crate) fn remove(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let context = |error: Error| error.context(format!("cannot remove the snapshot {}", self.url()));
        let names: Vec<_> = self.list(interrupt)?.into_iter().map(|each| each.name).collect();
        let has = |name: &str| names.iter().any(|other| other == name);
        // The key metadata is removed last: with it, a removal that failed can be repeated.
        if !has(MANIFEST) && (!has(KEY_METADATA) || names.iter().any(|name| name.starts_with(".vmsnap"))) {
            let text = format!("it has no {MANIFEST}: if a push was killed, `vmsnap clean` removes its remains");
            return Err(context(Error::io(text, Errno::NOENT)));
        }
        if let Some(inner) = names.iter().find_map(|name| name.strip_suffix(MANIFEST)?.strip_suffix('/')) {
            let text = format!("there is another snapshot below it, at {}: remove that first", name::shown(inner));
            return Err(context(Error::invalid_argument(text)));
        }
        let (last, rest): (Vec<_>, Vec<_>) =
            names.into_iter().filter(|name| name != MANIFEST).partition(|name| name == KEY_METADATA);
        for names in [vec![MANIFEST.to_owned()], rest, last] {
            self.bucket.delete(&names, interrupt).map_err(context)?;
        }
        Ok(())
    }
}

/// Sorts the objects of a list into fragments, namespaces and everything else.
fn survey(listed: Vec<Listed>, manifest: Option<&Manifest>) -> Survey {
    let mut survey = Survey::default();
    let mut namespaces: BTreeSet<String> =
        manifest.iter().flat_map(|manifest| &manifest.namespaces).map(ToString::to_string).collect();
    for Listed { name, size, modified } in listed {
        if name == KEY_METADATA || name == MANIFEST {
            continue;
        }
        let parents = name.match_indices('/').map(|(end, _)| &name[..end]);
        if name.split('/').any(name::is_reserved) {
            // A reader leaves out everything with a name of vmsnap's own.
            survey.strange.push(Strange { path: name, kind: StrangeKind::ReservedName, refusal: None });
        } else if let Ok(path) = SnapshotPath::try_from(name.clone()) {
            namespaces.extend(parents.map(str::to_owned));
            survey.fragments.push(StoredFragment { path, stored_size: size, modified, finished: true });
        } else {
            let refusal = Some(Error::corrupt(format!("a snapshot cannot contain the name {}", name::shown(&name))));
            survey.strange.push(Strange { path: name, kind: StrangeKind::BadName, refusal });
        }
    }
    // An empty object with the name of a namespace stands for a directory, in stores that show some.
    let is_listed = |path: &str| manifest.is_some_and(|manifest| manifest.fragments.contains_key(path));
    survey.fragments.retain(|stored| {
        let path = stored.path.as_str();
        stored.stored_size > 0 || is_listed(path) || !namespaces.contains(path)
    });
    survey.fragments.sort_unstable_by(|one, other| one.path.split().cmp(&other.path.split()));
    survey.namespaces = namespaces.into_iter().filter_map(|path| SnapshotPath::try_from(path).ok()).collect();
    survey
}
