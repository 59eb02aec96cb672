//! [`MigrationStream`]: a stream that QEMU sent, taken apart into guest memory and the rest.

use std::cell::Cell;
use std::fmt;
use std::io::Read;
use std::sync::Arc;

use super::format::MAX_MEMORY_BYTES;
use super::front::Front;
use super::input::{self, Input};
use super::kept::Kept;
use super::output::Output;
use super::passage::Passage;
use crate::error::{Error, Kind, Result};
use crate::fragment::Fragment;
use crate::memory::{
    AreaRegion, GuestMemorySource, MemoryProgress, MemoryReport, Spool, Spooled, SpooledPages, Straight,
};
use crate::name::shown;
use crate::snapshot::SnapshotWriter;
use crate::threads::Interrupt;
use crate::zeros::PAGE_BYTES;

/// A block of RAM in a migration stream: guest memory, or a ROM or the memory of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamBlock {
    /// The name that QEMU gave it, for example `pc.ram`.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The number of page records in the stream. With 0, QEMU left the block out, because it is in a shared file; or
    /// the guest uses nothing of it, as of a virtio-mem device with nothing plugged in.
    pub records: u64,
    /// Whether it is guest memory, whose pages were taken out of the stream.
    pub taken: bool,
}

/// A guest region whose memory is a part of a RAM block in a migration stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRegion {
    guest_base: u64,
    block: String,
    offset: u64,
    size: u64,
}

impl BlockRegion {
    /// Returns the region at the guest-physical address `guest_base`: `size` bytes of a block, from `offset` on.
    pub fn new(guest_base: u64, block: impl Into<String>, offset: u64, size: u64) -> Self {
        Self { guest_base, block: block.into(), offset, size }
    }
}

/// A migration stream of QEMU that was received. [`SnapshotWriter::receive_migration`] returns it.
///
/// Guest memory is in a temporary file until the `MigrationStream` and all its memory is dropped, unless it was written
/// to the snapshot as it came. All else is in a fragment.
pub struct MigrationStream {
    machine_type: Option<String>,
    ignores_shared: bool,
    blocks: Vec<RamBlock>,
    /// The area of each block in the spool.
    areas: Vec<Option<usize>>,
    memory: Memory,
    device_state_bytes: u64,
    page_bytes: u64,
    repeated_bytes: u64,
}

/// Where the guest memory is.
enum Memory {
    Spooled(Arc<SpooledPages>),
    Written(MemoryReport),
}

impl MigrationStream {
    /// Returns the sizes of the guest memory if it was written to `mem` and `mem_metadata` as it came.
    #[must_use]
    pub fn written(&self) -> Option<&MemoryReport> {
        match &self.memory {
            Memory::Spooled(_) => None,
            Memory::Written(report) => Some(report),
        }
    }

    /// Returns the machine type, for example `pc-q35-7.2`. A stream without a configuration does not name it.
    #[must_use]
    pub fn machine_type(&self) -> Option<&str> {
        self.machine_type.as_deref()
    }

    /// Returns whether the capability `x-ignore-shared` was on.
    #[must_use]
    pub fn ignores_shared(&self) -> bool {
        self.ignores_shared
    }

    /// Returns all blocks of RAM, in the order of the stream.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Returns the number of bytes of the fragment.
    #[must_use]
    pub fn device_state_bytes(&self) -> u64 {
        self.device_state_bytes
    }

    /// Returns the number of bytes of guest memory that the stream contained: 4096 for each page record.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Returns how many of [`MigrationStream::page_bytes`] were for pages that had come before. The last record counts.
    #[must_use]
    pub fn repeated_bytes(&self) -> u64 {
        self.repeated_bytes
    }

    /// Returns a part of a block, `size` bytes from `offset` on, as the source of a
    /// [`GuestRegion`](crate::GuestRegion). Pages that the stream did not contain are zero.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if there is no such block, its pages were not taken, or it does not have the
    /// bytes; also if the stream does not contain pages of it and `x-ignore-shared` was on, because then its memory may
    /// be in a file. [`Error::is_state`] if the memory was [written](MigrationStream::written) as it came.
    pub fn memory(&self, block: &str, offset: u64, size: u64) -> Result<impl GuestMemorySource + use<>> {
        let wrong = |text| Error::invalid_argument(format!("the RAM block {} {text}", shown(block)));
        let number = self.blocks.iter().position(|listed| listed.name == block);
        let number = number.ok_or_else(|| wrong("is not in the migration stream".to_owned()))?;
        let listed = &self.blocks[number];
        let area = self.areas[number].ok_or_else(|| wrong("was not taken out of the migration stream".to_owned()))?;
        if listed.records == 0 && self.ignores_shared {
            return Err(wrong("is listed in the migration stream, but QEMU left its pages out".to_owned()));
        }
        let Some(end) = offset.checked_add(size).filter(|end| *end <= listed.size_bytes) else {
            let size_bytes = listed.size_bytes;
            return Err(wrong(format!("has {size_bytes} bytes, too few for {size} bytes from offset {offset}")));
        };
        match &self.memory {
            Memory::Spooled(pages) => Ok(pages.source(area, offset..end)),
            Memory::Written(_) => {
                let text = "the guest memory was written to the snapshot as it came: read it from there";
                Err(Error::new(Kind::State, text))
            }
        }
    }
}

impl fmt::Debug for MigrationStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MigrationStream")
            .field("machine_type", &self.machine_type)
            .field("blocks", &self.blocks)
            .finish_non_exhaustive()
    }
}

impl SnapshotWriter {
    /// Reads a migration stream of QEMU to its end. The pages of guest memory are taken out of it: they are in the
    /// returned [`MigrationStream`]. The rest is written to `fragment` as it passes, and is still a stream that QEMU
    /// accepts. If a page comes several times, as in a live migration, its last record counts.
    ///
    /// `blocks` are the names of the RAM blocks that are guest memory. If it is `None`, the names decide: ROMs, flash
    /// and the memory of graphics cards are not guest memory.
    ///
    /// With `regions`, the guest memory is written to `mem` and `mem_metadata` as it comes, as
    /// [`SnapshotWriter::write_memory`] writes these regions with the default options. It takes no other space then, and
    /// [`MigrationStream::written`] returns its sizes. QEMU sends a guest that stands still in such an order. If a page
    /// comes out of the order of the regions, comes again, or is in none of them, the guest memory is in the returned
    /// `MigrationStream`, as without regions.
    ///
    /// # Errors
    ///
    /// [`Error::is_corrupt`] if the stream is malformed or truncated. [`Error::is_unsupported_format`] if it contains
    /// something that vmsnap does not read, for example pages in the form of a migration capability; the text names it.
    /// [`Error::is_io`] if the stream cannot be read, a fragment exists, or the disk is full. After an error the
    /// fragments do not exist.
    pub fn receive_migration(
        &self,
        stream: &mut dyn Read,
        blocks: Option<&[&str]>,
        regions: &[BlockRegion],
        fragment: &str,
    ) -> Result<MigrationStream> {
        self.receive_migration_interruptible(stream, blocks, regions, fragment, &mut |_| Ok(()))
    }

    /// Reads a migration stream as [`SnapshotWriter::receive_migration`] does, and calls `progress` at most every 50 ms
    /// with the number of bytes of guest memory that have come. An error of `progress` ends the call.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotWriter::receive_migration`], and the error that `progress` returns.
    pub fn receive_migration_interruptible(
        &self,
        stream: &mut dyn Read,
        blocks: Option<&[&str]>,
        regions: &[BlockRegion],
        fragment: &str,
        progress: &mut dyn FnMut(MemoryProgress) -> Result<()>,
    ) -> Result<MigrationStream> {
        let mut fragment = self.raw_fragment(fragment)?;
        let (done_bytes, total_bytes) = (Cell::new(0), Cell::new(0));
        let mut report = || progress(MemoryProgress { done_bytes: done_bytes.get(), total_bytes: total_bytes.get() });
        let interrupt = &mut Interrupt::new(&mut report);
        let received = receive(self, stream, blocks, regions, &mut fragment, (&done_bytes, &total_bytes), interrupt);
        if received.is_err() {
            // The first error is the reason.
            let _ = fragment.remove();
        }
        received
    }
}

fn receive(
    writer: &SnapshotWriter,
    stream: &mut dyn Read,
    memory: Option<&[&str]>,
    regions: &[BlockRegion],
    fragment: &mut Fragment,
    (done_bytes, total_bytes): (&Cell<u64>, &Cell<u64>),
    interrupt: &mut Interrupt<'_>,
) -> Result<MigrationStream> {
    let mut input = Input::new(stream, input::BUFFER_BYTES)?;
    let front = Front::read(&mut input, interrupt)?;
    let areas = choose(&front, memory)?;
    let straight = match placed(regions, &front, &areas) {
        // Pages that do not come in order are read back, which an object store does not do before it is complete.
        Some(regions) if writer.is_local() => Straight::new(writer, regions)?,
        Some(_) | None => None,
    };
    let mut spool = straight.map_or_else(|| Spool::new(writer), |straight| Ok(Spool::straight(straight)))?;
    for (block, _) in front.blocks.iter().zip(&areas).filter(|(_, area)| area.is_some()) {
        spool.add_area(block.size);
        total_bytes.set(total_bytes.get() + block.size);
    }

    let mut records = vec![0_u64; areas.len()];
    let mut repeated = 0_u64;
    let mut sink = |bytes: &[u8], interrupt: &mut Interrupt<'_>| {
        fragment.write_all_interruptible(bytes, &mut || interrupt.check())
    };
    let output = Output::new(&mut sink, input::BUFFER_BYTES)?;
    let names = front.blocks.iter().map(|block| &*block.name).collect();
    let mut passage = Passage::new(input, Kept::begin(output, &front, names, interrupt)?, &front);
    let mut take = |block: usize, page: u64, bytes: Option<&[u8; PAGE_BYTES]>, interrupt: &mut Interrupt<'_>| {
        records[block] += 1;
        let Some(area) = areas[block] else { return Ok(false) };
        let is_repeated = match bytes {
            Some(bytes) => spool.put(area, page, bytes, interrupt)?,
            None => spool.put_zero(area, page),
        };
        repeated += u64::from(is_repeated);
        done_bytes.set(done_bytes.get() + if is_repeated { 0 } else { PAGE_BYTES as u64 });
        Ok(true)
    };
    passage.first_section(&mut take, interrupt)?;
    passage.other_sections(&mut take, interrupt)?;
    passage.rest(interrupt)?;
    let device_state_bytes = passage.kept.written();
    drop(passage);

    if front.ignores_shared && areas.iter().zip(&records).any(|(area, records)| area.is_some() && *records == 0) {
        // The memory of the block may be in a file.
        spool.keep();
    }
    let page_bytes = done_bytes.get() + repeated * PAGE_BYTES as u64;
    done_bytes.set(total_bytes.get());
    interrupt.check_now()?;
    fragment.finish_interruptible(&mut || interrupt.check())?;
    let memory = match spool.finish(interrupt)? {
        Spooled::Pages(pages) => Memory::Spooled(Arc::new(pages)),
        Spooled::Written(report) => Memory::Written(report),
    };
    let repeated_bytes = repeated * PAGE_BYTES as u64;
    let taken = areas.iter().map(Option::is_some);
    let blocks = front.blocks.into_iter().zip(records).zip(taken);
    let blocks =
        blocks.map(|((block, records), taken)| RamBlock { name: block.name, size_bytes: block.size, records, taken });
    Ok(MigrationStream {
        machine_type: front.machine_type,
        ignores_shared: front.ignores_shared,
        blocks: blocks.collect(),
        areas,
        memory,
        device_state_bytes,
        page_bytes,
        repeated_bytes,
    })
}

/// Returns the number of the area in the spool of each block that is guest memory.
fn choose(front: &Front, memory: Option<&[&str]>) -> Result<Vec<Option<usize>>> {
    if let Some(missing) = memory.and_then(|names| names.iter().find(|name| front.find(name).is_none())) {
        let text = format!(
            "the migration stream has no RAM block {}, which is guest memory; its blocks are {}",
            shown(missing),
            front.names()
        );
        return Err(Error::corrupt(text));
    }
    let is_memory = |name: &str| memory.map_or_else(|| is_guest_memory(name), |names| names.contains(&name));
    let sizes = front.blocks.iter().filter(|block| is_memory(&block.name)).map(|block| block.size);
    let bytes = sizes.fold(0_u64, u64::saturating_add);
    if bytes > MAX_MEMORY_BYTES {
        let text = format!("the guest has {bytes} bytes of memory, and vmsnap reads at most 16 TiB from a stream");
        return Err(Error::new(Kind::Unsupported, text));
    }
    let mut numbers = 0..;
    let areas = front.blocks.iter().map(|block| if is_memory(&block.name) { numbers.next() } else { None });
    Ok(areas.collect())
}

/// Returns the regions with their areas, or `None` without regions, or if a region is not in guest memory of the stream.
fn placed(regions: &[BlockRegion], front: &Front, areas: &[Option<usize>]) -> Option<Vec<AreaRegion>> {
    let placed = regions.iter().map(|BlockRegion { guest_base, block, offset, size }| {
        let number = front.find(block)?;
        let end = offset.checked_add(*size).filter(|end| *end <= front.blocks[number].size)?;
        Some(AreaRegion { guest_base: *guest_base, area: areas[number]?, range: *offset..end })
    });
    placed.collect::<Option<Vec<_>>>().filter(|placed| !placed.is_empty())
}

/// Returns whether a block is guest memory, as far as its name tells. QEMU names a memory backend by its path
/// (`/objects/mem`) or its id, default memory by the machine (`pc.ram`), and all others by their device or file.
fn is_guest_memory(name: &str) -> bool {
    const OTHERS: [&str; 5] = ["bios", "flash", "vram", "nvram", "rom"];
    let is_backend = name.strip_prefix("/objects/").is_some_and(|id| !id.contains('/'));
    let is_other = || name.contains('/') || name.split(['.', '-', '@']).any(|word| is_numbered(word, &OTHERS));
    is_backend || !is_other()
}

/// Returns whether `word` is one of `words`, perhaps with a number at its end.
fn is_numbered(word: &str, words: &[&str]) -> bool {
    words.contains(&word.trim_end_matches(|last: char| last.is_ascii_digit()))
}

#[cfg(test)]
mod names {
    use super::is_guest_memory;

    #[test]
    fn guest_memory_is_known_by_its_name() {
        for name in ["pc.ram", "mach-virt.ram", "/objects/mem", "mem", "ram-node0", "memdimm0", "dimm1", "s390.ram"] {
            assert!(is_guest_memory(name), "{name}");
        }
        for name in [
            "pc.bios",
            "pc.rom",
            "isa-bios",
            "system.flash0",
            "virt.flash1",
            "vga.vram",
            "0000:00:02.0/vga.vram",
            "0000:00:03.0/e1000.rom",
            "/rom@etc/acpi/tables",
            "/objects/../mem",
        ] {
            assert!(!is_guest_memory(name), "{name}");
        }
    }
}
