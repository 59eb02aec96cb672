//! `_vmsnap.Fragment`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::buffer::Readable;
use super::slot::Slot;
use super::{Callback, interruptible};
use crate::error::Result;

/// Giving up the interpreter costs more than gathering so few bytes.
const KEEP_INTERPRETER_BYTES: usize = 2048;

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct Fragment(Slot<crate::Fragment>);

impl Fragment {
    pub(super) fn new(fragment: crate::Fragment) -> Self {
        Self(Slot::new(fragment))
    }

    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut crate::Fragment, Callback<'_>) -> Result<T> + Send,
    ) -> PyResult<T> {
        interruptible(py, |poll| self.0.with(poll, work))?.ok_or_else(closed)
    }
}

#[pymethods]
impl Fragment {
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let data = Readable::get(data)?;
        let data = data.as_slice();
        let gathered =
            data.len() <= KEEP_INTERPRETER_BYTES && self.0.try_with(|fragment| fragment.gather(data)).is_some();
        if !gathered {
            self.with(py, |fragment, poll| fragment.write_all_polled(data, poll))?;
        }
        Ok(data.len())
    }

    fn tell(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |fragment, _| Ok(fragment.written()))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |fragment, _| Ok(std::io::Write::flush(fragment)?))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        interruptible(py, |poll| match self.0.close(poll)? {
            Some(mut fragment) => fragment.finish_polled(poll),
            None => Ok(()),
        })
    }

    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        interruptible(py, |poll| match self.0.close(poll)? {
            Some(mut fragment) => fragment.remove(),
            None => Ok(()),
        })
    }
}

pub(super) fn closed() -> PyErr {
    PyValueError::new_err("I/O operation on closed file.")
}
