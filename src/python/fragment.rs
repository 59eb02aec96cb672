//! `_vmsnap.Fragment`.

use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::buffer::Readable;
use super::call::{Callback, interruptible};
use super::slot::Slot;
use crate::error::Result;

/// Giving up the interpreter costs more than gathering so few bytes.
const KEEP_INTERPRETER_BYTES: usize = 2048;

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct Fragment {
    slot: Slot<crate::Fragment>,
    /// Its file is to go, whoever has the fragment in hands just now: set by a discard that could not wait.
    doomed: AtomicBool,
}

impl Fragment {
    pub(super) fn new(fragment: crate::Fragment) -> Self {
        Self { slot: Slot::new(fragment), doomed: AtomicBool::new(false) }
    }

    /// Lets `work` have the fragment, unless it is closed.
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
                // As after a failed write: what came before the page that cannot be read is in it.
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

    /// Nothing happens to one that is closed already.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        interruptible(py, |interrupt| {
            self.slot.with(interrupt, |fragment, interrupt| {
                if fragment.is_closed() {
                    return Ok(());
                }
                fragment.finish_interruptible(interrupt).inspect_err(|_| {
                    // The error to be told is that of finishing.
                    fragment.abandon();
                })
            })
        })
    }

    /// Of a fragment that nobody closed: one of a staged snapshot makes the commit fail, any other is finished.
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

    /// Removes the file, also of a fragment that was finished, and also where another call is in progress: then at its
    /// end.
    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        self.slot.owner().check_fragment()?;
        self.doomed.store(true, Ordering::Release);
        interruptible(py, |interrupt| self.slot.with(interrupt, |fragment, _| fragment.remove()))
    }

    /// Whether nothing more can be done with it: it was finished or removed, or belongs to another process.
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
            // Nobody is there to be told.
            let _ = fragment.remove();
        }
    }
}
