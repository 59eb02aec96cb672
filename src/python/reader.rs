//! `_vmsnap.SnapshotReader`.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::fragment_reader::FragmentReader;
use super::{from_state, options, to_state};

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct SnapshotReader(crate::SnapshotReader);

#[pymethods]
impl SnapshotReader {
    #[new]
    fn new(
        root: PathBuf,
        require_encrypted: bool,
        key: Option<&Bound<'_, PyAny>>,
        threads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self(options(require_encrypted, key, threads)?.open(root)?))
    }

    fn raw_fragment(&self, py: Python<'_>, name: &str) -> PyResult<FragmentReader> {
        Ok(FragmentReader::new(py.detach(|| self.0.raw_fragment(name))?))
    }

    fn namespace(&self, name: &str) -> PyResult<Self> {
        Ok(Self(self.0.namespace(name)?))
    }

    fn list_fragments(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        Ok(py.detach(|| self.0.list_fragments())?)
    }

    fn list_namespaces(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        Ok(py.detach(|| self.0.list_namespaces())?)
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
