//! What a process remembers of the fragments it wrote into a staged snapshot, so that none is read back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::manifest::Entry;
use crate::threads::lock;

/// Whether a snapshot is staged: neither there nor complete until it is committed.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "bool", into = "bool")]
pub(crate) enum Staging {
    /// It is written where it is.
    InPlace,
    /// By this process, which notes what it writes.
    Here(Arc<Ledger>),
    /// By another, that the handle came from; it finds what is written.
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

#[derive(Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<String, Entry>>);

impl Ledger {
    pub(crate) fn enter(&self, path: &str, entry: Entry) {
        lock(&self.0).insert(path.to_owned(), entry);
    }

    pub(crate) fn strike_out(&self, path: &str) {
        lock(&self.0).remove(path);
    }

    /// A fragment that was written and is not among these.
    pub(crate) fn missing_in(&self, found: &BTreeMap<String, Entry>) -> Option<String> {
        lock(&self.0).keys().find(|path| !found.contains_key(*path)).cloned()
    }

    pub(crate) fn get(&self, path: &str) -> Option<Entry> {
        lock(&self.0).get(path).cloned()
    }
}
