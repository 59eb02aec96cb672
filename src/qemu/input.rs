//! [`Input`]: the bytes of a stream that is read, and their offsets.

use std::io::{self, ErrorKind, Read};

use super::format::malformed;
use crate::buffer;
use crate::error::{Error, Result};
use crate::threads::Interrupt;

/// The size of the buffer: a pipe of vmsnap holds so many bytes.
pub(super) const BUFFER_BYTES: usize = 1 << 20;

pub(super) struct Input<'a> {
    stream: &'a mut dyn Read,
    buffer: Vec<u8>,
    /// The bytes that were read and not taken yet.
    start: usize,
    end: usize,
    /// The offset in the stream of the byte at `start`.
    offset: u64,
}

impl<'a> Input<'a> {
    /// `buffer_bytes` is also the most that can be taken at once: at least one page.
    pub(super) fn new(stream: &'a mut dyn Read, buffer_bytes: usize) -> Result<Self> {
        Ok(Self { stream, buffer: buffer::zeros(buffer_bytes)?, start: 0, end: 0, offset: 0 })
    }

    /// The offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads until `wanted` bytes are in the buffer; returns whether the stream has so many.
    fn fill(&mut self, wanted: usize, interrupt: &mut Interrupt<'_>) -> Result<bool> {
        if self.end - self.start >= wanted {
            return Ok(true);
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        while self.end < wanted {
            interrupt.check()?;
            match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Ok(false),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => interrupt.check_now()?,
                Err(error) => return Err(not_read(error)),
            }
        }
        Ok(true)
    }

    /// Takes the next `count` bytes, which are part of `what`.
    pub(super) fn take(&mut self, count: usize, what: &str, interrupt: &mut Interrupt<'_>) -> Result<&[u8]> {
        if !self.fill(count, interrupt)? {
            let end = self.offset + (self.end - self.start) as u64;
            return Err(malformed(end, format_args!("the stream is truncated: it ends within {what}")));
        }
        let taken = &self.buffer[self.start..self.start + count];
        self.start += count;
        self.offset += count as u64;
        Ok(taken)
    }

    /// Takes the next `N` bytes, which are part of `what`.
    pub(super) fn array<const N: usize>(&mut self, what: &str, interrupt: &mut Interrupt<'_>) -> Result<&[u8; N]> {
        let offset = self.offset;
        self.take(N, what, interrupt)?.first_chunk().ok_or_else(|| malformed(offset, what))
    }

    pub(super) fn byte(&mut self, what: &str, interrupt: &mut Interrupt<'_>) -> Result<u8> {
        self.array(what, interrupt).map(|[byte]| *byte)
    }

    pub(super) fn u16(&mut self, what: &str, interrupt: &mut Interrupt<'_>) -> Result<u16> {
        self.array(what, interrupt).map(|bytes| u16::from_be_bytes(*bytes))
    }

    pub(super) fn u32(&mut self, what: &str, interrupt: &mut Interrupt<'_>) -> Result<u32> {
        self.array(what, interrupt).map(|bytes| u32::from_be_bytes(*bytes))
    }

    pub(super) fn u64(&mut self, what: &str, interrupt: &mut Interrupt<'_>) -> Result<u64> {
        self.array(what, interrupt).map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// Takes a name: its length in one byte, and so many bytes of UTF-8.
    pub(super) fn name(&mut self, what: &str, interrupt: &mut Interrupt<'_>) -> Result<&str> {
        let offset = self.offset;
        let length = self.byte(what, interrupt)?;
        let name = self.take(length.into(), what, interrupt)?;
        match std::str::from_utf8(name) {
            Ok("") => Err(malformed(offset, format_args!("{what} is empty"))),
            Ok(name) => Ok(name),
            Err(_) => Err(malformed(offset, format_args!("{what} is not UTF-8"))),
        }
    }

    /// Returns the next byte without taking it, or `None` at the end.
    pub(super) fn peek(&mut self, interrupt: &mut Interrupt<'_>) -> Result<Option<u8>> {
        Ok(self.fill(1, interrupt)?.then(|| self.buffer[self.start]))
    }

    /// Takes the bytes that are there, at least one except at the end.
    pub(super) fn some(&mut self, interrupt: &mut Interrupt<'_>) -> Result<&[u8]> {
        self.fill(1, interrupt)?;
        let taken = &self.buffer[self.start..self.end];
        self.start = self.end;
        self.offset += taken.len() as u64;
        Ok(taken)
    }
}

/// The error of a read. That of a fragment names its place already.
fn not_read(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(own) => own,
        Err(other) => Error::io("the migration stream cannot be read", other),
    }
}
