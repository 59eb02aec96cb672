//! Converts errors to exceptions.

use pyo3::exceptions::{PyMemoryError, PyOSError, PyRuntimeError};
use pyo3::prelude::*;

use super::credentials::raised;
use crate::error::Error;

mod exceptions {
    pyo3::import_exception!(vmsnap.errors, AuthenticationError);
    pyo3::import_exception!(vmsnap.errors, CorruptSnapshotError);
    pyo3::import_exception!(vmsnap.errors, InvalidArgumentError);
    pyo3::import_exception!(vmsnap.errors, KeyUnavailableError);
    pyo3::import_exception!(vmsnap.errors, NotEncryptedError);
    pyo3::import_exception!(vmsnap.errors, NotSealedError);
    pyo3::import_exception!(vmsnap.errors, SealedError);
    pyo3::import_exception!(vmsnap.errors, StateError);
    pyo3::import_exception!(vmsnap.errors, UnsupportedFormatError);
    pyo3::import_exception!(vmsnap.errors, VmsnapError);
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        use exceptions::{
            AuthenticationError, CorruptSnapshotError, InvalidArgumentError, KeyUnavailableError, NotEncryptedError,
            NotSealedError, SealedError, StateError, UnsupportedFormatError, VmsnapError,
        };
        let raised = Python::attach(|py| raised(py, &error));
        let cause = match raised {
            Some((exception, true)) => return exception,
            Some((exception, false)) => Some(exception),
            None => None,
        };
        let text = error.to_string();
        if let Some(errno) = error.raw_os_error().filter(|_| error.is_io()) {
            // Python adds the errno itself, and makes a FileNotFoundError or another subclass from it.
            let text = text.strip_suffix(&format!(" (os error {errno})")).map(str::to_owned).unwrap_or(text);
            return PyOSError::new_err((errno, text));
        }
        if error.is_io() {
            PyOSError::new_err(text)
        } else if error.is_out_of_memory() {
            PyMemoryError::new_err(text)
        } else if error.is_invalid_argument() {
            InvalidArgumentError::new_err(text)
        } else if error.is_authentication() {
            AuthenticationError::new_err(text)
        } else if error.is_key_unavailable() {
            let unavailable = KeyUnavailableError::new_err(text);
            Python::attach(|py| unavailable.set_cause(py, cause));
            unavailable
        } else if error.is_not_encrypted() {
            NotEncryptedError::new_err(text)
        } else if error.is_not_sealed() {
            NotSealedError::new_err(text)
        } else if error.is_corrupt() {
            CorruptSnapshotError::new_err(text)
        } else if error.is_unsupported_format() {
            UnsupportedFormatError::new_err(text)
        } else if error.is_state() {
            StateError::new_err(text)
        } else if error.is_sealed() {
            SealedError::new_err(text)
        } else if error.is_interrupted() {
            // Reached only if the exception that interrupted the work is missing; otherwise that is raised instead.
            PyRuntimeError::new_err(text)
        } else {
            VmsnapError::new_err(text)
        }
    }
}
