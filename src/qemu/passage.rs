//! [`Passage`]: a stream that passes. Every page is shown on its way and may be taken out; the rest is a valid stream.

use super::early::pass_early;
use super::ending::Ending;
use super::format::{flag, malformed, refused, section};
use super::front::{Front, read_command, unexpected};
use super::input::Input;
use super::kept::Kept;
#[cfg(any(test, fuzzing))]
use super::output::Output;
use crate::error::{Error, Result};
use crate::name::shown;
use crate::threads::Interrupt;
use crate::zeros::PAGE_BYTES;

/// Is shown a page: the number of its block, the number of the page in it, and its bytes, or `None` if all are zero.
/// Returns whether the page is taken out of the stream.
pub(super) type Take<'a> = dyn FnMut(usize, u64, Option<&[u8; PAGE_BYTES]>, &mut Interrupt<'_>) -> Result<bool> + 'a;

const PAGE_MASK: u64 = PAGE_BYTES as u64 - 1;

const RECORD: &str = "a record of section \"ram\"";

pub(super) struct Passage<'a> {
    input: Input<'a>,
    pub(super) kept: Kept<'a>,
    front: &'a Front,
    /// The block of the last record, to which CONTINUE refers.
    current: Option<usize>,
    flushes_multifd: bool,
    /// Whether there was a page.
    has_pages: bool,
}

impl<'a> Passage<'a> {
    /// `front` was read from `input`.
    pub(super) fn new(input: Input<'a>, kept: Kept<'a>, front: &'a Front) -> Self {
        Self { input, kept, front, current: None, flushes_multifd: false, has_pages: false }
    }

    /// Passes the rest of the section that the front is in, and the state of devices that precedes all pages.
    pub(super) fn first_section(&mut self, take: &mut Take<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.records(take, interrupt)?;
        self.kept.has_footers = self.input.peek(interrupt)? == Some(section::FOOTER);
        self.end_section(interrupt)?;
        while self.input.peek(interrupt)? == Some(section::FULL) {
            pass_early(&mut self.input, &mut self.kept, self.front, interrupt)?;
        }
        Ok(())
    }

    /// Passes all other sections of `ram`.
    pub(super) fn other_sections(&mut self, take: &mut Take<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        loop {
            let offset = self.input.offset();
            let kind = self.input.byte("section \"ram\"", interrupt)?;
            match kind {
                section::PART | section::END => {
                    let id = self.input.u32("section \"ram\"", interrupt)?;
                    if id != self.front.section {
                        let text = format!("section {id} continues, but only section \"ram\" began");
                        return Err(malformed(offset, text));
                    }
                    if kind == section::PART {
                        self.kept.begin_part_later();
                    } else {
                        self.kept.begin_section(kind, interrupt)?;
                    }
                    self.records(take, interrupt)?;
                    self.end_section(interrupt)?;
                    if kind == section::END {
                        return self.check_pages();
                    }
                }
                section::COMMAND => {
                    let command = read_command(offset, &mut self.input, interrupt)?;
                    self.kept.put(&[kind], interrupt)?;
                    self.kept.put(&command, interrupt)?;
                }
                _ => return Err(unexpected(offset, kind, &mut self.input, interrupt)),
            }
        }
    }

    /// With multifd, pages pass through connections of their own.
    fn check_pages(&self) -> Result<()> {
        let is_empty = self.front.blocks.iter().all(|block| block.size == 0);
        if self.flushes_multifd && !self.has_pages && !self.front.ignores_shared && !is_empty {
            let text = "the stream contains no pages, because the migration capability multifd was on; switch it off";
            return Err(refused(self.input.offset(), text));
        }
        Ok(())
    }

    /// Passes all that follows section `ram` as it is, and checks that it is complete.
    pub(super) fn rest(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut ending = Ending::new(self.kept.has_footers);
        let offset = self.input.offset();
        let kind = self.input.byte("the state of the devices", interrupt)?;
        if !matches!(kind, section::FULL | section::END_OF_STREAM) {
            return Err(unexpected(offset, kind, &mut self.input, interrupt));
        }
        ending.pass(&[kind]);
        self.kept.put(&[kind], interrupt)?;
        loop {
            let bytes = self.input.some(interrupt)?;
            if bytes.is_empty() {
                break;
            }
            ending.pass(bytes);
            self.kept.put(bytes, interrupt)?;
        }
        if !ending.is_complete() {
            let text = "the stream is truncated: it ends within the state of the devices";
            return Err(malformed(self.input.offset(), text));
        }
        self.kept.flush(interrupt)
    }

    /// Passes records up to the end of a section.
    fn records(&mut self, take: &mut Take<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        loop {
            let offset = self.input.offset();
            let word = self.input.u64(RECORD, interrupt)?;
            match word & PAGE_MASK & !flag::CONTINUE {
                flag::PAGE | flag::ZERO => {}
                _ if word == flag::EOS => return Ok(()),
                // QEMU 8.1 writes this even if it does not use multifd.
                _ if word == flag::MULTIFD_FLUSH => {
                    self.flushes_multifd = true;
                    self.kept.record(word, interrupt)?;
                    continue;
                }
                _ => return Err(refused_record(offset, word & PAGE_MASK)),
            }
            let (block, address) = self.place(offset, word, interrupt)?;
            self.has_pages = true;
            let page = address / PAGE_BYTES as u64;
            if word & flag::PAGE != 0 {
                let bytes = self.input.array(RECORD, interrupt)?;
                if !take(block, page, Some(bytes), interrupt)? {
                    self.kept.page(block, address, flag::PAGE, bytes, interrupt)?;
                }
            } else {
                let fill = self.input.byte(RECORD, interrupt)?;
                if fill != 0 {
                    return Err(malformed(offset, format_args!("a page of zeros is filled with {fill:#04x}")));
                }
                if !take(block, page, None, interrupt)? {
                    self.kept.page(block, address, flag::ZERO, &[fill], interrupt)?;
                }
            }
        }
    }

    /// Returns the block and the address in it of a page record, after its first word.
    fn place(&mut self, offset: u64, word: u64, interrupt: &mut Interrupt<'_>) -> Result<(usize, u64)> {
        if word & flag::CONTINUE == 0 {
            let name = self.input.name("the name of a RAM block", interrupt)?;
            let Some(block) = self.front.find(name) else {
                let text = format!("a page is of the RAM block {}, which is not in the list", shown(name));
                return Err(malformed(offset, text));
            };
            self.current = Some(block);
        }
        let Some(block) = self.current else {
            return Err(malformed(offset, "the first page does not name its RAM block"));
        };
        let (listed, address) = (&self.front.blocks[block], word & !PAGE_MASK);
        if address >= listed.size {
            let (name, size) = (shown(&listed.name), listed.size);
            let text = format!("a page is at {address:#x} of the RAM block {name}, which has {size:#x} bytes");
            return Err(malformed(offset, text));
        }
        Ok((block, address))
    }

    /// Reads the footer of a section of `ram`, and ends the section.
    fn end_section(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if self.kept.has_footers {
            let offset = self.input.offset();
            let kind = self.input.byte("the footer of a section", interrupt)?;
            let id = self.input.u32("the footer of a section", interrupt)?;
            if (kind, id) != (section::FOOTER, self.front.section) {
                return Err(malformed(offset, "section \"ram\" does not end with its footer"));
            }
        }
        self.kept.end_section(interrupt)
    }
}

/// The error for a record that is neither a page of 4096 bytes nor a page of zeros.
fn refused_record(offset: u64, flags: u64) -> Error {
    let capabilities = [(flag::XBZRLE, "xbzrle"), (flag::COMPRESS_PAGE, "compress"), (flag::HOOK, "rdma")];
    match capabilities.iter().find(|(flag, _)| flags & flag != 0) {
        Some((_, name)) => {
            let text = format!("a page is in the form of the migration capability {name}; switch it off");
            refused(offset, text)
        }
        None if flags & flag::MEM_SIZE != 0 => malformed(offset, "there is a second list of RAM blocks"),
        None => malformed(offset, format_args!("a record of section \"ram\" has the flags {flags:#x}")),
    }
}

/// Passes a whole stream and keeps nothing, for fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) fn pass_all(mut bytes: &[u8]) -> Result<()> {
    const BUFFER_BYTES: usize = 8 << 10;
    let mut go_on = || Ok(());
    let interrupt = &mut Interrupt::new(&mut go_on);
    let mut input = Input::new(&mut bytes, BUFFER_BYTES)?;
    let front = Front::read(&mut input, interrupt)?;
    let names = front.blocks.iter().map(|block| &*block.name).collect();
    let mut sink = |_: &[u8], _: &mut Interrupt<'_>| Ok(());
    let kept = Kept::begin(Output::new(&mut sink, BUFFER_BYTES)?, &front, names, interrupt)?;
    let mut passage = Passage::new(input, kept, &front);
    let take: &mut Take<'_> = &mut |block, page, _, _| {
        assert!(page < front.blocks[block].size / PAGE_BYTES as u64);
        Ok(block % 2 == 0)
    };
    passage.first_section(take, interrupt)?;
    passage.other_sections(take, interrupt)?;
    passage.rest(interrupt)
}
