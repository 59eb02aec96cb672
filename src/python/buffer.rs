//! Python buffers as slices: anything with the buffer protocol whose bytes lie in one piece.

#![allow(unsafe_code, reason = "a buffer's bytes are a pointer and a length")]

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;

pub(super) struct Readable(PyUntypedBuffer);

impl Readable {
    pub(super) fn get(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        contiguous(object).map(Self)
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        if self.0.len_bytes() == 0 {
            return &[]; // its pointer may be null
        }
        // SAFETY: the exporter keeps buf_ptr() valid for len_bytes() bytes, contiguous as checked, until the buffer is
        // released, which is when `self` is dropped. Another Python thread may write to the memory meanwhile: a race
        // that every user of the buffer protocol without the interpreter's lock accepts (hashlib, sockets); each byte is
        // read by machine code once for each copy or seal, and no decision of ours depends on reading it twice.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast(), self.0.len_bytes()) }
    }
}

pub(super) struct Writable(PyUntypedBuffer);

impl Writable {
    pub(super) fn get(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = contiguous(object)?;
        if buffer.readonly() {
            return Err(PyBufferError::new_err("a buffer that can be written to is needed"));
        }
        Ok(Self(buffer))
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        if self.0.len_bytes() == 0 {
            return &mut [];
        }
        // SAFETY: as in Readable::as_slice, and writable as checked.
        unsafe { std::slice::from_raw_parts_mut(self.0.buf_ptr().cast(), self.0.len_bytes()) }
    }
}

fn contiguous(object: &Bound<'_, PyAny>) -> PyResult<PyUntypedBuffer> {
    let buffer = PyUntypedBuffer::get(object)?;
    if buffer.is_c_contiguous() {
        Ok(buffer)
    } else {
        Err(PyBufferError::new_err("a contiguous buffer is needed: copy it, for instance by bytes()"))
    }
}
