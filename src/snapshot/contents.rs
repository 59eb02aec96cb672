//! The contents of a snapshot, as its manifest is to list them.

use std::collections::{BTreeMap, BTreeSet};

use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};
use crate::fragment::FragmentReader;
use crate::fragment::ledger::Ledger;
use crate::manifest::{Entry, Manifest, Proof};
use crate::store::directory::Directory;
use crate::store::{Store, StoredFragment, Survey};
use crate::threads::Interrupt;

/// Everything that a snapshot contains.
pub(super) struct Contents {
    namespaces: BTreeSet<Box<str>>,
    fragments: BTreeMap<String, Entry>,
}

impl Contents {
    /// Lists the contents that a survey found. Reads only fragments that `ledger` does not have, from `store`; without a store, such
    /// a fragment was not finished.
    pub(super) fn of(
        survey: Survey,
        store: Option<&Store>,
        data_key: Option<&SecretKey>,
        ledger: Option<&Ledger>,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let survey = survey.strict()?;
        let mut fragments = BTreeMap::new();
        for stored in survey.fragments {
            let path = &stored.path;
            let entry = ledger.and_then(|ledger| ledger.get(path.as_str()));
            if !stored.finished || (entry.is_none() && store.is_none()) {
                let text = format!(
                    "{path} was never finished, so the snapshot is not complete: discard it and write it again"
                );
                return Err(Error::new(Kind::State, text));
            }
            let entry = match (entry, store) {
                (Some(entry), _) if entry.stored_size == stored.stored_size => entry,
                (None, Some(store)) => examine(store, &stored, data_key, threads, interrupt)?,
                _ => return Err(Error::corrupt(format!("{path} was changed after it was written"))),
            };
            fragments.insert(stored.path.into(), entry);
        }
        if let Some(path) = ledger.and_then(|ledger| ledger.missing_in(&fragments)) {
            return Err(Error::corrupt(format!("the fragment {path:?} was removed after it was written")));
        }
        let namespaces = survey.namespaces.into_iter().map(|path| String::from(path).into_boxed_str()).collect();
        Ok(Self { namespaces, fragments })
    }

    /// Syncs all files that were found, and the directories that contain them.
    pub(super) fn sync(
        &self,
        directory: &Directory,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let fragments: Vec<_> = self.fragments.keys().map(String::as_str).collect();
        let namespaces = self.namespaces.iter().map(|path| &**path);
        directory.sync(fragments.into_iter(), namespaces, threads, &mut Interrupt::new(interrupt))
    }

    pub(super) fn into_manifest(self, snapshot_id: [u8; 16], encrypted: bool) -> Manifest {
        Manifest::new(snapshot_id, encrypted, self.namespaces, self.fragments)
    }
}

/// The manifest's entry for a fragment that this process did not write.
fn examine(
    store: &Store,
    stored: &StoredFragment,
    data_key: Option<&SecretKey>,
    threads: usize,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Entry> {
    let fragment = FragmentReader::open(store, &stored.path, data_key, threads, None, interrupt)?;
    if let Some(entry) = fragment.encrypted_entry() {
        return Ok(entry);
    }
    let digest = fragment.blake3(&mut Vec::new(), interrupt)?;
    Ok(Entry { size: fragment.size(), stored_size: fragment.size(), proof: Proof::Blake3(digest) })
}
