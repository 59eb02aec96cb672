//! The extension module `vmsnap._vmsnap`: one file for each class, with conversions only. Decisions are made in the
//! core.
//!
//! ```text
//! error.rs            converts errors to the exceptions of vmsnap/errors.py
//! buffer.rs           views of Python buffers as slices
//! call.rs             arguments, signals and pickled handles
//! slot.rs             Slot: a value that one thread uses at a time
//! credentials.rs      Credentials, rekey, identities, recipients
//! writer.rs           SnapshotWriter
//! reader.rs           SnapshotReader
//! fragment.rs         Fragment
//! fragment_reader.rs  FragmentReader
//! staging.rs          StagedSnapshot, seal, clean, verify
//! memory.rs           GuestMemory, write_memory
//! migration.rs        MigrationStream, SpooledMemory
//! process.rs          ProcessMemory, ProcessRange, StoppedProcess
//! location.rs         LocationArg: locations of snapshots as arguments
//! inspect.rs          inspect, is_marked, key_wrapping
//! transfer.rs         pack, unpack, push, pull, the cache
//! ```

mod buffer;
mod call;
mod credentials;
mod error;
mod fragment;
mod fragment_reader;
mod inspect;
mod location;
mod memory;
mod migration;
mod process;
mod reader;
mod slot;
mod staging;
mod transfer;
mod writer;

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use self::call::parse_format;
use crate::cipher::SecretKey;
use crate::serialization::{self, Format};

/// The core of vmsnap, compiled from Rust.
#[pymodule]
mod _vmsnap {
    #[pymodule_export]
    use super::credentials::{
        Credentials, generate_identity, identity_file, read_recipients, read_secret_file, recipients_of, rekey,
    };
    #[pymodule_export]
    use super::fragment::Fragment;
    #[pymodule_export]
    use super::fragment_reader::FragmentReader;
    #[pymodule_export]
    use super::inspect::{inspect, is_marked, key_wrapping};
    #[pymodule_export]
    use super::memory::{GuestMemory, write_memory};
    #[pymodule_export]
    use super::migration::{MigrationStream, SpooledMemory};
    #[pymodule_export]
    use super::process::{ProcessMemory, ProcessRange, StoppedProcess};
    #[pymodule_export]
    use super::reader::SnapshotReader;
    #[pymodule_export]
    use super::staging::{StagedSnapshot, clean, remove, seal, verify};
    #[pymodule_export]
    use super::transfer::{cache_usage, empty_cache, pack, pull, push, unpack};
    #[pymodule_export]
    use super::writer::SnapshotWriter;
    #[pymodule_export]
    use super::{aead_provider, are_crowded, check_serialized, copy_buffer, created_at, generate_key};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("FEATURES", super::features())?;
        module.add("COMMIT", option_env!("VMSNAP_BUILT_FROM"))?;
        module.add("DEFAULT_CHUNK_SIZE_BYTES", crate::DEFAULT_CHUNK_SIZE_BYTES)
    }
}

/// Returns a copy of a buffer. Pages of a mapping that cannot be read are an error.
#[pyfunction]
fn copy_buffer<'py>(py: Python<'py>, buffer: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    buffer::Readable::get(buffer)?.copy(py)
}

/// Returns the time when a file was created, in nanoseconds since 1970. `None` if its file system does not record it.
#[pyfunction]
fn created_at(py: Python<'_>, path: PathBuf) -> Option<u64> {
    let created = py.detach(|| fs::metadata(path).and_then(|found| found.created()).ok())?;
    u64::try_from(created.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()
}

/// Returns the cargo features of this build.
fn features() -> Vec<&'static str> {
    let features = [
        ("age", cfg!(feature = "age")),
        ("aws-lc", cfg!(feature = "aws-lc")),
        ("c-lz4", cfg!(feature = "c-lz4")),
        ("object-store", cfg!(feature = "object-store")),
    ];
    features.into_iter().filter_map(|(name, chosen)| chosen.then_some(name)).collect()
}

#[pyfunction]
fn generate_key(py: Python<'_>) -> PyResult<Bound<'_, PyBytes>> {
    Ok(PyBytes::new(py, SecretKey::generate()?.expose()))
}

#[pyfunction]
fn aead_provider() -> PyResult<&'static str> {
    Ok(crate::cipher::aead_provider()?)
}

/// Checks that `data` is one serialized value, and returns its format. An error names `place`.
#[pyfunction]
fn check_serialized(
    py: Python<'_>,
    data: &Bound<'_, PyBytes>,
    format: Option<&str>,
    place: &str,
) -> PyResult<&'static str> {
    let format = format.map(parse_format).transpose()?;
    let data = data.as_bytes();
    let checked = py.detach(|| serialization::check(data, format));
    Ok(checked.map(Format::as_str).map_err(|malformed| malformed.at(place))?)
}

/// Whether different keys with these values of `hash()` would make a dict or set slow.
#[pyfunction]
fn are_crowded(py: Python<'_>, hashes: Vec<i64>) -> bool {
    py.detach(|| {
        // Equal hashes may be those of one key, which takes only one slot.
        let mut seen = HashSet::with_capacity(hashes.len());
        let different: Vec<_> = hashes.into_iter().map(i64::cast_unsigned).filter(|hash| seen.insert(*hash)).collect();
        serialization::crowded(&different)
    })
}
