//! The location of a snapshot as Python passes it: a path or a URL, or a URL with options of its object store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::call::number;
use super::credentials::Credentials;
use crate::error::Result;
use crate::location::Location;
use crate::snapshot::SnapshotOptions;
use crate::store::{CacheOptions, RemoteOptions, Store};

/// The fields of `vmsnap.Location`: URL, storage options, directory of the cache, connections, whether to allow HTTP.
type Fields<'py> = (PathBuf, BTreeMap<String, String>, Option<PathBuf>, Bound<'py, PyAny>, bool);

/// A location, made by `vmsnap.location.located`.
pub(super) struct LocationArg {
    named: PathBuf,
    pub(super) remote: RemoteOptions,
}

impl<'py> FromPyObject<'_, 'py> for LocationArg {
    type Error = PyErr;

    fn extract(given: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if !given.is_instance_of::<PyTuple>() {
            return Ok(Self { named: given.extract()?, remote: RemoteOptions::default() });
        }
        let (named, storage_options, cache, connections, allow_http): Fields<'py> = given.extract()?;
        let cache = cache.map(CacheOptions::new);
        let connections = number(&connections, "connections")?;
        Ok(Self { named, remote: RemoteOptions { storage_options, cache, connections, allow_http } })
    }
}

impl AsRef<Path> for LocationArg {
    fn as_ref(&self) -> &Path {
        &self.named
    }
}

impl LocationArg {
    /// The options for the snapshot at the location.
    pub(super) fn options(
        &self,
        credentials: &Credentials,
        threads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<SnapshotOptions> {
        let mut options = SnapshotOptions { remote: self.remote.clone(), ..credentials.0.clone() };
        if let Some(threads) = threads {
            options = options.threads(number(threads, "threads")?);
        }
        Ok(options)
    }

    /// The options for a call that opens no snapshot.
    pub(super) fn cleaning_options(&self) -> SnapshotOptions {
        SnapshotOptions { remote: self.remote.clone(), ..SnapshotOptions::new() }
    }

    /// The snapshot at the location.
    pub(super) fn store(&self) -> Result<Store> {
        Store::at(Location::new(&self.named)?, &self.remote)
    }
}
