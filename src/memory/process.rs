//! The memory of a live process as guest memory.
//!
//! What was never touched is neither read nor made resident: a page of a file is read from the file, and what `/proc/PID/pagemap`
//! tells of an anonymous page says whether there is one (Documentation/admin-guide/mm/pagemap.rst of the kernel).

#![allow(unsafe_code, reason = "process_vm_readv is in no safe crate we have")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::file::{FileMemory, OpenFile};
use super::source::GuestMemorySource;
use crate::error::{Error, Result};
use crate::threads::lock;

/// Bytes that `/proc/PID/pagemap` has for a page, and its bits for pages that are there: in memory, or swapped out.
const ENTRY_BYTES: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Entries that are looked at together: as many pages as a thread reads at a time.
const ENTRIES: usize = 128;

/// The memory of a live process; [`ProcessMemory::range`] makes guest memory of a part of it.
///
/// It is read as it was mapped when this was made. The process is not stopped: whoever wants one moment's memory stops it before.
#[derive(Clone, Debug)]
pub struct ProcessMemory {
    process: Arc<Process>,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    /// Of this very process: empty when it has ended or runs another program.
    pagemap: File,
    mappings: Vec<Mapping>,
    files: Mutex<Files>,
}

/// The files that are mapped, by device and inode; None for one that cannot be opened.
#[derive(Debug, Default)]
struct Files {
    opened: HashMap<(u64, u64), Option<Arc<OpenFile>>>,
    /// What the process has open.
    descriptors: Option<HashMap<(u64, u64), PathBuf>>,
}

/// Part of `/proc/PID/smaps`.
#[derive(Debug)]
struct Mapping {
    addresses: Range<u64>,
    shared: bool,
    file_offset: u64,
    device: u64,
    inode: u64,
    name: String,
    /// Whether what is not there may be something else than zeros or the file's: a device's memory, or pages that a handler of
    /// userfaultfd brings.
    opaque: bool,
}

impl ProcessMemory {
    /// Opens the memory of the process of that number.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] where there is no such process, or this user may not read its memory.
    pub fn open(pid: u32) -> Result<Self> {
        let failed = |error: io::Error| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => "there is no such process",
                io::ErrorKind::PermissionDenied => {
                    "no permission to read its memory; root has it, and its owner where kernel.yama.ptrace_scope is 0"
                }
                _ => "its memory cannot be read",
            };
            Error::io(format!("process {pid}: {why}"), error)
        };
        let folder = PathBuf::from(format!("/proc/{pid}"));
        // Needs the permission that reading needs; the others need less.
        File::open(folder.join("mem")).map_err(failed)?;
        let pagemap = File::open(folder.join("pagemap")).map_err(failed)?;
        let mappings = mappings(BufReader::new(File::open(folder.join("smaps")).map_err(failed)?)).map_err(failed)?;
        let pid = i32::try_from(pid).map_err(|_| failed(io::ErrorKind::NotFound.into()))?;
        Ok(Self { process: Arc::new(Process { pid, pagemap, mappings, files: Mutex::default() }) })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid.unsigned_abs()
    }

    /// `size` bytes from the virtual address `address` on. What is not mapped there cannot be read.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let writer = vmsnap::SnapshotWriter::new(folder.path().join("vm1"), false)?;
    /// # #[repr(align(65536))]
    /// # struct Ram([u8; 65536]);
    /// # let ram = Box::new(Ram([7; 65536]));
    /// # let (pid, address) = (std::process::id(), &raw const *ram as u64);
    /// let process = vmsnap::ProcessMemory::open(pid)?;
    /// let regions = [vmsnap::GuestRegion::new(0, process.range(address, 65536)?)];
    /// let report = writer.write_memory(&regions, &vmsnap::MemoryOptions::new())?;
    /// assert_eq!(report.data_bytes, 65536);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] where nothing is mapped, or the address is not that of a page.
    pub fn range(&self, address: u64, size: u64) -> Result<ProcessRange> {
        let process = &self.process;
        let refused = |why: &str| {
            let text = format!("process {}: {why} (it has {size} bytes from {address:#x})", process.pid);
            Err(Error::invalid_argument(text))
        };
        let Some(end) = address.checked_add(size) else {
            return refused("the range ends after the last address");
        };
        if !address.is_multiple_of(rustix::param::page_size() as u64) {
            return refused("the range does not begin with a page");
        }
        let pieces = process.pieces(address..end);
        if size > 0 && pieces.iter().all(|piece| matches!(piece.held, Held::Nowhere)) {
            return refused("nothing is mapped in the range; /proc/PID/maps tells what is");
        }
        Ok(ProcessRange { process: Arc::clone(process), addresses: address..end, pieces })
    }
}

/// A range of addresses of a process as guest memory; from [`ProcessMemory::range`].
#[derive(Debug)]
pub struct ProcessRange {
    process: Arc<Process>,
    addresses: Range<u64>,
    /// All of it, in ascending order.
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    addresses: Range<u64>,
    held: Held,
}

/// What holds the pages of a piece.
#[derive(Debug)]
enum Held {
    /// The process alone: what is not there is zero.
    Anonymous,
    /// A file, whoever maps it.
    Shared(FileMemory),
    /// The process, where it has written, and otherwise a file.
    Private(FileMemory),
    /// Only reading tells.
    Opaque,
    Nowhere,
}

impl Process {
    fn pieces(&self, addresses: Range<u64>) -> Vec<Piece> {
        let (mut pieces, mut at) = (Vec::new(), addresses.start);
        let mut add = |to: u64, held: Held| {
            if to > at {
                pieces.push(Piece { addresses: at..to, held });
                at = to;
            }
        };
        for mapping in &self.mappings {
            let start = mapping.addresses.start.max(addresses.start);
            let end = mapping.addresses.end.min(addresses.end);
            if start >= end {
                continue;
            }
            add(start, Held::Nowhere);
            let file = if mapping.opaque || mapping.inode == 0 { None } else { self.file(mapping) };
            match file {
                Some(file) => {
                    let offset = mapping.file_offset + (start - mapping.addresses.start);
                    // The last page that the file does not fill is the mapping's, and what comes after it nobody's.
                    let pages = file.length().saturating_sub(offset) & !(rustix::param::page_size() as u64 - 1);
                    let part = FileMemory::within(file, offset, pages.min(end - start));
                    let file_end = start + part.size();
                    add(file_end, if mapping.shared { Held::Shared(part) } else { Held::Private(part) });
                    add(end, Held::Opaque);
                }
                None if mapping.is_anonymous() => add(end, Held::Anonymous),
                None => add(end, Held::Opaque),
            }
        }
        add(addresses.end, Held::Nowhere);
        pieces
    }

    /// The file of a mapping, if it can be opened: by what the kernel has for it, for which root is needed, or by a
    /// descriptor of the process.
    fn file(&self, mapping: &Mapping) -> Option<Arc<OpenFile>> {
        let files = &mut *lock(&self.files);
        let identity = (mapping.device, mapping.inode);
        if let Some(file) = files.opened.get(&identity) {
            return file.clone();
        }
        let Range { start, end } = mapping.addresses;
        let direct = PathBuf::from(format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid));
        let descriptors = files.descriptors.get_or_insert_with(|| descriptors(self.pid));
        let file = [Some(&direct), descriptors.get(&identity)].into_iter().flatten().find_map(|path| {
            // Nothing but a file is opened: opening a pipe waits, and a device may do anything.
            let is_it = |found: &fs::Metadata| found.is_file() && (found.dev(), found.ino()) == identity;
            fs::metadata(path).ok().filter(is_it)?;
            let file = File::open(path).ok()?;
            file.metadata().ok().filter(is_it)?;
            OpenFile::of(file, true).ok().flatten().map(Arc::new)
        });
        files.opened.insert(identity, file.clone());
        file
    }

    /// Reads what the page map says of the pages from `address` on.
    fn entries<'a>(&self, address: u64, entries: &'a mut [[u8; ENTRY_BYTES]]) -> io::Result<&'a [[u8; ENTRY_BYTES]]> {
        let offset = address / rustix::param::page_size() as u64 * ENTRY_BYTES as u64;
        let count = self.pagemap.read_at(entries.as_flattened_mut(), offset)? / ENTRY_BYTES;
        if count == 0 { Err(gone()) } else { Ok(&entries[..count]) }
    }

    /// Gives each run of pages, whether the process has them.
    fn runs(&self, addresses: Range<u64>, mut run: impl FnMut(bool, Range<u64>) -> io::Result<()>) -> io::Result<()> {
        let page = rustix::param::page_size() as u64;
        let mut buffer = [[0; ENTRY_BYTES]; ENTRIES];
        let (mut start, mut at, mut before) = (addresses.start, addresses.start / page * page, false);
        while at < addresses.end {
            let wanted =
                usize::try_from((addresses.end - at).div_ceil(page)).map_or(ENTRIES, |count| count.min(ENTRIES));
            for entry in self.entries(at, &mut buffer[..wanted])? {
                let held = u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) != 0;
                if held != before {
                    if at > start {
                        run(before, start..at)?;
                        start = at;
                    }
                    before = held;
                }
                at += page;
            }
        }
        if start < addresses.end { run(before, start..addresses.end) } else { Ok(()) }
    }

    /// Reads from its memory; a page that is not there is made.
    fn read(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        let unreadable = || io::Error::from_raw_os_error(libc::EFAULT);
        let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let base = std::ptr::without_provenance_mut(usize::try_from(address).map_err(|_| unreadable())?);
        let remote = libc::iovec { iov_base: base, iov_len: buf.len() };
        // SAFETY: the kernel writes to `buf` alone, no more than its length; the address is another process' and only a number
        // here.
        let count = unsafe { libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return Err(if error.raw_os_error() == Some(libc::ESRCH) { gone() } else { error });
        };
        // Whoever has the number now: it was still the process that was meant.
        self.entries(0, &mut [[0; ENTRY_BYTES]])?;
        if count == 0 { Err(unreadable()) } else { Ok(count) }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the process has ended, or runs another program")
}

/// Which files a process has open: their paths by device and inode.
fn descriptors(pid: i32) -> HashMap<(u64, u64), PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| {
        let found = fs::metadata(entry.path()).ok()?;
        found.is_file().then(|| ((found.dev(), found.ino()), entry.path()))
    });
    files.collect()
}

/// The mappings in the text of `/proc/PID/smaps`, ascending: `proc_pid_smaps(5)`.
fn mappings(text: impl BufRead) -> io::Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = mappings.last_mut() {
                // A device's memory, of several kinds; pages that userfaultfd brings when they are missing, or minor.
                last.opaque |=
                    flags.split_ascii_whitespace().any(|flag| matches!(flag, "io" | "pf" | "mm" | "um" | "ui"));
            }
        } else if let Some(mapping) = Mapping::parse(&line) {
            mappings.push(mapping);
        }
    }
    Ok(mappings)
}

impl Mapping {
    /// The first of a mapping's lines; None for any other.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let addresses = hex(start)?..hex(end)?;
        let shared = words.next()?.as_bytes().get(3) == Some(&b's');
        let file_offset = hex(words.next()?)?;
        let (major, minor) = words.next()?.split_once(':')?;
        let number = |text: &str| u32::from_str_radix(text, 16).ok();
        let device = rustix::fs::makedev(number(major)?, number(minor)?);
        let inode = words.next()?.parse().ok()?;
        let name = words.next().unwrap_or_default().to_owned();
        // The kernel's own, which no page map tells of.
        let opaque = name.starts_with("[v");
        Some(Self { addresses, shared, file_offset, device, inode, name, opaque })
    }

    /// Whether what is not there is zero.
    fn is_anonymous(&self) -> bool {
        !self.opaque && !self.shared && (self.inode == 0 || self.name.starts_with("/anon_hugepage"))
    }
}

impl ProcessRange {
    /// The pieces that hold some of a range of offsets, with the addresses they hold.
    fn held(&self, offsets: Range<u64>) -> impl Iterator<Item = (&Piece, Range<u64>)> {
        let (start, end) = (self.addresses.start + offsets.start, self.addresses.start + offsets.end);
        let first = self.pieces.partition_point(|piece| piece.addresses.end <= start);
        let pieces = self.pieces[first..].iter().take_while(move |piece| piece.addresses.start < end);
        pieces.map(move |piece| (piece, piece.addresses.start.max(start)..piece.addresses.end.min(end)))
    }
}

impl GuestMemorySource for ProcessRange {
    fn size(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    fn data_ranges(&self, within: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let base = self.addresses.start;
        for (piece, addresses) in self.held(within) {
            // Where the piece begins, in the region: what a file finds is told from there.
            let first = piece.addresses.start - base;
            let of_file = |file: &FileMemory, part: Range<u64>, found: &mut Vec<Range<u64>>| {
                let before = found.len();
                let start = piece.addresses.start;
                file.data_ranges(part.start - start..part.end - start, found)?;
                found[before..].iter_mut().for_each(|range| *range = first + range.start..first + range.end);
                io::Result::Ok(())
            };
            match &piece.held {
                Held::Shared(file) => of_file(file, addresses, found)?,
                Held::Anonymous => self.process.runs(addresses, |held, run| {
                    if held {
                        found.push(run.start - base..run.end - base);
                    }
                    Ok(())
                })?,
                Held::Private(file) => self.process.runs(addresses, |held, run| {
                    if held {
                        found.push(run.start - base..run.end - base);
                        return Ok(());
                    }
                    of_file(file, run, found)
                })?,
                Held::Opaque | Held::Nowhere => found.push(addresses.start - base..addresses.end - base),
            }
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let end = self.size().min(offset.saturating_add(buf.len() as u64));
        let Some((piece, addresses)) = self.held(offset..end).next() else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let in_buf = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(buf.len());
        let length = in_buf(&addresses);
        let start = piece.addresses.start;
        match &piece.held {
            Held::Anonymous | Held::Opaque => self.process.read(addresses.start, &mut buf[..length]),
            Held::Shared(file) => file.read_at(addresses.start - start, &mut buf[..length]),
            Held::Nowhere => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Held::Private(file) => {
                // The first run of pages that are the process' own, or of those that are not.
                let mut first = None;
                self.process.runs(addresses, |held, run| {
                    first.get_or_insert((held, run));
                    Ok(())
                })?;
                match first {
                    Some((true, run)) => {
                        let length = in_buf(&run);
                        self.process.read(run.start, &mut buf[..length])
                    }
                    Some((false, run)) => {
                        let length = in_buf(&run);
                        file.read_at(run.start - start, &mut buf[..length])
                    }
                    None => Err(io::ErrorKind::UnexpectedEof.into()),
                }
            }
        }
    }
}
