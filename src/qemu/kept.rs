//! [`Kept`]: the stream that is left of another one, written section by section and record by record.

use super::format::{flag, section};
use super::front::{Front, length_byte};
use super::output::Output;
use crate::error::Result;
use crate::threads::Interrupt;

pub(super) struct Kept<'a> {
    output: Output<'a>,
    /// The id of section `ram`.
    section: u32,
    /// The names of the blocks.
    names: Vec<&'a str>,
    /// Whether sections end with a footer.
    pub(super) has_footers: bool,
    /// Whether a PART is not begun yet. It is left out if all its pages are taken.
    is_pending: bool,
    /// The block of the last record, to which CONTINUE refers.
    last_block: Option<usize>,
}

impl<'a> Kept<'a> {
    /// Writes the front with other names of the blocks.
    pub(super) fn begin(
        mut output: Output<'a>,
        front: &Front,
        names: Vec<&'a str>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        output.put(&front.encode(&names), interrupt)?;
        let section = front.section;
        Ok(Self { output, section, names, has_footers: false, is_pending: false, last_block: None })
    }

    /// Begins a PART when something of it is kept.
    pub(super) fn begin_part_later(&mut self) {
        self.is_pending = true;
    }

    /// Begins a section of `ram`.
    pub(super) fn begin_section(&mut self, kind: u8, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.put(&[kind], interrupt)?;
        self.put(&self.section.to_be_bytes(), interrupt)
    }

    /// Writes a page record.
    pub(super) fn page(
        &mut self,
        block: usize,
        address: u64,
        kind: u64,
        body: &[u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        if self.last_block == Some(block) {
            self.record(address | kind | flag::CONTINUE, interrupt)?;
        } else {
            self.record(address | kind, interrupt)?;
            let name = self.names[block];
            self.put(&[length_byte(name)], interrupt)?;
            self.put(name.as_bytes(), interrupt)?;
            self.last_block = Some(block);
        }
        self.put(body, interrupt)
    }

    /// Writes the first word of a record.
    pub(super) fn record(&mut self, word: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if std::mem::take(&mut self.is_pending) {
            self.begin_section(section::PART, interrupt)?;
        }
        self.put(&word.to_be_bytes(), interrupt)
    }

    /// Ends a section of `ram`, if it was begun.
    pub(super) fn end_section(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if std::mem::take(&mut self.is_pending) {
            return Ok(());
        }
        self.put(&flag::EOS.to_be_bytes(), interrupt)?;
        if !self.has_footers {
            return Ok(());
        }
        self.put(&[section::FOOTER], interrupt)?;
        self.put(&self.section.to_be_bytes(), interrupt)
    }

    /// The next page names its block: records that this `Kept` does not know come before it.
    pub(super) fn forget_last_block(&mut self) {
        self.last_block = None;
    }

    /// Writes bytes as they are.
    pub(super) fn put(&mut self, bytes: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.output.put(bytes, interrupt)
    }

    pub(super) fn flush(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.output.flush(interrupt)
    }

    /// The number of bytes so far.
    pub(super) fn written(&self) -> u64 {
        self.output.written()
    }
}
