//! Helpers for calls from Python: arguments, signals, and handles in the form that `pickle` carries.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{Error, Result};
use crate::serialization::Format;
use crate::snapshot::SnapshotOptions;

pub(super) fn parse_format(name: &str) -> Result<Format> {
    Format::from_name(name)
        .ok_or_else(|| Error::invalid_argument(format!("{name:?} is not a format: use \"cbor\" or \"json\"")))
}

/// Adds the seal that a reader requires to the options.
pub(super) fn sealed_options(
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

/// Converts a whole number to `T`. An int that does not fit is an invalid argument, not an `OverflowError`.
pub(super) fn number<'py, T>(value: &Bound<'py, PyAny>, name: &str) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    value.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(value.py()) {
            Error::invalid_argument(format!("{name} cannot be {value}: the number is out of range")).into()
        } else {
            error
        }
    })
}

/// A callback that long work calls from time to time. Its error ends the work.
pub(super) type Callback<'a> = &'a mut dyn FnMut() -> Result<()>;

/// Does long `work` while other threads may use the interpreter. A signal handler that raises (Ctrl-C) interrupts it.
pub(super) fn interruptible<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(Callback<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        work(&mut || {
            Python::attach(check_signals).map_err(|error| {
                raised = Some(error);
                Error::interrupted()
            })
        })
    });
    // The exception of the signal handler is more precise than the interruption.
    raised.map_or(Ok(()), Err).and(result.map_err(PyErr::from))
}

/// Serializes a handle as CBOR, with its data key.
pub(super) fn to_state<'py>(py: Python<'py>, handle: &impl serde::Serialize) -> PyResult<Bound<'py, PyBytes>> {
    let mut state = zeroize::Zeroizing::new(Vec::with_capacity(4096 + 512));
    ciborium::into_writer(handle, &mut *state).map_err(|error| Error::invalid_argument(error.to_string()))?;
    Ok(PyBytes::new(py, &state))
}

pub(super) fn from_state<T: serde::de::DeserializeOwned>(state: &[u8]) -> PyResult<T> {
    // A buffer that is wiped when it is dropped, because the state contains a key.
    let mut scratch = zeroize::Zeroizing::new(vec![0; 4096]);
    ciborium::de::from_reader_with_buffer(state, &mut scratch)
        .map_err(|error| Error::invalid_argument(format!("this is not a pickled handle: {error}")).into())
}

pub(super) fn check_signals(py: Python<'_>) -> PyResult<()> {
    py.check_signals()
}
