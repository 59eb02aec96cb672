//! `_vmsnap.MigrationStream` and `_vmsnap.SpooledMemory`: guest memory that was taken out of a migration stream.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;

use super::call::number;
use super::memory::{DumpReport, dump_report};
use crate::error::{Error, Kind, Result};
use crate::memory::GuestMemorySource;
use crate::threads::lock;

/// The fields of `vmsnap.migration.RamBlock`.
pub(super) type RamBlock = (String, u64, u64, bool);

/// The fields of `vmsnap.migration.BlockRegion`: guest base, block, offset and size.
pub(super) type BlockRegion<'py> = (Bound<'py, PyAny>, String, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// The stream, and the fields of `vmsnap.migration.MigrationStream`: machine type, whether shared memory is ignored,
/// blocks, the numbers of bytes, and the report of the memory that is written.
pub(super) type Received = (MigrationStream, Option<String>, bool, Vec<RamBlock>, u64, u64, u64, Option<DumpReport>);

/// The spool of a stream until it is closed.
#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct MigrationStream(Mutex<Option<Arc<crate::MigrationStream>>>);

pub(super) fn block_region((guest_base, block, offset, size): BlockRegion<'_>) -> PyResult<crate::BlockRegion> {
    let (guest_base, offset) = (number(&guest_base, "guest_base")?, number(&offset, "offset")?);
    Ok(crate::BlockRegion::new(guest_base, block, offset, number(&size, "size")?))
}

pub(super) fn received(stream: crate::MigrationStream) -> Received {
    let blocks = stream.blocks().iter();
    let blocks = blocks.map(|block| (block.name.clone(), block.size_bytes, block.records, block.taken)).collect();
    let machine_type = stream.machine_type().map(str::to_owned);
    let (ignores_shared, device_state_bytes) = (stream.ignores_shared(), stream.device_state_bytes());
    let (page_bytes, repeated_bytes) = (stream.page_bytes(), stream.repeated_bytes());
    let written = stream.written().cloned().map(dump_report);
    let stream = MigrationStream(Mutex::new(Some(Arc::new(stream))));
    (stream, machine_type, ignores_shared, blocks, device_state_bytes, page_bytes, repeated_bytes, written)
}

impl MigrationStream {
    fn open(&self) -> Result<Arc<crate::MigrationStream>> {
        let closed = || Error::new(Kind::State, "the migration stream is closed, so its memory is gone");
        lock(&self.0).clone().ok_or_else(closed)
    }
}

#[pymethods]
impl MigrationStream {
    fn memory(
        slf: &Bound<'_, Self>,
        block: String,
        offset: &Bound<'_, PyAny>,
        size: &Bound<'_, PyAny>,
    ) -> PyResult<SpooledMemory> {
        let (offset, size) = (number(offset, "offset")?, number(size, "size")?);
        let memory = SpooledMemory { stream: slf.clone().unbind(), block, offset, size };
        memory.part(0, None)?;
        Ok(memory)
    }

    fn close(&self, py: Python<'_>) {
        // Frees the disk space, which takes time.
        py.detach(|| drop(lock(&self.0).take()));
    }
}

/// A part of a block. It does not keep the spool of a closed stream.
#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct SpooledMemory {
    stream: Py<MigrationStream>,
    block: String,
    offset: u64,
    size: u64,
}

impl SpooledMemory {
    /// Returns `size` bytes from `offset` on, by default all the rest, as a source.
    pub(super) fn part(&self, offset: u64, size: Option<u64>) -> Result<impl GuestMemorySource + use<>> {
        let rest = self.size.checked_sub(offset);
        match (rest, size) {
            (Some(rest), None) => self.stream.get().open()?.memory(&self.block, self.offset + offset, rest),
            (Some(rest), Some(size)) if size <= rest => {
                self.stream.get().open()?.memory(&self.block, self.offset + offset, size)
            }
            _ => {
                let wanted = size.map_or(String::new(), |size| format!("{size} bytes from "));
                let text =
                    format!("the memory of the stream has {} bytes, too few for {wanted}offset {offset}", self.size);
                Err(Error::invalid_argument(text))
            }
        }
    }
}
