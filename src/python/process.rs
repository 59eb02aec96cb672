//! `_vmsnap.ProcessMemory`, `_vmsnap.ProcessRange` and `_vmsnap.StoppedProcess`.

#![allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]

use std::sync::Mutex;
use std::time::Duration;

use pyo3::prelude::*;

use super::buffer::Writable;
use super::call::{interruptible, number};
use crate::error::Error;
use crate::memory::GuestMemorySource;
use crate::threads::lock;

/// The memory of a process, of which ranges can be dumped.
#[pyclass(frozen, module = "vmsnap")]
pub(super) struct ProcessMemory(pub(super) crate::ProcessMemory);

#[pymethods]
impl ProcessMemory {
    #[new]
    fn new(py: Python<'_>, pid: &Bound<'_, PyAny>) -> PyResult<Self> {
        let pid = number(pid, "pid")?;
        Ok(Self(py.detach(|| crate::ProcessMemory::open(pid))?))
    }

    #[getter]
    fn pid(&self) -> u32 {
        self.0.pid()
    }

    fn __repr__(&self) -> String {
        format!("vmsnap.ProcessMemory({})", self.0.pid())
    }
}

/// A range of addresses of a process.
#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct ProcessRange(crate::ProcessRange);

#[pymethods]
impl ProcessRange {
    #[new]
    fn new(memory: &ProcessMemory, address: u64, size: u64) -> PyResult<Self> {
        Ok(Self(memory.0.range(address, size)?))
    }

    fn next_data(&self, py: Python<'_>, offset: u64) -> PyResult<Option<u64>> {
        Ok(py.detach(|| self.0.next_data(offset)).map_err(Error::from)?)
    }

    fn next_readable(&self, py: Python<'_>, start: u64, end: u64) -> PyResult<u64> {
        Ok(py.detach(|| self.0.next_readable(start..end))?)
    }

    fn read_into(&self, py: Python<'_>, offset: u64, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut buffer = Writable::get(buffer)?;
        let bytes = buffer.as_mut_slice();
        Ok(py.detach(|| self.0.fill(offset, bytes))?)
    }
}

/// A process that is stopped until `let_go` is called.
#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct StoppedProcess(Mutex<Option<crate::StoppedProcess>>);

#[pymethods]
impl StoppedProcess {
    #[new]
    fn new(py: Python<'_>, pid: &Bound<'_, PyAny>, patience_seconds: f64) -> PyResult<Self> {
        let pid = number(pid, "pid")?;
        let patience = Duration::try_from_secs_f64(patience_seconds)
            .map_err(|error| Error::invalid_argument(format!("patience_seconds: {error}")))?;
        let stopped =
            interruptible(py, |interrupt| crate::StoppedProcess::stop_interruptible(pid, patience, interrupt))?;
        Ok(Self(Mutex::new(Some(stopped))))
    }

    fn let_go(&self, py: Python<'_>) {
        py.detach(|| drop(lock(&self.0).take()));
    }

    #[staticmethod]
    fn is_stopped(pid: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(crate::StoppedProcess::is_stopped(number(pid, "pid")?)?)
    }
}
