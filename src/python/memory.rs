//! `_vmsnap.GuestMemory`, and dumps of guest memory.

#![allow(unsafe_code, reason = "a descriptor is a number in Python")]
#![allow(clippy::needless_pass_by_value, reason = "the arguments come from Python")]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::buffer::{Readable, Writable};
use super::call::{check_signals, interruptible, number};
use super::migration::SpooledMemory;
use super::process::ProcessMemory;
use super::writer::SnapshotWriter;
use crate::error::{Error, Result};
use crate::memory::{ChangingBytes, StableBytes};
use crate::{FileMemory, GuestDestination, GuestRegion, MemoryOptions, MemoryProgress, MemoryReport};

/// Progress is reported at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Guest base; file descriptor, buffer, process or spooled memory; offset in it; size.
type RegionSource<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);

/// Guest base; file descriptor or buffer; offset in it; size.
type RegionDestination<'py> =
    (Option<Bound<'py, PyAny>>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

/// The fields of `vmsnap.MemoryReport`.
pub(super) type DumpReport = (u64, u64, u64, usize, f64, Vec<(u64, u64)>);

/// Memory that Python keeps valid during a call.
enum HeldMemory<T> {
    Buffer(T),
    Descriptor(BorrowedFd<'static>),
    Process(crate::ProcessMemory),
    Spooled(Py<SpooledMemory>),
    Nowhere,
}

impl<T> HeldMemory<T> {
    fn get<'py>(object: &Bound<'py, PyAny>, buffer: impl FnOnce(&Bound<'py, PyAny>) -> PyResult<T>) -> PyResult<Self> {
        if object.is_instance_of::<pyo3::types::PyInt>() {
            let descriptor: i32 = number(object, "a file descriptor")?;
            if descriptor < 0 {
                return Err(Error::invalid_argument("a file descriptor cannot be negative").into());
            }
            return Ok(Self::Descriptor(borrowed(descriptor)));
        }
        Ok(Self::Buffer(buffer(object)?))
    }
}

fn borrowed(descriptor: i32) -> BorrowedFd<'static> {
    // SAFETY: not -1, and the caller in Python keeps it open during the call. If it is not open, every system call with
    // it returns an error.
    unsafe { BorrowedFd::borrow_raw(descriptor) }
}

/// Does long `work`, handles signals and reports progress.
pub(super) fn reporting<T: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&mut dyn FnMut(MemoryProgress) -> Result<()>) -> Result<T> + Send,
) -> PyResult<T> {
    let progress = progress.map(|progress| progress.clone().unbind());
    let (mut raised, mut next, mut told) = (None, Instant::now() + PROGRESS_INTERVAL, 0);
    let result = py.detach(|| {
        work(&mut |MemoryProgress { done_bytes, total_bytes }| {
            let reported = Python::attach(|py| {
                check_signals(py)?;
                match &progress {
                    // The end is always reported.
                    Some(progress) if Instant::now() >= next || (done_bytes >= total_bytes && told < total_bytes) => {
                        told = done_bytes;
                        next = Instant::now() + PROGRESS_INTERVAL;
                        progress.call1(py, (done_bytes.min(total_bytes), total_bytes)).map(drop)
                    }
                    _ => Ok(()),
                }
            });
            reported.map_err(|error| {
                raised = Some(error);
                Error::interrupted()
            })
        })
    });
    raised.map_or(Ok(()), Err).and(result.map_err(PyErr::from))
}

#[pyfunction]
#[expect(
    clippy::too_many_arguments,
    clippy::fn_params_excessive_bools,
    reason = "the options of SnapshotWriter.write_memory"
)]
pub(super) fn write_memory(
    py: Python<'_>,
    writer: &SnapshotWriter,
    regions: Vec<RegionSource<'_>>,
    compress: bool,
    block_size_bytes: &Bound<'_, PyAny>,
    chunk_size_bytes: &Bound<'_, PyAny>,
    detect_zeros: bool,
    min_gap_bytes: &Bound<'_, PyAny>,
    zero_unreadable: bool,
    sparse: bool,
    stable: bool,
    uncached: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<DumpReport> {
    let options = MemoryOptions::new()
        .compress(compress)
        .block_size_bytes(number(block_size_bytes, "block_size_bytes")?)
        .chunk_size_bytes(number(chunk_size_bytes, "chunk_size_bytes")?)
        .detect_zeros(detect_zeros)
        .min_gap_bytes(number(min_gap_bytes, "min_gap_bytes")?)
        .zero_unreadable(zero_unreadable)
        .sparse(sparse)
        .uncached(uncached);
    let mut held = Vec::new();
    for (base, source, offset, size) in &regions {
        let size = size.as_ref().map(|size| number::<u64>(size, "size")).transpose()?;
        let held_source = if let Ok(process) = source.cast::<ProcessMemory>() {
            HeldMemory::Process(process.get().0.clone())
        } else if let Ok(spooled) = source.cast::<SpooledMemory>() {
            HeldMemory::Spooled(spooled.clone().unbind())
        } else {
            HeldMemory::get(source, Readable::get)?
        };
        held.push((number(base, "guest_base")?, held_source, number::<u64>(offset, "offset")?, size));
    }
    // All regions of a descriptor share one open file.
    let mut files = HashMap::new();
    let regions = held.iter().map(|(base, held, offset, size)| match held {
        HeldMemory::Nowhere => Err(Error::invalid_argument("a region of guest memory must have a source")),
        HeldMemory::Spooled(spooled) => Ok(GuestRegion::new(*base, spooled.get().part(*offset, *size)?)),
        HeldMemory::Process(process) => {
            let size =
                size.ok_or_else(|| Error::invalid_argument("the size of a region in a process must be given"))?;
            Ok(GuestRegion::new(*base, process.range(*offset, size)?))
        }
        HeldMemory::Descriptor(descriptor) => {
            let file: &FileMemory = match files.entry(descriptor.as_raw_fd()) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(FileMemory::new(*descriptor, 0, None)?.uncached(uncached)),
            };
            Ok(GuestRegion::new(*base, file.part(*offset, *size)?))
        }
        HeldMemory::Buffer(buffer) => {
            let bytes = buffer.as_slice();
            let bytes = &bytes[range_of(bytes.len(), *offset, *size)?];
            // The bytes do not change: the caller promises it, or their type guarantees it.
            Ok(if stable || buffer.is_immutable() {
                GuestRegion::new(*base, StableBytes(bytes))
            } else {
                GuestRegion::new(*base, ChangingBytes(bytes))
            })
        }
    });
    let regions = regions.collect::<Result<Vec<_>>>()?;
    let report =
        reporting(py, progress, |interrupt| writer.writer.write_memory_interruptible(&regions, &options, interrupt))?;
    Ok(dump_report(report))
}

pub(super) fn dump_report(report: MemoryReport) -> DumpReport {
    let MemoryReport { logical_bytes, data_bytes, stored_bytes, ranges, unreadable, duration } = report;
    let unreadable = unreadable.into_iter().map(|range| (range.start, range.end)).collect();
    (logical_bytes, data_bytes, stored_bytes, ranges, duration.as_secs_f64(), unreadable)
}

/// Returns the range of a buffer that a region uses.
fn range_of(length: usize, offset: u64, size: Option<u64>) -> Result<Range<usize>> {
    let range = || {
        let start = usize::try_from(offset).ok()?;
        let end = size.map_or(Some(length), |size| start.checked_add(usize::try_from(size).ok()?))?;
        (start <= end && end <= length).then_some(start..end)
    };
    range().ok_or_else(|| {
        let wanted = size.map_or(String::new(), |size| format!("{size} bytes from "));
        Error::invalid_argument(format!(
            "the buffer of guest memory has {length} bytes, too few for {wanted}offset {offset}"
        ))
    })
}

/// Refuses overlapping buffers. Python may pass one buffer twice, and two mutable borrows of it would not be sound.
fn refuse_overlaps(buffers: impl Iterator<Item = Range<*const u8>>) -> Result<()> {
    let mut buffers: Vec<_> = buffers.map(|range| range.start.addr()..range.end.addr()).collect();
    buffers.sort_by_key(|range| range.start);
    if buffers.windows(2).any(|pair| pair[0].end > pair[1].start) {
        return Err(Error::invalid_argument("two regions cannot be restored into the same bytes of a buffer"));
    }
    Ok(())
}

#[pyclass(frozen, module = "vmsnap._vmsnap")]
pub(super) struct GuestMemory(pub(super) crate::GuestMemory);

#[pymethods]
impl GuestMemory {
    /// Guest base and size of each region.
    #[getter]
    fn regions(&self) -> Vec<(u64, u64)> {
        self.0.regions().into_iter().map(|Range { start, end }| (start, end - start)).collect()
    }

    #[getter]
    fn compressed(&self) -> bool {
        self.0.is_compressed()
    }

    #[getter]
    fn data_bytes(&self) -> u64 {
        self.0.data_bytes()
    }

    fn data_ranges(&self, py: Python<'_>, region: &Bound<'_, PyAny>) -> PyResult<Vec<(u64, u64)>> {
        let region: usize = number(region, "region")?;
        let count = self.0.regions().len();
        if region >= count {
            return Err(Error::invalid_argument(format!(
                "there is no region {region}: the snapshot has {count} regions"
            ))
            .into());
        }
        let ranges = py.detach(|| self.0.data_ranges(region));
        Ok(ranges.into_iter().map(|range| (range.start, range.end)).collect())
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        guest_address: &Bound<'py, PyAny>,
        size: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (address, size): (u64, usize) = (number(guest_address, "guest_address")?, number(size, "size")?);
        self.0.check_address(address, size as u64)?;
        PyBytes::new_with(py, size, |bytes| {
            interruptible(py, |interrupt| self.0.read_at_interruptible(address, bytes, interrupt))
        })
    }

    fn restore(
        &self,
        py: Python<'_>,
        destinations: Vec<RegionDestination<'_>>,
        huge_pages: bool,
        uncached: bool,
        keep_allocated: bool,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let mut held = Vec::new();
        for (base, destination, offset, size) in &destinations {
            let optional = |value: &Option<Bound<'_, PyAny>>, name| {
                value.as_ref().map(|value| number::<u64>(value, name)).transpose()
            };
            let to =
                if destination.is_none() { HeldMemory::Nowhere } else { HeldMemory::get(destination, Writable::get)? };
            held.push((optional(base, "guest_base")?, to, optional(offset, "offset")?, optional(size, "size")?));
        }
        refuse_overlaps(held.iter_mut().filter_map(|(_, held, _, _)| match held {
            HeldMemory::Buffer(buffer) => Some(buffer.as_mut_slice().as_ptr_range()),
            _ => None,
        }))?;
        let opened = held.iter_mut().map(|(base, held, offset, size)| {
            let mut destination = match held {
                HeldMemory::Process(_) | HeldMemory::Spooled(_) | HeldMemory::Nowhere => GuestDestination::nowhere(),
                HeldMemory::Descriptor(descriptor) => GuestDestination::file(descriptor, *offset),
                HeldMemory::Buffer(buffer) => {
                    let buffer = buffer.as_mut_slice();
                    let range = range_of(buffer.len(), offset.unwrap_or(0), *size)?;
                    GuestDestination::buffer(&mut buffer[range])
                }
            };
            if let Some(base) = base {
                destination = destination.at(*base);
            }
            if let Some(size) = size {
                destination = destination.of_size(*size);
            }
            Ok(destination.huge_pages(huge_pages).uncached(uncached).keep_allocated(keep_allocated))
        });
        let mut opened = opened.collect::<Result<Vec<_>>>()?;
        reporting(py, progress, |interrupt| self.0.restore_interruptible(&mut opened, interrupt))
    }
}
