//! `_vmsnap.SnapshotWriter`.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::fragment::Fragment;
use super::{from_state, interruptible, number, options, parse_format, to_state};

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct SnapshotWriter(crate::SnapshotWriter);

#[pymethods]
impl SnapshotWriter {
    #[new]
    fn new(
        root: PathBuf,
        encrypt: bool,
        key: Option<&Bound<'_, PyAny>>,
        threads: Option<&Bound<'_, PyAny>>,
        format: &str,
    ) -> PyResult<Self> {
        Ok(Self(options(encrypt, key, threads)?.format(parse_format(format)?).create(root)?))
    }

    #[staticmethod]
    fn open(
        root: PathBuf,
        key: Option<&Bound<'_, PyAny>>,
        threads: Option<&Bound<'_, PyAny>>,
        format: &str,
    ) -> PyResult<Self> {
        Ok(Self(options(false, key, threads)?.format(parse_format(format)?).append(root)?))
    }

    fn raw_fragment(&self, py: Python<'_>, name: &str, chunk_size_bytes: &Bound<'_, PyAny>) -> PyResult<Fragment> {
        let chunk_size_bytes = number(chunk_size_bytes, "chunk_size_bytes")?;
        Ok(Fragment::new(py.detach(|| self.0.raw_fragment_with_chunk_size(name, chunk_size_bytes))?))
    }

    fn write_whole(&self, py: Python<'_>, name: &str, data: &Bound<'_, PyBytes>) -> PyResult<()> {
        let data = data.as_bytes();
        interruptible(py, |poll| self.0.write_whole(name, data, poll))
    }

    fn add_namespace(&self, name: &str) -> PyResult<Self> {
        Ok(Self(self.0.add_namespace(name)?))
    }

    fn namespace(&self, name: &str) -> PyResult<Self> {
        Ok(Self(self.0.namespace(name)?))
    }

    #[getter]
    fn root(&self) -> PathBuf {
        self.0.root().to_owned()
    }

    #[getter]
    fn namespace_path(&self) -> &str {
        self.0.namespace_path()
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.0.format().as_str()
    }

    #[getter]
    fn encrypted(&self) -> bool {
        self.0.is_encrypted()
    }

    /// The handle with its data key in the clear, as `pickle` carries it.
    fn to_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        to_state(py, &self.0)
    }

    #[staticmethod]
    fn from_state(state: &[u8]) -> PyResult<Self> {
        from_state(state).map(Self)
    }
}
