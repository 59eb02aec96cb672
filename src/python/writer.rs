//! `_vmsnap.SnapshotWriter`.

#![allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]

use std::ffi::OsStr;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::call::{from_state, interruptible, number, parse_format, to_state};
use super::credentials::Credentials;
use super::fragment::Fragment;
use super::location::LocationArg;
use super::memory::reporting;
use super::migration::{BlockRegion, Received, block_region, received};
use super::transfer::duplicate;
use crate::store::pipe::Pipe;

pyo3::import_exception!(vmsnap.errors, QemuError);

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct SnapshotWriter {
    pub(super) writer: crate::SnapshotWriter,
}

impl From<crate::SnapshotWriter> for SnapshotWriter {
    fn from(writer: crate::SnapshotWriter) -> Self {
        Self { writer }
    }
}

#[pymethods]
impl SnapshotWriter {
    #[new]
    fn new(
        py: Python<'_>,
        location: LocationArg,
        credentials: &Credentials,
        threads: Option<&Bound<'_, PyAny>>,
        format: &str,
    ) -> PyResult<Self> {
        let options = location.options(credentials, threads)?.format(parse_format(format)?);
        Ok(interruptible(py, |interrupt| options.create_in_place_interruptible(location, interrupt))?.into())
    }

    #[staticmethod]
    fn open(
        py: Python<'_>,
        location: LocationArg,
        credentials: &Credentials,
        threads: Option<&Bound<'_, PyAny>>,
        format: &str,
    ) -> PyResult<Self> {
        let options = location.options(credentials, threads)?.format(parse_format(format)?);
        Ok(interruptible(py, |interrupt| options.append_interruptible(location, interrupt))?.into())
    }

    fn raw_fragment(&self, py: Python<'_>, name: &str, chunk_size_bytes: &Bound<'_, PyAny>) -> PyResult<Fragment> {
        let chunk_size_bytes = number(chunk_size_bytes, "chunk_size_bytes")?;
        Ok(Fragment::new(py.detach(|| self.writer.raw_fragment_with_chunk_size(name, chunk_size_bytes))?))
    }

    fn write_whole(&self, py: Python<'_>, name: &str, data: &Bound<'_, PyBytes>) -> PyResult<()> {
        let data = data.as_bytes();
        interruptible(py, |interrupt| self.writer.write_whole(name, data, interrupt))
    }

    /// Reads a migration stream of QEMU from a descriptor.
    fn receive_migration(
        &self,
        py: Python<'_>,
        descriptor: &Bound<'_, PyAny>,
        blocks: Option<Vec<String>>,
        regions: Vec<BlockRegion<'_>>,
        fragment: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Received> {
        let mut stream = Pipe::new(duplicate(number(descriptor, "a file descriptor")?)?);
        let blocks: Option<Vec<&str>> = blocks.as_ref().map(|names| names.iter().map(String::as_str).collect());
        let regions: Vec<_> = regions.into_iter().map(block_region).collect::<PyResult<_>>()?;
        // Such an error is one of the stream, not of the snapshot.
        let mut is_of_stream = false;
        let stream = reporting(py, progress, |progress| {
            let blocks = blocks.as_deref();
            let received =
                self.writer.receive_migration_interruptible(&mut stream, blocks, &regions, fragment, progress);
            received.inspect_err(|error| is_of_stream = error.is_corrupt() || error.is_unsupported_format())
        });
        match stream {
            Ok(stream) => Ok(received(stream)),
            Err(error) if is_of_stream => Err(QemuError::new_err(error.value(py).to_string())),
            Err(error) => Err(error),
        }
    }

    fn add_namespace(&self, name: &str) -> PyResult<Self> {
        Ok(self.writer.add_namespace(name)?.into())
    }

    fn namespace(&self, name: &str) -> PyResult<Self> {
        Ok(self.writer.namespace(name)?.into())
    }

    #[getter]
    fn location(&self) -> &OsStr {
        self.writer.location().as_os_str()
    }

    #[getter]
    fn namespace_path(&self) -> &str {
        self.writer.namespace_path()
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.writer.format().as_str()
    }

    #[getter]
    fn encrypted(&self) -> bool {
        self.writer.is_encrypted()
    }

    /// Serializes the handle for `pickle`, with its data key in the clear.
    fn to_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        to_state(py, &self.writer)
    }

    #[staticmethod]
    fn from_state(state: &[u8]) -> PyResult<Self> {
        from_state::<crate::SnapshotWriter>(state).map(Into::into)
    }
}
