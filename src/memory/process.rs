//! The memory of a live process as guest memory.
//!
//! What was never touched is neither read nor made resident: a page of a file is read from the file, and what the page map tells of
//! an anonymous page says whether there is one.

#![allow(unsafe_code, reason = "process_vm_readv is in no safe crate we have")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::file::{FileMemory, OpenFile};
use super::mappings::{Mapping, Serving, mappings};
use super::pagemap::{PageMap, retry};
use super::source::{GuestMemorySource, is_of_page};
use super::stop::StoppedProcess;
use crate::error::{Error, Result};
use crate::threads::lock;

/// An address at which nothing is mapped, that a file offset reaches.
const NOWHERE: u64 = 0x7fff_ffff_ffff_0000;

/// The memory of a live process; [`ProcessMemory::range`] makes guest memory of a part of it.
///
/// It is read as it was mapped when this was made. The process is not stopped: whoever wants one moment's memory stops it before,
/// as [`StoppedProcess`](crate::StoppedProcess) does. Of a process that is stopped then, pages that it would itself have to bring
/// (by userfaultfd, or as a FUSE server) cannot be read.
#[derive(Clone, Debug)]
pub struct ProcessMemory {
    process: Arc<Process>,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    /// Of this very process: empty when it has ended or runs another program.
    memory: File,
    pages: PageMap,
    mappings: Vec<Mapping>,
    /// What must not be waited for, since it stood still when this was made.
    serving: Serving,
    files: Mutex<Files>,
}

/// The files that are mapped, by device and inode; None for one that cannot be opened.
#[derive(Debug, Default)]
struct Files {
    opened: HashMap<(u64, u64), Option<Arc<OpenFile>>>,
    /// What the process has open.
    descriptors: Option<HashMap<(u64, u64), PathBuf>>,
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
        let memory = File::open(folder.join("mem")).map_err(failed)?;
        let mappings = mappings(&folder).map_err(failed)?;
        let serving =
            if StoppedProcess::is_stopped(pid).map_err(failed)? { Serving::of(&folder) } else { Serving::default() };
        let pages = PageMap::open(&folder);
        let pid = i32::try_from(pid).map_err(|_| failed(io::ErrorKind::NotFound.into()))?;
        Ok(Self { process: Arc::new(Process { pid, memory, pages, mappings, serving, files: Mutex::default() }) })
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
    /// The process, whose page faults and files nobody serves while it stands still: what is not there cannot be read.
    Awaited,
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
            if self.serving.brings(mapping) {
                add(end, Held::Awaited);
                continue;
            }
            let file = if mapping.opaque || !mapping.has_file() { None } else { self.file(mapping) };
            match file {
                Some(file) => {
                    let offset = mapping.file_offset + (start - mapping.addresses.start);
                    // The last page that the file does not fill is the mapping's, and what comes after it nobody's.
                    let pages = file.length().saturating_sub(offset) & !(rustix::param::page_size() as u64 - 1);
                    let part = FileMemory::part(file, offset, pages.min(end - start));
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
        let identity = mapping.identity;
        if let Some(file) = files.opened.get(&identity) {
            return file.clone();
        }
        let Range { start, end } = mapping.addresses;
        let direct = PathBuf::from(format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid));
        let descriptors = files.descriptors.get_or_insert_with(|| {
            let folder = PathBuf::from(format!("/proc/{}", self.pid));
            self.serving.descriptors(&folder)
        });
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

    /// Gives each run of pages, whether the process has them.
    fn runs(&self, addresses: Range<u64>, run: impl FnMut(bool, Range<u64>) -> io::Result<()>) -> io::Result<()> {
        self.looked(self.pages.runs(addresses, run))
    }

    /// The first of the addresses at which it has a page.
    fn next(&self, addresses: Range<u64>) -> io::Result<Option<u64>> {
        self.looked(self.pages.next(addresses))
    }

    /// What was found in the page map, if it was still the process that was meant.
    fn looked<T>(&self, found: io::Result<T>) -> io::Result<T> {
        self.check_alive()?;
        found.map_err(|error| self.refused("its page map cannot be read", error))
    }

    /// Reads from its memory; a page that is not there is made.
    fn read(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        let result = match self.read_directly(address, buf) {
            Ok(count) => Ok(count),
            Err(error) if is_of_page(&error) => Err(error),
            // The call is refused (by a seccomp filter, say), was interrupted, or cannot be done now: that says nothing of the page.
            Err(first) => retry(|| self.read_file(address, buf)).map_err(|error| {
                let text = format!("process_vm_readv failed ({first}), and so did reading /proc/{}/mem", self.pid);
                if is_of_page(&error) { error } else { self.refused(&text, error) }
            }),
        };
        // Whoever has the number now: it was still the process that was meant.
        self.check_alive()?;
        result.or_else(|error| {
            let end = address + buf.len() as u64;
            let guards = if is_of_page(&error) { self.pages.guards(address..end).unwrap_or(0) } else { 0 };
            match usize::try_from(guards) {
                Ok(0) | Err(_) => Err(error),
                Ok(guards) => {
                    buf[..guards].fill(0);
                    Ok(guards)
                }
            }
        })
    }

    fn read_directly(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let base = std::ptr::without_provenance_mut(usize::try_from(address).map_err(|_| unreadable())?);
        let remote = libc::iovec { iov_base: base, iov_len: buf.len() };
        // SAFETY: the kernel writes to `buf` alone, no more than its length; the address is another process' and only a number
        // here.
        let count = unsafe { libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(count) {
            Ok(0) => Err(unreadable()),
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn read_file(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        // The kernel's own page for system calls lies where no file offset reaches.
        if i64::try_from(address).is_err() {
            return Err(unreadable());
        }
        match self.memory.read_at(buf, address)? {
            0 => Err(gone()),
            count => Ok(count),
        }
    }

    /// Fails where the process has ended, or runs another program.
    fn check_alive(&self) -> io::Result<()> {
        match retry(|| self.memory.read_at(&mut [0], NOWHERE)) {
            Ok(0) => Err(gone()),
            // There is nothing to be read, but a process to be asked.
            _ => Ok(()),
        }
    }

    /// The error of a call that the system refused, which is not one of a page.
    fn refused(&self, what: &str, error: io::Error) -> io::Error {
        Error::io(format!("process {}: {what}", self.pid), error).into()
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the process has ended, or runs another program")
}

fn unreadable() -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}

fn awaited() -> io::Error {
    let text = "the page is not there, and the process that is to bring it (as the handler of its userfaultfd, or a FUSE \
                server) stands still: let it run meanwhile (--no-stop)";
    io::Error::new(io::ErrorKind::WouldBlock, text)
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
                Held::Opaque | Held::Awaited | Held::Nowhere => {
                    found.push(addresses.start - base..addresses.end - base)
                }
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let base = self.addresses.start;
        for (piece, addresses) in self.held(offset.min(self.size())..self.size()) {
            let start = piece.addresses.start;
            let of_file = |file: &FileMemory| {
                let next = file.next_data(addresses.start - start)?;
                io::Result::Ok(next.map(|next| start + next))
            };
            let next = match &piece.held {
                Held::Shared(file) => of_file(file)?,
                Held::Anonymous => self.process.next(addresses)?,
                Held::Private(file) => {
                    let of_file = of_file(file)?;
                    // No further than where the file has some.
                    let own = self.process.next(addresses.start..of_file.unwrap_or(addresses.end))?;
                    own.or(of_file)
                }
                Held::Opaque | Held::Awaited | Held::Nowhere => Some(addresses.start),
            };
            if let Some(next) = next {
                return Ok(Some(next - base));
            }
        }
        Ok(None)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let end = self.size().min(offset.saturating_add(buf.len() as u64));
        let Some((piece, addresses)) = self.held(offset..end).next() else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let in_buf = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(buf.len());
        let start = piece.addresses.start;
        // The first run of pages that are the process' own, or of those that are not.
        let first_run = |addresses: Range<u64>| {
            let mut first = None;
            self.process.runs(addresses, |held, run| {
                first.get_or_insert((held, run));
                Ok(())
            })?;
            first.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        match &piece.held {
            Held::Anonymous | Held::Opaque => {
                let length = in_buf(&addresses);
                self.process.read(addresses.start, &mut buf[..length])
            }
            Held::Shared(file) => {
                let length = in_buf(&addresses);
                file.read_at(addresses.start - start, &mut buf[..length])
            }
            Held::Nowhere => Err(unreadable()),
            Held::Private(file) => {
                let (held, run) = first_run(addresses)?;
                let length = in_buf(&run);
                if held {
                    self.process.read(run.start, &mut buf[..length])
                } else {
                    file.read_at(run.start - start, &mut buf[..length])
                }
            }
            // Without a page map, nobody knows what is there.
            Held::Awaited if !self.process.pages.tells() => Err(awaited()),
            Held::Awaited => {
                let (held, run) = first_run(addresses)?;
                let length = in_buf(&run);
                if held { self.process.read(run.start, &mut buf[..length]) } else { Err(awaited()) }
            }
        }
    }
}

impl ProcessRange {
    /// Fills the beginning of `buf` with what is at `offset`, up to the first page that cannot be read, and returns how much that
    /// is. What the process never touched is zeros, and stays untouched.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] where the process has ended, or the system refuses to have it read.
    pub fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let end = self.size().min(offset.saturating_add(buf.len() as u64));
        let most = buf.len();
        let in_buf = |at: u64| usize::try_from(at.saturating_sub(offset)).map_or(most, |at| at.min(most));
        let (mut found, mut done, length) = (Vec::new(), 0, in_buf(end));
        self.data_ranges(offset..end, &mut found).map_err(|error| self.failed(error))?;
        for (start, end) in found.iter().map(|data| (in_buf(data.start), in_buf(data.end))) {
            buf[done..start].fill(0);
            done = start;
            while done < end {
                match self.read_at(offset + done as u64, &mut buf[done..end]) {
                    Ok(count) => done += count,
                    Err(error) if is_of_page(&error) => return Ok(done),
                    Err(error) => return Err(self.failed(error)),
                }
            }
        }
        buf[done..length].fill(0);
        Ok(length)
    }

    /// The first of the offsets at which a page can be read, or their end. What the process never touched stays untouched.
    ///
    /// # Errors
    ///
    /// Those of [`ProcessRange::fill`].
    pub fn next_readable(&self, offsets: Range<u64>) -> Result<u64> {
        let base = self.addresses.start;
        for (piece, addresses) in self.held(offsets.clone()) {
            match &piece.held {
                Held::Nowhere => {}
                Held::Awaited if self.process.pages.tells() => {
                    if let Some(next) = self.process.next(addresses).map_err(|error| self.failed(error))? {
                        return Ok(next - base);
                    }
                }
                Held::Awaited => {}
                _ => {
                    for page in addresses.step_by(rustix::param::page_size()) {
                        if self.fill(page - base, &mut [0])? > 0 {
                            return Ok(page - base);
                        }
                    }
                }
            }
        }
        Ok(offsets.end)
    }

    fn failed(&self, error: io::Error) -> Error {
        match error.downcast() {
            Ok(own) => own,
            Err(error) => Error::io(format!("process {}: its memory cannot be read", self.process.pid), error),
        }
    }
}
