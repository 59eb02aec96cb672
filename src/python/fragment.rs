//! `_vmsnap.Fragment`: a fragment that is written from Python.

use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::buffer::Readable;
use super::call::{Callback, interruptible};
use super::slot::Slot;
use crate::error::Result;

/// Writes of at most this size keep the interpreter's lock, because its release takes longer than a copy to the buffer.
const KEEP_INTERPRETER_BYTES: usize = 2048;

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct Fragment {
    slot: Slot<crate::Fragment>,
    /// Set if the file must be removed by the thread that uses the fragment now, because a discard could not wait for
    /// it.
    doomed: AtomicBool,
}

impl Fragment {
    pub(super) fn new(fragment: crate::Fragment) -> Self {
        Self { slot: Slot::new(fragment), doomed: AtomicBool::new(false) }
    }

    /// Calls `work` with the fragment, unless it is closed.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut crate::Fragment, Callback<'_>) -> Result<T> + Send,
    ) -> PyResult<T> {
        let result = interruptible(py, |interrupt| {
            self.slot.with(interrupt, |fragment, interrupt| {
                let result = if fragment.is_closed() { None } else { Some(work(fragment, interrupt)) };
                if self.doomed.load(Ordering::Acquire) {
                    fragment.remove()?;
                }
                result.transpose()
            })
        });
        result?.ok_or_else(|| PyValueError::new_err("I/O operation on closed file."))
    }
}

#[pymethods]
impl Fragment {
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let data = Readable::get(data)?;
        let data = data.bytes();
        let mut gathered = false;
        if data.len() <= KEEP_INTERPRETER_BYTES {
            data.in_batches(|batch| {
                gathered = self.slot.try_with(|fragment| fragment.gather(batch)) == Some(true);
                Ok(())
            })?;
        }
        if !gathered {
            self.with(py, |fragment, interrupt| {
                let written = data.in_batches(|batch| fragment.write_all_interruptible(batch, interrupt));
                // Treated as a failed write, because the bytes before the unreadable page were written.
                written.map_err(|error| fragment.fail(error))
            })?;
        }
        Ok(data.len())
    }

    fn tell(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |fragment, _| fragment.position())
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |fragment, _| Ok(std::io::Write::flush(fragment)?))
    }

    /// Finishes the fragment. Does nothing if it is closed.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        interruptible(py, |interrupt| {
            self.slot.with(interrupt, |fragment, interrupt| {
                if fragment.is_closed() {
                    return Ok(());
                }
                fragment.finish_interruptible(interrupt).inspect_err(|_| {
                    // The error of finishing is the one to report.
                    fragment.abandon();
                })
            })
        })
    }

    /// Ends a fragment that was not closed. In a staged snapshot it makes the commit fail; otherwise it is finished.
    fn drop_unclosed(&self, py: Python<'_>) -> PyResult<()> {
        interruptible(py, |interrupt| {
            self.slot.with(interrupt, |fragment, interrupt| {
                if fragment.is_closed() {
                    Ok(())
                } else if fragment.is_staged() {
                    fragment.abandon();
                    Ok(())
                } else {
                    fragment.finish_interruptible(interrupt).inspect_err(|_| fragment.abandon())
                }
            })
        })
    }

    /// Removes the file, even if the fragment is finished. If another call uses the fragment, the file is removed at
    /// the end of that call.
    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        self.slot.owner().check_fragment()?;
        self.doomed.store(true, Ordering::Release);
        interruptible(py, |interrupt| self.slot.with(interrupt, |fragment, _| fragment.remove()))
    }

    /// Whether the fragment can no longer be used, because it was finished or removed, or belongs to another process.
    #[getter]
    fn ended(&self) -> bool {
        self.slot.owner().check_fragment().is_err() || self.slot.try_with(|fragment| fragment.is_closed()) == Some(true)
    }
}

impl Drop for Fragment {
    fn drop(&mut self) {
        if self.slot.owner().check_fragment().is_ok()
            && *self.doomed.get_mut()
            && let Some(fragment) = self.slot.get_mut()
        {
            // An error cannot be reported here.
            let _ = fragment.remove();
        }
    }
}
