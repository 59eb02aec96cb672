//! Python buffers as slices: anything with the buffer protocol whose bytes lie in one piece.

#![allow(unsafe_code, reason = "a buffer's bytes are a pointer and a length")]

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

/// A buffer as `hashlib` and sockets ask for it, by `PyBUF_SIMPLE`: what does not lie in one piece is a `BufferError`.
struct View(Box<ffi::Py_buffer>);

impl View {
    fn get(object: &Bound<'_, PyAny>, flags: std::ffi::c_int) -> PyResult<Self> {
        let mut view = Box::new(ffi::Py_buffer::new());
        // SAFETY: `object` is alive and the interpreter attached, as its Bound shows; `view` is a Py_buffer to be filled,
        // in a Box so that it never moves: exporters may keep its address until the release.
        if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *view, flags) } == 0 {
            return Ok(Self(view));
        }
        let py = object.py();
        let refusal = PyErr::fetch(py);
        // numpy says ValueError where a BufferError is meant.
        if refusal.is_instance_of::<PyBufferError>(py) || refusal.is_instance_of::<PyValueError>(py) {
            let wanted = if flags == ffi::PyBUF_WRITABLE {
                "a contiguous buffer that can be written to is needed: read into a bytearray, or take bytes()"
            } else {
                "a contiguous buffer is needed: copy it, for instance by bytes()"
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
        // SAFETY: filled by PyObject_GetBuffer, released once, with the interpreter attached.
        Python::attach(|_| unsafe { ffi::PyBuffer_Release(&raw mut *self.0) });
    }
}

pub(super) struct Readable(View);

impl Readable {
    pub(super) fn get(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        View::get(object, ffi::PyBUF_SIMPLE).map(Self)
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        if self.0.len() == 0 {
            return &[]; // its pointer may be null
        }
        // SAFETY: the exporter keeps `buf` valid for `len` bytes in one piece until the release, which is when `self` is
        // dropped. Another Python thread may write to the memory meanwhile: a race that every user of the buffer protocol
        // without the interpreter's lock accepts (hashlib, sockets), and that only gets that caller other bytes: none of
        // our decisions depends on what a buffer holds.
        unsafe { std::slice::from_raw_parts(self.0.0.buf.cast(), self.0.len()) }
    }
}

pub(super) struct Writable(View);

impl Writable {
    pub(super) fn get(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        View::get(object, ffi::PyBUF_WRITABLE).map(Self)
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        if self.0.len() == 0 {
            return &mut [];
        }
        // SAFETY: as in Readable::as_slice, and writable as asked for.
        unsafe { std::slice::from_raw_parts_mut(self.0.0.buf.cast(), self.0.len()) }
    }
}
