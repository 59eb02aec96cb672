//! [`Output`]: the bytes that pass, gathered into large writes.

use crate::buffer;
use crate::error::Result;
use crate::threads::Interrupt;

/// Writes bytes to a fragment or a pipe.
pub(super) type Sink<'a> = dyn FnMut(&[u8], &mut Interrupt<'_>) -> Result<()> + 'a;

pub(super) struct Output<'a> {
    sink: &'a mut Sink<'a>,
    gathered: Vec<u8>,
    room: usize,
    written: u64,
}

impl<'a> Output<'a> {
    pub(super) fn new(sink: &'a mut Sink<'a>, room: usize) -> Result<Self> {
        let mut gathered = Vec::new();
        buffer::reserve(&mut gathered, room)?;
        Ok(Self { sink, gathered, room, written: 0 })
    }

    pub(super) fn put(&mut self, bytes: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.written += bytes.len() as u64;
        if self.gathered.len() + bytes.len() > self.room {
            self.flush(interrupt)?;
        }
        if bytes.len() > self.room {
            return (self.sink)(bytes, interrupt);
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn flush(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if !self.gathered.is_empty() {
            (self.sink)(&self.gathered, interrupt)?;
            self.gathered.clear();
        }
        Ok(())
    }

    /// The number of bytes so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }
}
