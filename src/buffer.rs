//! Memory whose size comes from a caller or a file. If there is not enough, the result is an error instead of an abort.

#![allow(unsafe_code, reason = "std has no zeroed vector that may fail")]

use std::alloc::{Layout, alloc_zeroed};
use std::{io, ptr};

use crate::error::{Error, Kind, Result};

/// The beginning of the text of an [`Error::is_out_of_memory`].
pub(crate) const OUT_OF_MEMORY: &str = "there is not enough memory";

fn out_of_memory(bytes: usize) -> Error {
    Error::new(Kind::OutOfMemory, format!("{OUT_OF_MEMORY} for {bytes} bytes"))
}

/// Like `vec![0; length]`, but fallible. The memory costs nothing before it is used.
pub(crate) fn zeros(length: usize) -> Result<Vec<u8>> {
    let layout = Layout::array::<u8>(length).map_err(|_| out_of_memory(length))?;
    if length == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout's size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        return Err(out_of_memory(length));
    }
    // SAFETY: the global allocator has just allocated it with the layout of `length` bytes. All of them are zero, and
    // nothing else refers to them.
    Ok(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(memory, length)) }.into_vec())
}

/// Sets the length of a buffer; its contents are lost.
pub(crate) fn fit(buffer: &mut Vec<u8>, length: usize) -> Result<()> {
    if length > buffer.capacity() {
        // Free the old memory first.
        *buffer = Vec::new();
        *buffer = zeros(length)?;
    } else {
        buffer.resize(length, 0);
    }
    Ok(())
}

/// Makes a buffer at least `length` bytes long; if it was shorter, its contents are lost.
pub(crate) fn at_least(buffer: &mut Vec<u8>, length: usize) -> Result<()> {
    if buffer.len() < length { fit(buffer, length) } else { Ok(()) }
}

/// Reserves room for `more` elements.
pub(crate) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    list.try_reserve(more).map_err(|_| out_of_memory(list.len().saturating_add(more).saturating_mul(size_of::<T>())))
}

/// Like `items.collect()`, but fallible.
pub(crate) fn collect<T>(items: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, items.size_hint().0)?;
    for item in items {
        reserve(&mut list, 1)?;
        list.push(item);
    }
    Ok(list)
}

/// Checks that this much memory is available, before code of another crate allocates it and would abort.
pub(crate) fn probe(bytes: usize) -> Result<()> {
    let mut probed: Vec<u8> = Vec::new();
    let found = probed.try_reserve_exact(bytes).map_err(|_| out_of_memory(bytes));
    // Keeps the compiler from removing the allocation.
    std::hint::black_box(&probed);
    found
}

/// A growing buffer that implements `Write` and reports a lack of memory.
#[derive(Default)]
pub(crate) struct Growing(pub(crate) Vec<u8>);

impl io::Write for Growing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        reserve(&mut self.0, data.len())?;
        self.0.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn zeros_are_zero_and_as_many_as_wanted() {
        for length in [0, 1, 4096, 1 << 20] {
            let mut buffer = zeros(length).unwrap();
            assert_eq!((buffer.len(), buffer.iter().all(|byte| *byte == 0)), (length, true));
            for other in [length / 2, length, 2 * length + 1] {
                fit(&mut buffer, other).unwrap();
                assert_eq!(buffer.len(), other);
                at_least(&mut buffer, length).unwrap();
                assert_eq!(buffer.len(), length.max(other));
            }
        }
    }

    #[test]
    fn what_no_process_can_have_is_an_error_that_says_how_much() {
        let most = usize::try_from(isize::MAX).unwrap();
        for bytes in [most, most + 1, usize::MAX] {
            let text = format!("there is not enough memory for {bytes} bytes");
            for error in [zeros(bytes).unwrap_err(), probe(bytes).unwrap_err()] {
                assert!(error.is_out_of_memory());
                assert_eq!(error.to_string(), text);
            }
            assert!(reserve(&mut vec![0_u64; 3], bytes).unwrap_err().is_out_of_memory());
            assert!(fit(&mut vec![1], bytes).unwrap_err().is_out_of_memory());
        }
        assert_eq!(io::Error::from(probe(most).unwrap_err()).kind(), io::ErrorKind::OutOfMemory);
    }

    #[test]
    fn lists_grow_as_they_are_written() {
        assert_eq!(collect((0..100).filter(|number| number % 2 == 0)).unwrap().len(), 50);
        let mut growing = Growing::default();
        write!(growing, "{}, {}", 1, 2).unwrap();
        assert_eq!(growing.0, b"1, 2");
    }
}
