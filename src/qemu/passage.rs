//! [`Passage`]: a stream that passes from an input to an output. Every page is shown on its way and may be taken out;
//! what is left is a valid stream.

use super::ending::Ending;
use super::format::{flag, malformed, refused, section};
use super::front::{Front, push_name, read_command, unexpected};
use super::input::Input;
use super::output::Output;
use crate::error::{Error, Result};
use crate::name::shown;
use crate::threads::Interrupt;
use crate::zeros::PAGE_BYTES;

/// Is shown a page: the number of its block, the number of the page in it, and its bytes, or `None` if all are zero.
/// Returns whether the page is taken out of the stream.
pub(super) type Take<'a> =
    dyn FnMut(usize, u64, Option<&[u8; PAGE_BYTES]>, &mut Interrupt<'_>) -> Result<bool> + 'a;

const RECORD: &str = "a record of section \"ram\"";

pub(super) struct Passage<'a> {
    input: Input<'a>,
    pub(super) output: Output<'a>,
    front: &'a Front,
    /// The names of the blocks in the output.
    names: Vec<&'a str>,
    /// The block of the last record in the input, to which CONTINUE refers.
    current: Option<usize>,
    /// The block of the last record in the output.
    last_kept: Option<usize>,
    has_footers: bool,
    /// Whether a PART is not begun in the output yet. It is left out if all its pages are taken.
    is_pending: bool,
    flushes_multifd: bool,
    pages: u64,
}

impl<'a> Passage<'a> {
    /// Writes the front, which was read from `input`. `names` are the names of the blocks in the output.
    pub(super) fn begin(
        input: Input<'a>,
        output: Output<'a>,
        front: &'a Front,
        names: Vec<&'a str>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        let mut passage = Self {
            input,
            output,
            front,
            names,
            current: None,
            last_kept: None,
            has_footers: false,
            is_pending: false,
            flushes_multifd: false,
            pages: 0,
        };
        passage.output.put(&front.encode(&passage.names), interrupt)?;
        Ok(passage)
    }

    /// Passes the rest of the section that the front is in.
    pub(super) fn first_section(&mut self, take: &mut Take<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.records(take, interrupt)?;
        self.has_footers = self.input.peek(interrupt)? == Some(section::FOOTER);
        self.footer(interrupt)
    }

    /// Passes all other sections of `ram`.
    pub(super) fn other_sections(&mut self, take: &mut Take<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut is_last = false;
        while !is_last {
            let offset = self.input.offset();
            let kind = self.input.byte("section \"ram\"", interrupt)?;
            match kind {
                section::PART | section::END => {
                    let id = self.input.u32("section \"ram\"", interrupt)?;
                    if id != self.front.section {
                        let text = format!("section {id} goes on, but only section \"ram\" began");
                        return Err(malformed(offset, text));
                    }
                    is_last = kind == section::END;
                    self.is_pending = !is_last;
                    if is_last {
                        self.begin_section(kind, interrupt)?;
                    }
                    self.records(take, interrupt)?;
                    self.footer(interrupt)?;
                }
                section::COMMAND => {
                    let command = read_command(offset, &mut self.input, interrupt)?;
                    self.output.put(&[kind], interrupt)?;
                    self.output.put(&command, interrupt)?;
                }
                _ => return Err(unexpected(offset, kind, &mut self.input, interrupt)),
            }
        }
        let is_empty = self.front.blocks.iter().all(|block| block.size == 0);
        if self.flushes_multifd && self.pages == 0 && !self.front.ignores_shared && !is_empty {
            let text = "the stream contains no pages, because the migration capability multifd was on; switch it off";
            return Err(refused(self.input.offset(), text));
        }
        Ok(())
    }

    /// Passes all that follows section `ram` as it is, and checks that it is complete.
    pub(super) fn rest(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut ending = Ending::new(self.has_footers);
        let offset = self.input.offset();
        let kind = self.input.byte("the state of the devices", interrupt)?;
        if !matches!(kind, section::FULL | section::END_OF_STREAM) {
            return Err(unexpected(offset, kind, &mut self.input, interrupt));
        }
        ending.pass(&[kind]);
        self.output.put(&[kind], interrupt)?;
        loop {
            let bytes = self.input.some(interrupt)?;
            if bytes.is_empty() {
                break;
            }
            ending.pass(bytes);
            self.output.put(bytes, interrupt)?;
        }
        self.output.flush(interrupt)?;
        if ending.is_complete() {
            return Ok(());
        }
        let text = "the stream is truncated: it ends within the state of the devices";
        Err(malformed(self.input.offset(), text))
    }

    /// Begins a section of `ram`.
    pub(super) fn begin_section(&mut self, kind: u8, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.output.put(&[kind], interrupt)?;
        self.output.put(&self.front.section.to_be_bytes(), interrupt)
    }

    /// Begins the section that is pending, because something of it is kept.
    fn keep_section(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if std::mem::take(&mut self.is_pending) { self.begin_section(section::PART, interrupt) } else { Ok(()) }
    }

    /// Ends a section of `ram`.
    pub(super) fn end_section(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.output.put(&flag::EOS.to_be_bytes(), interrupt)?;
        if !self.has_footers {
            return Ok(());
        }
        self.output.put(&[section::FOOTER], interrupt)?;
        self.output.put(&self.front.section.to_be_bytes(), interrupt)
    }

    /// The next record that is kept names its block, whatever was written in between.
    pub(super) fn forget_last_block(&mut self) {
        self.last_kept = None;
    }

    /// Passes records up to the end of a section.
    fn records(&mut self, take: &mut Take<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        const PAGE_MASK: u64 = PAGE_BYTES as u64 - 1;
        loop {
            let offset = self.input.offset();
            let word = self.input.u64(RECORD, interrupt)?;
            let (address, flags) = (word & !PAGE_MASK, word & PAGE_MASK);
            match flags & !flag::CONTINUE {
                flag::PAGE => {}
                flag::ZERO => {}
                flag::EOS if word == flag::EOS => return Ok(()),
                // QEMU 8.1.0 writes this even if it does not use multifd.
                flag::MULTIFD_FLUSH if word == flag::MULTIFD_FLUSH => {
                    self.flushes_multifd = true;
                    self.keep_section(interrupt)?;
                    self.output.put(&word.to_be_bytes(), interrupt)?;
                    continue;
                }
                _ => return Err(refused_record(offset, flags)),
            }
            if flags & flag::CONTINUE == 0 {
                let name = self.input.name("the name of a RAM block", interrupt)?;
                self.current = match self.front.find(name) {
                    Some(block) => Some(block),
                    None => {
                        let text = format!("a page is of the RAM block {}, which is not in the list", shown(name));
                        return Err(malformed(offset, text));
                    }
                };
            }
            let Some(block) = self.current else {
                return Err(malformed(offset, "the first page does not name its RAM block"));
            };
            let listed = &self.front.blocks[block];
            if address >= listed.size {
                let (name, size) = (shown(&listed.name), listed.size);
                let text = format!("a page is at {address:#x} in the RAM block {name}, which has {size:#x} bytes");
                return Err(malformed(offset, text));
            }
            self.pages += 1;
            let page = address / PAGE_BYTES as u64;
            let bytes: &[u8] = if flags & flag::PAGE != 0 {
                let bytes = self.input.array::<PAGE_BYTES>(RECORD, interrupt)?;
                if take(block, page, Some(bytes), interrupt)? {
                    continue;
                }
                bytes
            } else {
                let fill = self.input.byte(RECORD, interrupt)?;
                if fill != 0 {
                    return Err(malformed(offset, format_args!("a page of zeros is filled with {fill:#04x}")));
                }
                if take(block, page, None, interrupt)? {
                    continue;
                }
                &[0]
            };
            // The borrowed bytes are still in the input; nothing below reads from it.
            let flags = flags & !flag::CONTINUE;
            if std::mem::take(&mut self.is_pending) {
                self.output.put(&[section::PART], interrupt)?;
                self.output.put(&self.front.section.to_be_bytes(), interrupt)?;
            }
            if self.last_kept == Some(block) {
                self.output.put(&(address | flags | flag::CONTINUE).to_be_bytes(), interrupt)?;
            } else {
                let mut head = Vec::with_capacity(8 + 1 + usize::from(u8::MAX));
                head.extend((address | flags).to_be_bytes());
                push_name(&mut head, self.names[block]);
                self.output.put(&head, interrupt)?;
                self.last_kept = Some(block);
            }
            self.output.put(bytes, interrupt)?;
        }
    }

    /// Reads the footer of a section of `ram`, and ends the section in the output.
    fn footer(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if self.has_footers {
            let offset = self.input.offset();
            let kind = self.input.byte("the footer of a section", interrupt)?;
            let id = self.input.u32("the footer of a section", interrupt)?;
            if (kind, id) != (section::FOOTER, self.front.section) {
                return Err(malformed(offset, "section \"ram\" does not end with its footer"));
            }
        }
        if std::mem::take(&mut self.is_pending) { Ok(()) } else { self.end_section(interrupt) }
    }
}

/// The error for a record that is not a page of 4096 bytes or zeros.
fn refused_record(offset: u64, flags: u64) -> Error {
    let capability = [
        (flag::XBZRLE, "xbzrle"),
        (flag::COMPRESS_PAGE, "compress"),
        (flag::HOOK, "rdma"),
    ];
    match capability.iter().find(|(flag, _)| flags & flag != 0) {
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
    let output = Output::new(&mut sink, BUFFER_BYTES)?;
    let mut passage = Passage::begin(input, output, &front, names, interrupt)?;
    let take: &mut Take<'_> = &mut |block, page, _, _| {
        assert!(page < front.blocks[block].size / PAGE_BYTES as u64);
        Ok(block % 2 == 0)
    };
    passage.first_section(take, interrupt)?;
    passage.other_sections(take, interrupt)?;
    passage.rest(interrupt)
}
