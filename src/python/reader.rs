//! `_vmsnap.SnapshotReader`.

use std::ffi::OsStr;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::call::{from_state, interruptible, number, parse_format, sealed_options, to_state};
use super::credentials::Credentials;
use super::fragment_reader::FragmentReader;
use super::location::LocationArg;
use super::memory::{GuestMemory, reporting};
use super::transfer::duplicate;
use crate::SentBlock;
use crate::error::Error;
use crate::serialization;
use crate::store::pipe::Pipe;

/// The fields of `vmsnap.migration.MigrationFront`.
type Front = (Option<String>, bool, Vec<(String, u64)>);

/// The fields of `vmsnap.migration.SentBlock`; a range is an offset in the block, a guest-physical address and a size.
type Sent<'py> = (String, String, Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)>, bool, bool);

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct SnapshotReader(crate::SnapshotReader);

#[pymethods]
impl SnapshotReader {
    #[new]
    fn new(
        py: Python<'_>,
        location: LocationArg,
        credentials: &Credentials,
        threads: Option<&Bound<'_, PyAny>>,
        require_sealed: bool,
        expect_seal_digest: Option<&[u8]>,
    ) -> PyResult<Self> {
        let options = sealed_options(location.options(credentials, threads)?, require_sealed, expect_seal_digest)?;
        Ok(Self(interruptible(py, |interrupt| options.open_interruptible(location, interrupt))?))
    }

    fn raw_fragment(&self, py: Python<'_>, name: &str) -> PyResult<FragmentReader> {
        Ok(FragmentReader::new(interruptible(py, |interrupt| self.0.raw_fragment_interruptible(name, interrupt))?))
    }

    fn memory(&self, py: Python<'_>) -> PyResult<GuestMemory> {
        Ok(GuestMemory(interruptible(py, |interrupt| self.0.memory_interruptible(interrupt))?))
    }

    fn migration_front(&self, py: Python<'_>, fragment: &str) -> PyResult<Front> {
        let front = py.detach(|| self.0.migration_front(fragment))?;
        Ok((front.machine_type, front.ignores_shared, front.blocks))
    }

    /// Writes a migration stream for QEMU to a descriptor.
    fn send_migration(
        &self,
        py: Python<'_>,
        descriptor: &Bound<'_, PyAny>,
        blocks: Vec<Sent<'_>>,
        fragment: &str,
        threads: Option<&Bound<'_, PyAny>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let mut stream = Pipe::new(duplicate(number(descriptor, "a file descriptor")?)?);
        let threads = threads.map(|threads| number(threads, "threads")).transpose()?;
        let mut sent = Vec::new();
        for (name, sent_name, ranges, zeros, replaced) in blocks {
            let mut block = SentBlock::new(name).sent_as(sent_name).zeros(zeros).replaced(replaced);
            for (offset, guest_base, size) in &ranges {
                block =
                    block.range(number(offset, "offset")?, number(guest_base, "guest_base")?, number(size, "size")?);
            }
            sent.push(block);
        }
        reporting(py, progress, |progress| {
            self.0.send_migration_interruptible(&mut stream, &sent, fragment, threads, progress)
        })
    }

    /// Reads a fragment with one serialized value, and returns its bytes and format.
    fn read_value<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        format: Option<&str>,
        max_size_bytes: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyBytes>, &'static str)> {
        let format = format.map(parse_format).transpose()?;
        let max_size_bytes = number(max_size_bytes, "max_size_bytes")?;
        let fragment = interruptible(py, |interrupt| self.0.whole_fragment(name, max_size_bytes, interrupt))?;
        let size = usize::try_from(fragment.size())
            .map_err(|_| Error::invalid_argument("the fragment is too large for memory"))?;
        let bytes = PyBytes::new_with(py, size, |bytes| {
            interruptible(py, |interrupt| fragment.read_at_interruptible(0, bytes, interrupt)).map(drop)
        })?;
        let data = bytes.as_bytes();
        match py.detach(|| serialization::check(data, format)) {
            Ok(format) => Ok((bytes, format.as_str())),
            Err(malformed) => Err(malformed.at(&self.0.place(name)?).into()),
        }
    }

    /// Returns the name of a fragment for an error.
    fn place(&self, name: &str) -> PyResult<String> {
        Ok(self.0.place(name)?)
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
    fn location(&self) -> &OsStr {
        self.0.location().as_os_str()
    }

    #[getter]
    fn namespace_path(&self) -> &str {
        self.0.namespace_path()
    }

    #[getter]
    fn snapshot_id<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        Ok(py.detach(|| self.0.snapshot_id())?.map(|id| PyBytes::new(py, &id)))
    }

    #[getter]
    fn seal_digest<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.seal_digest().map(|digest| PyBytes::new(py, &digest))
    }

    #[getter]
    fn encrypted(&self) -> bool {
        self.0.is_encrypted()
    }

    /// Serializes the handle for `pickle`, with its data key in the clear.
    fn to_state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        to_state(py, &self.0)
    }

    #[staticmethod]
    fn from_state(state: &[u8]) -> PyResult<Self> {
        from_state(state).map(Self)
    }
}
