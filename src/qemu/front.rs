//! [`Front`]: header, configuration and list of RAM blocks, with which every stream begins.

use std::ops::Range;

use super::format::{
    self, MAGIC, MAX_BLOCKS, MAX_CAPABILITIES, MAX_MACHINE_TYPE_BYTES, RAM, RAM_VERSION, VERSION, flag, malformed,
    refused, section,
};
use super::input::Input;
use crate::error::{Error, Result};
use crate::name::shown;
use crate::snapshot::SnapshotReader;
use crate::threads::Interrupt;
use crate::zeros::PAGE_BYTES;

/// The buffer for a front that is read alone.
const BUFFER_BYTES: usize = 64 << 10;

/// The beginning of a migration stream of QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationFront {
    /// The machine type, for example `pc-q35-7.2`. A stream without a configuration does not name it.
    pub machine_type: Option<String>,
    /// Whether the capability `x-ignore-shared` was on.
    pub ignores_shared: bool,
    /// Name and size in bytes of each RAM block, in the order of the stream.
    pub blocks: Vec<(String, u64)>,
}

impl SnapshotReader {
    /// Reads the beginning of the fragment with the devices of a QEMU guest: the machine type and the RAM blocks.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no such fragment. [`Error::is_corrupt`] or [`Error::is_unsupported_format`] if it
    /// is not a migration stream of QEMU that vmsnap reads. [`Error::is_authentication`] if the stored bytes were
    /// changed.
    pub fn migration_front(&self, fragment: &str) -> Result<MigrationFront> {
        let mut reader = self.raw_fragment(fragment)?;
        let mut go_on = || Ok(());
        let front = Front::read(&mut Input::new(&mut reader, BUFFER_BYTES)?, &mut Interrupt::new(&mut go_on));
        Ok(front.map_err(|error| error.context(self.place(fragment).unwrap_or_default()))?.public())
    }
}

/// A block in the list. Its address is in the list only with `x-ignore-shared`.
pub(super) struct ListedBlock {
    pub(super) name: String,
    pub(super) size: u64,
    address: Option<u64>,
}

pub(super) struct Front {
    pub(super) machine_type: Option<String>,
    pub(super) ignores_shared: bool,
    /// The id of section `ram`.
    pub(super) section: u32,
    pub(super) blocks: Vec<ListedBlock>,
    /// All bytes before the list.
    head: Vec<u8>,
    /// The subsection with the capabilities, in `head`.
    capabilities: Range<usize>,
}

impl Front {
    /// Reads up to the end of the list.
    pub(super) fn read(input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<Self> {
        let mut front = Self {
            machine_type: None,
            ignores_shared: false,
            section: 0,
            blocks: Vec::new(),
            head: Vec::new(),
            capabilities: 0..0,
        };
        front.read_header(input, interrupt)?;
        front.read_configuration(input, interrupt)?;
        loop {
            let offset = input.offset();
            let kind = input.byte("the beginning of a section", interrupt)?;
            front.head.push(kind);
            match kind {
                section::COMMAND => front.head.extend(read_command(offset, input, interrupt)?),
                section::START => break,
                _ => return Err(unexpected(offset, kind, input, interrupt)),
            }
        }
        front.read_start(input, interrupt)?;
        front.read_blocks(input, interrupt)?;
        Ok(front)
    }

    fn read_header(&mut self, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let magic: [u8; 4] = *input.array("its header", interrupt)?;
        if magic != MAGIC {
            let begins = magic.escape_ascii();
            return Err(malformed(0, format_args!("not a stream of QEMU: it begins with \"{begins}\", not \"QEVM\"")));
        }
        let version = input.u32("its header", interrupt)?;
        if version != VERSION {
            return Err(refused(4, format_args!("the stream has version {version}, and vmsnap reads version 3")));
        }
        self.head.extend(MAGIC);
        self.head.extend(VERSION.to_be_bytes());
        Ok(())
    }

    fn read_configuration(&mut self, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        const WHAT: &str = "its configuration";
        if input.peek(interrupt)? != Some(section::CONFIGURATION) {
            return Ok(());
        }
        self.head.push(input.byte(WHAT, interrupt)?);
        let offset = input.offset();
        let length = input.u32(WHAT, interrupt)?;
        let name = usize::try_from(length).ok().filter(|length| (1..=MAX_MACHINE_TYPE_BYTES).contains(length));
        let Some(name) = name else {
            return Err(malformed(offset, format_args!("the machine type cannot have {length} bytes")));
        };
        let name = input.take(name, WHAT, interrupt)?;
        let Ok(name) = std::str::from_utf8(name) else {
            return Err(malformed(offset, "the machine type is not UTF-8"));
        };
        self.head.extend(length.to_be_bytes());
        self.head.extend(name.as_bytes());
        self.machine_type = Some(name.to_owned());
        while input.peek(interrupt)? == Some(section::SUBSECTION) {
            self.read_subsection(input, interrupt)?;
        }
        Ok(())
    }

    /// Reads a subsection of the configuration. Its length depends on its name.
    fn read_subsection(&mut self, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        const WHAT: &str = "a subsection of its configuration";
        let (offset, start) = (input.offset(), self.head.len());
        self.head.push(input.byte(WHAT, interrupt)?);
        let name = input.name("the name of a subsection", interrupt)?.to_owned();
        push_name(&mut self.head, &name);
        let version = input.u32(WHAT, interrupt)?;
        self.head.extend(version.to_be_bytes());
        if version != 1 {
            return Err(refused(offset, format_args!("the subsection {} has version {version}", shown(&name))));
        }
        match &*name {
            "configuration/target-page-bits" => {
                let bits = input.u32(WHAT, interrupt)?;
                self.head.extend(bits.to_be_bytes());
                if 1_usize.checked_shl(bits) != Some(PAGE_BYTES) {
                    let text = format!("the guest's pages have 2^{bits} bytes, and vmsnap reads pages of 2^12 bytes");
                    return Err(refused(offset, text));
                }
            }
            "configuration/uuid" => self.head.extend(input.array::<16>(WHAT, interrupt)?),
            "configuration/capabilities" => {
                if !self.capabilities.is_empty() {
                    return Err(malformed(offset, "the configuration lists the capabilities twice"));
                }
                self.read_capabilities(input, interrupt)?;
                self.capabilities = start..self.head.len();
            }
            _ => {
                return Err(refused(offset, format_args!("the configuration has the subsection {}", shown(&name))));
            }
        }
        Ok(())
    }

    fn read_capabilities(&mut self, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let offset = input.offset();
        let count = input.u32("the list of capabilities", interrupt)?;
        if count > MAX_CAPABILITIES {
            return Err(malformed(offset, format_args!("the stream lists {count} capabilities")));
        }
        self.head.extend(count.to_be_bytes());
        for _ in 0..count {
            let offset = input.offset();
            let name = input.name("the name of a capability", interrupt)?;
            push_name(&mut self.head, name);
            if name != "x-ignore-shared" {
                let text = format!("the migration capability {} was on; switch it off", shown(name));
                return Err(refused(offset, text));
            }
            self.ignores_shared = true;
        }
        Ok(())
    }

    /// Reads the beginning of section `ram` and of its first record, after the byte of its kind.
    fn read_start(&mut self, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        const WHAT: &str = "the beginning of a section";
        let offset = input.offset() - 1;
        self.section = input.u32(WHAT, interrupt)?;
        let name = input.name("the name of a section", interrupt)?;
        if name != RAM {
            return Err(iterative(offset, name));
        }
        self.head.extend(self.section.to_be_bytes());
        push_name(&mut self.head, RAM);
        self.head.extend(input.array::<4>(WHAT, interrupt)?);
        let version = input.u32(WHAT, interrupt)?;
        self.head.extend(version.to_be_bytes());
        if version != RAM_VERSION {
            let text = format!("section \"ram\" has version {version}, and vmsnap reads version {RAM_VERSION}");
            return Err(refused(offset, text));
        }
        Ok(())
    }

    fn read_blocks(&mut self, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        const WHAT: &str = "the list of RAM blocks";
        let start = input.offset();
        let word = input.u64(WHAT, interrupt)?;
        self.head.extend(word.to_be_bytes());
        let page_mask = PAGE_BYTES as u64 - 1;
        if word & page_mask != flag::MEM_SIZE {
            return Err(malformed(start, "section \"ram\" does not begin with a list of its blocks"));
        }
        let mut left = word & !page_mask;
        while left > 0 {
            let offset = input.offset();
            if self.blocks.len() == MAX_BLOCKS {
                return Err(refused(offset, format_args!("the stream has more than {MAX_BLOCKS} RAM blocks")));
            }
            let name = input.name("the name of a RAM block", interrupt)?.to_owned();
            if self.blocks.iter().any(|block| block.name == name) {
                return Err(malformed(offset, format_args!("the RAM block {} is listed twice", shown(&name))));
            }
            let size = input.u64(WHAT, interrupt)?;
            if size & page_mask != 0 {
                let text = format!("the RAM block {} has {size} bytes, not a multiple of {PAGE_BYTES}", shown(&name));
                return Err(malformed(offset, text));
            }
            let Some(rest) = left.checked_sub(size) else {
                let text = "the sizes of the RAM blocks do not match their sum, or have page sizes between them";
                return Err(malformed(offset, text));
            };
            left = rest;
            let address = if self.ignores_shared { Some(input.u64(WHAT, interrupt)?) } else { None };
            self.blocks.push(ListedBlock { name, size, address });
        }
        Ok(())
    }

    /// Makes it the front of a stream that contains all memory: of one without `x-ignore-shared`, which is the only
    /// capability that a front lists.
    pub(super) fn without_capabilities(mut self) -> Self {
        self.head.drain(std::mem::take(&mut self.capabilities));
        self.blocks.iter_mut().for_each(|block| block.address = None);
        self
    }

    /// Returns the bytes of the front. `names` are the names of the blocks in it.
    pub(super) fn encode(&self, names: &[&str]) -> Vec<u8> {
        let mut bytes = self.head.clone();
        for (block, name) in self.blocks.iter().zip(names) {
            push_name(&mut bytes, name);
            bytes.extend(block.size.to_be_bytes());
            bytes.extend(block.address.map(u64::to_be_bytes).into_iter().flatten());
        }
        bytes
    }

    /// Returns the number of a block.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|block| block.name == name)
    }

    /// The names of all blocks, for an error.
    pub(super) fn names(&self) -> String {
        self.blocks.iter().map(|block| shown(&block.name)).collect::<Vec<_>>().join(", ")
    }

    fn public(self) -> MigrationFront {
        let blocks = self.blocks.into_iter().map(|block| (block.name, block.size)).collect();
        MigrationFront { machine_type: self.machine_type, ignores_shared: self.ignores_shared, blocks }
    }
}

/// Appends a name as the stream has it: its length in one byte, and its bytes.
pub(super) fn push_name(bytes: &mut Vec<u8>, name: &str) {
    bytes.push(length_byte(name));
    bytes.extend(name.as_bytes());
}

/// Returns the length of a name. It fits, because the name comes from a stream, or its length was checked.
pub(super) fn length_byte(name: &str) -> u8 {
    u8::try_from(name.len()).unwrap_or(u8::MAX)
}

/// Reads a command, after the byte of its kind, and returns its bytes.
pub(super) fn read_command(offset: u64, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Result<[u8; 4]> {
    let command = input.u16("a command", interrupt)?;
    let length = input.u16("a command", interrupt)?;
    if command != format::SWITCHOVER_START || length != 0 {
        let text = format!(
            "the stream contains the command {}, which needs a connection to QEMU in both directions; switch postcopy \
             and the return path off",
            format::command_name(command)
        );
        return Err(refused(offset, text));
    }
    let [[a, b], [c, d]] = [command.to_be_bytes(), length.to_be_bytes()];
    Ok([a, b, c, d])
}

/// The error for a section that is migrated in rounds, as `ram` is, or for a second section `ram`.
pub(super) fn iterative(offset: u64, name: &str) -> Error {
    if name == RAM {
        return malformed(offset, "section \"ram\" begins twice");
    }
    refused(offset, format_args!("the section {} is migrated in rounds, which vmsnap does not read", shown(name)))
}

/// The error for the state of a device before the end of section `ram`.
pub(super) fn early(offset: u64, name: &str) -> Error {
    let text = "comes before the end of section \"ram\", which vmsnap does not read";
    refused(offset, format_args!("the section {} {text}", shown(name)))
}

/// The error for a section whose kind does not fit its place; the byte of its kind was taken.
pub(super) fn unexpected(offset: u64, kind: u8, input: &mut Input<'_>, interrupt: &mut Interrupt<'_>) -> Error {
    match kind {
        section::FULL | section::START => {
            let name = input.u32("a section", interrupt).and_then(|_| input.name("the name of a section", interrupt));
            match name {
                Ok(name) if kind == section::START => iterative(offset, name),
                Ok(name) => early(offset, name),
                Err(error) => error,
            }
        }
        section::END_OF_STREAM => malformed(offset, "the stream ends before the end of section \"ram\""),
        _ => malformed(offset, format_args!("there is no section of kind {kind:#x} here")),
    }
}
