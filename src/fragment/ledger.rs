//! The ledger: the manifest entries of the fragments that this process wrote into a snapshot that it staged, so that a
//! commit need not read them back.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::manifest::Entry;
use crate::threads::lock;

/// The entries, by path.
#[derive(Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<String, Entry>>);

impl Ledger {
    pub(crate) fn enter(&self, path: &str, entry: Entry) {
        lock(&self.0).insert(path.to_owned(), entry);
    }

    pub(crate) fn strike_out(&self, path: &str) {
        lock(&self.0).remove(path);
    }

    /// A fragment that was written and is missing in `found`.
    pub(crate) fn missing_in(&self, found: &BTreeMap<String, Entry>) -> Option<String> {
        lock(&self.0).keys().find(|path| !found.contains_key(*path)).cloned()
    }

    pub(crate) fn get(&self, path: &str) -> Option<Entry> {
        lock(&self.0).get(path).cloned()
    }
}
