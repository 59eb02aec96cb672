//! The ledger: the manifest entries of the fragments that this process wrote, so that a commit need not read them back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::manifest::Entry;
use crate::threads::lock;

/// Whether a snapshot is staged: absent and incomplete until it is committed.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "bool", into = "bool")]
pub(crate) enum Staging {
    /// It is written at its location.
    InPlace,
    /// This process staged it and enters its fragments into the ledger.
    Here(Arc<Ledger>),
    /// Another process staged it and sent the handle. Its commit reads the fragments of this process.
    Elsewhere,
}

impl Staging {
    pub(crate) fn is_staged(&self) -> bool {
        !matches!(self, Self::InPlace)
    }

    pub(crate) fn ledger(&self) -> Option<&Ledger> {
        match self {
            Self::Here(ledger) => Some(ledger),
            Self::InPlace | Self::Elsewhere => None,
        }
    }
}

impl From<bool> for Staging {
    fn from(is_staged: bool) -> Self {
        if is_staged { Self::Elsewhere } else { Self::InPlace }
    }
}

impl From<Staging> for bool {
    fn from(staging: Staging) -> Self {
        staging.is_staged()
    }
}

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
