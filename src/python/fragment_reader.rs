//! `_vmsnap.FragmentReader`: a fragment that is read from Python. Dropping it closes it.

use std::io::{Seek, SeekFrom};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::buffer::Writable;
use super::call::{Callback, interruptible, number};
use super::slot::Slot;
use crate::error::{Error, Result};

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct FragmentReader {
    /// For reads at an offset, by any number of threads.
    reader: crate::FragmentReader,
    /// For sequential reads, which move the position, by one thread at a time.
    cursor: Slot<crate::FragmentReader>,
}

impl FragmentReader {
    pub(super) fn new(reader: crate::FragmentReader) -> Self {
        Self { cursor: Slot::new(reader.clone()), reader }
    }

    fn with_cursor<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut crate::FragmentReader, Callback<'_>) -> Result<T> + Send,
    ) -> PyResult<T> {
        interruptible(py, |interrupt| self.cursor.with(interrupt, work))
    }

    /// Returns how many of `wanted` bytes exist from `offset` on.
    fn available(&self, offset: u64, wanted: u64) -> PyResult<usize> {
        let available = self.reader.size().saturating_sub(offset).min(wanted);
        usize::try_from(available)
            .map_err(|_| Error::invalid_argument("too large for memory: read less at a time").into())
    }
}

#[pymethods]
impl FragmentReader {
    #[getter]
    fn size(&self) -> u64 {
        self.reader.size()
    }

    #[getter]
    fn stored_size(&self) -> u64 {
        self.reader.stored_size()
    }

    #[getter]
    fn chunk_size_bytes(&self) -> Option<usize> {
        self.reader.chunk_size_bytes()
    }

    fn read_at<'py>(
        &self,
        py: Python<'py>,
        offset: &Bound<'py, PyAny>,
        size: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let offset = number(offset, "offset")?;
        let length = self.available(offset, number(size, "size")?)?;
        PyBytes::new_with(py, length, |bytes| {
            interruptible(py, |interrupt| self.reader.read_at_interruptible(offset, bytes, interrupt)).map(drop)
        })
    }

    fn readinto_at(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let offset = number(offset, "offset")?;
        let mut buffer = Writable::get(buffer)?;
        let room = buffer.room();
        let length = usize::try_from(self.reader.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        interruptible(py, |interrupt| {
            room.fill(length, |done, batch| self.reader.read_at_interruptible(offset + done, batch, interrupt))
        })
    }

    fn readinto(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut buffer = Writable::get(buffer)?;
        let room = buffer.room();
        self.with_cursor(py, |cursor, interrupt| {
            let position = cursor.stream_position()?;
            let length = usize::try_from(cursor.size().saturating_sub(position)).unwrap_or(usize::MAX);
            let read = room.fill(length, |_, batch| cursor.read_interruptible(batch, interrupt));
            if read.is_err() {
                // Zeroed with the rest, so the position must not move past them.
                cursor.seek(SeekFrom::Start(position))?;
            }
            read
        })
    }

    /// Reads `size` bytes from the position on, or all bytes up to the end.
    #[pyo3(signature = (size=None))]
    fn read<'py>(&self, py: Python<'py>, size: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyBytes>> {
        let wanted = size.map_or(Ok(u64::MAX), |size| number(size, "size"))?;
        let position = self.tell(py)?;
        let length = self.available(position, wanted)?;
        let mut read = 0;
        let bytes = PyBytes::new_with(py, length, |bytes| {
            read = self.with_cursor(py, |cursor, interrupt| cursor.read_interruptible(bytes, interrupt))?;
            Ok(())
        })?;
        if read == length {
            return Ok(bytes);
        }
        // Another thread moved the position meanwhile.
        let taken = bytes.as_bytes().get(..read).unwrap_or_default();
        PyBytes::new_with(py, taken.len(), |copy| {
            copy.copy_from_slice(taken);
            Ok(())
        })
    }

    fn seek(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, whence: &Bound<'_, PyAny>) -> PyResult<u64> {
        let to = match number(whence, "whence")? {
            0_i64 => SeekFrom::Start(number(offset, "offset")?),
            1 => SeekFrom::Current(number(offset, "offset")?),
            2 => SeekFrom::End(number(offset, "offset")?),
            other => return Err(Error::invalid_argument(format!("`whence` is 0, 1 or 2, not {other}")).into()),
        };
        self.with_cursor(py, |cursor, _| Ok(cursor.seek(to)?))
    }

    fn tell(&self, py: Python<'_>) -> PyResult<u64> {
        self.with_cursor(py, |cursor, _| Ok(cursor.stream_position()?))
    }
}
