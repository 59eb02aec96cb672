//! Python buffers as slices: any object with the buffer protocol whose bytes are contiguous.

#![allow(unsafe_code, reason = "a buffer's bytes are a pointer and a length")]

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::memory::{populate, readable};

/// A view of a buffer, requested with `PyBUF_SIMPLE` as `hashlib` and sockets do. A buffer that is not contiguous is a
/// `BufferError`.
struct View(Box<ffi::Py_buffer>);

impl View {
    fn get(object: &Bound<'_, PyAny>, flags: std::ffi::c_int) -> PyResult<Self> {
        let mut view = Box::new(ffi::Py_buffer::new());
        // SAFETY: the Bound shows that `object` is alive and the interpreter attached. `view` is a Py_buffer to fill,
        // in a Box so that it never moves, because exporters may keep its address until the release.
        if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *view, flags) } == 0 {
            return Ok(Self(view));
        }
        let py = object.py();
        let refusal = PyErr::fetch(py);
        // numpy raises ValueError instead of BufferError.
        if refusal.is_instance_of::<PyBufferError>(py) || refusal.is_instance_of::<PyValueError>(py) {
            let wanted = if flags == ffi::PyBUF_WRITABLE {
                "a writable, contiguous buffer is required: read into a bytearray, or use a method that returns bytes"
            } else {
                "a contiguous buffer is required: copy it, for instance with bytes()"
            };
            return Err(PyBufferError::new_err(format!("{wanted} ({})", refusal.value(py))));
        }
        Err(refusal)
    }

    fn len(&self) -> usize {
        usize::try_from(self.0.len).unwrap_or(0)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: filled by PyObject_GetBuffer, and released once, while the interpreter is attached.
        Python::attach(|_| unsafe { ffi::PyBuffer_Release(&raw mut *self.0) });
    }
}

/// The part of a possible mapping that is populated, and then used, at a time.
const TOUCHED_BATCH_BYTES: usize = 32 << 20;

/// Whether the bytes of an object are on the heap, so that every page can be used. Any other object may be a mapping
/// with pages that cannot.
fn is_on_heap(object: &Bound<'_, PyAny>) -> bool {
    object.is_exact_instance_of::<PyBytes>() || object.is_exact_instance_of::<PyByteArray>()
}

fn cannot_be_touched(error: std::io::Error) -> Error {
    Error::io("the buffer cannot be used: one of its pages is protected, or cannot be allocated", error)
}

/// The bytes that are written from a buffer.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    bytes: &'a [u8],
    on_heap: bool,
}

impl Bytes<'_> {
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Passes all bytes to `take`, in batches that can be read.
    pub(super) fn in_batches(&self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if self.on_heap || self.bytes.is_empty() {
            return take(self.bytes);
        }
        self.bytes.chunks(TOUCHED_BATCH_BYTES).try_for_each(|batch| {
            let readable = readable(batch).map_err(cannot_be_touched)?;
            if readable < batch.len() {
                return Err(cannot_be_touched(Errno::FAULT.into()));
            }
            take(batch)
        })
    }
}

/// The bytes of a buffer that is filled.
pub(super) struct Room<'a> {
    bytes: &'a mut [u8],
    on_heap: bool,
}

impl Room<'_> {
    /// Fills the first `length` bytes with `read`, in batches that can be written. `read` gets the offset of a batch,
    /// and returns how many bytes it filled. After an error all bytes are zeros.
    pub(super) fn fill(self, length: usize, mut read: impl FnMut(u64, &mut [u8]) -> Result<usize>) -> Result<usize> {
        let Self { bytes, on_heap } = self;
        let (length, batch_bytes) = (length.min(bytes.len()), if on_heap { usize::MAX } else { TOUCHED_BATCH_BYTES });
        let mut done = 0_usize;
        loop {
            let batch = &mut bytes[done..length.min(done.saturating_add(batch_bytes))];
            let wanted = batch.len();
            let result = if on_heap { Ok(()) } else { populate(batch).map_err(cannot_be_touched) };
            match result.and_then(|()| read(done as u64, batch)) {
                Ok(count) => {
                    done += count;
                    if count < wanted || done == length {
                        return Ok(done);
                    }
                }
                Err(error) => {
                    // In a mapping, only the populated pages are zeroed.
                    let touched = if on_heap { bytes.len() } else { done };
                    bytes[..touched].fill(0);
                    return Err(error);
                }
            }
        }
    }
}

pub(super) struct Readable {
    view: View,
    on_heap: bool,
    immutable: bool,
}

impl Readable {
    pub(super) fn get(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let immutable = object.is_exact_instance_of::<PyBytes>();
        Ok(Self { view: View::get(object, ffi::PyBUF_SIMPLE)?, on_heap: is_on_heap(object), immutable })
    }

    /// Returns a copy of all bytes.
    pub(super) fn copy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, self.view.len(), |mut room| {
            Ok(self.bytes().in_batches(|batch| {
                let (now, later) = std::mem::take(&mut room).split_at_mut(batch.len());
                now.copy_from_slice(batch);
                room = later;
                Ok(())
            })?)
        })
    }

    /// Whether the bytes can never change.
    pub(super) fn is_immutable(&self) -> bool {
        self.immutable
    }

    /// Returns all bytes, with the information whether they may be mapped.
    pub(super) fn bytes(&self) -> Bytes<'_> {
        Bytes { bytes: self.as_slice(), on_heap: self.on_heap }
    }

    /// Returns all bytes. Unless they are a few bytes on the heap, the caller must check before that they can be read.
    pub(super) fn as_slice(&self) -> &[u8] {
        if self.view.len() == 0 {
            return &[]; // its pointer may be null
        }
        // SAFETY: the exporter keeps `buf` valid for `len` contiguous bytes until the release, when `self` is dropped.
        // Another Python thread may write to the memory meanwhile. Every user of the buffer protocol without the
        // interpreter's lock (hashlib, sockets) accepts that race: the caller gets other bytes, and no decision of
        // vmsnap depends on them.
        unsafe { std::slice::from_raw_parts(self.view.0.buf.cast(), self.view.len()) }
    }
}

pub(super) struct Writable {
    view: View,
    on_heap: bool,
}

impl Writable {
    pub(super) fn get(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self { view: View::get(object, ffi::PyBUF_WRITABLE)?, on_heap: is_on_heap(object) })
    }

    /// Returns all bytes, with the information whether they may be mapped.
    pub(super) fn room(&mut self) -> Room<'_> {
        let on_heap = self.on_heap;
        Room { bytes: self.as_mut_slice(), on_heap }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        if self.view.len() == 0 {
            return &mut [];
        }
        // SAFETY: see Readable::as_slice; the view was requested as writable.
        unsafe { std::slice::from_raw_parts_mut(self.view.0.buf.cast(), self.view.len()) }
    }
}
