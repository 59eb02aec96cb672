//! Options for snapshots in object stores.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The number of connections to an object store, if the caller does not choose it.
const DEFAULT_CONNECTIONS: usize = 16;

/// The most bytes in the cache of blocks, if the caller does not choose it.
#[cfg_attr(not(feature = "object-store"), allow(dead_code, reason = "only object stores are cached"))]
pub(crate) const DEFAULT_CACHE_BYTES: u64 = 10 << 30;

/// Options for a snapshot in an object store. A local path ignores them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RemoteOptions {
    /// Names and values of the client of the store, such as `region`. They override the environment.
    pub(crate) storage_options: BTreeMap<String, String>,
    /// The cache of blocks on a local disk; by default nothing is cached.
    #[serde(default)]
    pub(crate) cache: Option<CacheOptions>,
    /// The most requests with a body that are under way at once.
    pub(crate) connections: usize,
    /// Whether requests may go to other machines without TLS.
    pub(crate) allow_http: bool,
}

/// A cache of blocks of stored bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CacheOptions {
    /// An absolute path.
    pub(crate) directory: PathBuf,
    /// The most bytes that its files occupy. A tenth of the free space is another limit.
    pub(crate) max_bytes: u64,
}

#[cfg(feature = "object-store")]
impl CacheOptions {
    /// A cache of the usual size in `directory`.
    pub(crate) fn new(directory: PathBuf) -> Self {
        let directory = std::path::absolute(&directory).unwrap_or(directory);
        Self { directory, max_bytes: DEFAULT_CACHE_BYTES }
    }
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self { storage_options: BTreeMap::new(), cache: None, connections: DEFAULT_CONNECTIONS, allow_http: false }
    }
}

/// Shows the names of storage options only: a value may be a secret.
impl fmt::Debug for RemoteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteOptions")
            .field("storage_options", &self.storage_options.keys())
            .field("cache", &self.cache)
            .field("connections", &self.connections)
            .field("allow_http", &self.allow_http)
            .finish()
    }
}
