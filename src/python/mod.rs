//! The extension module `vmsnap._vmsnap`: conversions, one file a class, and nothing that decides.
//!
//! ```text
//! error.rs            errors to the exceptions of vmsnap/errors.py
//! buffer.rs           Python buffers as slices
//! slot.rs             one caller at a time, without holding the interpreter
//! credentials.rs      Credentials, rekey, identities, recipients
//! writer.rs           SnapshotWriter
//! reader.rs           SnapshotReader
//! fragment.rs         Fragment
//! fragment_reader.rs  FragmentReader
//! staging.rs          StagedSnapshot, seal, clean, verify
//! memory.rs           GuestMemory, write_memory
//! process.rs          ProcessMemory, ProcessRange, StoppedProcess
//! outline.rs          key_wrapping, outline
//! ```

mod buffer;
mod credentials;
mod error;
mod fragment;
mod fragment_reader;
mod memory;
mod outline;
mod process;
mod reader;
mod slot;
mod staging;
mod writer;

use std::collections::HashSet;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use self::credentials::Credentials;
use crate::cipher::SecretKey;
use crate::error::{Error, Result};
use crate::options::SnapshotOptions;
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
    use super::memory::{GuestMemory, write_memory};
    #[pymodule_export]
    use super::outline::{key_wrapping, outline};
    #[pymodule_export]
    use super::process::{ProcessMemory, ProcessRange, StoppedProcess};
    #[pymodule_export]
    use super::reader::SnapshotReader;
    #[pymodule_export]
    use super::staging::{StagedSnapshot, clean, seal, verify};
    #[pymodule_export]
    use super::writer::SnapshotWriter;
    #[pymodule_export]
    use super::{aead_provider, are_crowded, check_serialized, copy_buffer, generate_key};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("FEATURES", super::features())?;
        module.add("COMMIT", option_env!("VMSNAP_BUILT_FROM"))?;
        module.add("DEFAULT_CHUNK_SIZE_BYTES", crate::DEFAULT_CHUNK_SIZE_BYTES)
    }
}

/// The bytes of a buffer, of which some may be a mapping's that cannot be read.
#[pyfunction]
fn copy_buffer<'py>(py: Python<'py>, buffer: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    buffer::Readable::get(buffer)?.copy(py)
}

/// Cargo's features that this was built with.
fn features() -> Vec<&'static str> {
    let features =
        [("age", cfg!(feature = "age")), ("aws-lc", cfg!(feature = "aws-lc")), ("c-lz4", cfg!(feature = "c-lz4"))];
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

/// Checks that `data` is one serialized value, and returns its format; an error names `place`.
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

/// Whether different keys with these values of `hash()` make a dict or a set slow.
#[pyfunction]
fn are_crowded(py: Python<'_>, hashes: Vec<i64>) -> bool {
    py.detach(|| {
        // Twice the same may be twice the same key, which takes no slot of its own.
        let mut seen = HashSet::with_capacity(hashes.len());
        let different: Vec<_> = hashes.into_iter().map(i64::cast_unsigned).filter(|hash| seen.insert(*hash)).collect();
        serialization::crowded(&different)
    })
}

fn parse_format(name: &str) -> Result<Format> {
    Format::from_name(name)
        .ok_or_else(|| Error::invalid_argument(format!("format is \"cbor\" or \"json\", not {name:?}")))
}

/// Options as both kinds of handle take them.
fn options(credentials: &Credentials, threads: Option<&Bound<'_, PyAny>>) -> PyResult<SnapshotOptions> {
    let mut options = credentials.0.clone();
    if let Some(threads) = threads {
        options = options.threads(number(threads, "threads")?);
    }
    Ok(options)
}

/// What a reader asks of the seal.
fn sealed_options(
    options: SnapshotOptions,
    require_sealed: bool,
    expect_seal_digest: Option<&[u8]>,
) -> Result<SnapshotOptions> {
    let options = options.require_sealed(require_sealed);
    Ok(match expect_seal_digest {
        None => options,
        Some(digest) => {
            let length = digest.len();
            options.expect_seal_digest(digest.try_into().map_err(|_| {
                Error::invalid_argument(format!("a seal digest has 32 bytes (64 hexadecimal digits), not {length}"))
            })?)
        }
    })
}

/// A whole number that fits `T`; any other int is a bad argument, not an `OverflowError`.
fn number<'py, T>(value: &Bound<'py, PyAny>, name: &str) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    value.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(value.py()) {
            Error::invalid_argument(format!("{name} cannot be {value}")).into()
        } else {
            error
        }
    })
}

/// What `work` asks from time to time: whether to go on.
type Callback<'a> = &'a mut dyn FnMut() -> Result<()>;

/// Does long `work` with the interpreter free for other threads, and lets it be interrupted by signals (Ctrl-C).
fn interruptible<T: Send>(py: Python<'_>, work: impl FnOnce(Callback<'_>) -> Result<T> + Send) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        work(&mut || {
            Python::attach(check_signals).map_err(|error| {
                raised = Some(error);
                Error::interrupted()
            })
        })
    });
    // What the signal's handler raised says more than that it interrupted.
    raised.map_or(Ok(()), Err).and(result.map_err(PyErr::from))
}

/// A handle as CBOR, data key included.
fn to_state<'py>(py: Python<'py>, handle: &impl serde::Serialize) -> PyResult<Bound<'py, PyBytes>> {
    let mut state = zeroize::Zeroizing::new(Vec::with_capacity(4096 + 512));
    ciborium::into_writer(handle, &mut *state).map_err(|error| Error::invalid_argument(error.to_string()))?;
    Ok(PyBytes::new(py, &state))
}

fn from_state<T: serde::de::DeserializeOwned>(state: &[u8]) -> PyResult<T> {
    // A buffer of our own, to be wiped: the state holds a key.
    let mut scratch = zeroize::Zeroizing::new(vec![0; 4096]);
    ciborium::de::from_reader_with_buffer(state, &mut scratch)
        .map_err(|error| Error::invalid_argument(format!("not a pickled handle: {error}")).into())
}

fn check_signals(py: Python<'_>) -> PyResult<()> {
    py.check_signals()
}
