//! What a process remembers of the fragments it wrote into a staged snapshot, so that none is read back.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::manifest::Entry;
use crate::threads::lock;

#[derive(Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<String, Entry>>);

impl Ledger {
    pub(crate) fn enter(&self, path: &str, entry: Entry) {
        lock(&self.0).insert(path.to_owned(), entry);
    }

    /// A fragment that was written and is not among these.
    pub(crate) fn missing_in(&self, found: &BTreeMap<String, Entry>) -> Option<String> {
        lock(&self.0).keys().find(|path| !found.contains_key(*path)).cloned()
    }

    pub(crate) fn get(&self, path: &str) -> Option<Entry> {
        lock(&self.0).get(path).cloned()
    }
}
