//! [`ProcessMemory`]: the memory of a live process.
//!
//! Memory that the process never touched is neither read nor made resident. The page map shows whether an anonymous
//! page exists, and pages of a file are read from the file.

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
use super::process_range::{HeldRange, PageHolder, ProcessRange};
use super::source::{GuestMemorySource, is_of_page};
use super::stop::StoppedProcess;
use crate::error::{Error, Result};
use crate::threads::lock;

/// An unmapped address that a file offset can express.
const NOWHERE: u64 = 0x7fff_ffff_ffff_0000;

/// The memory of a live process. [`ProcessMemory::range`] makes guest memory of a part of it.
///
/// The mappings are those at the time of [`ProcessMemory::open`]. The process is not stopped;
/// [`StoppedProcess`](crate::StoppedProcess) stops it, so that all memory is of one moment. If it is stopped when it is
/// opened, pages that the process itself would have to bring, as a handler of userfaultfd or as a FUSE server, cannot
/// be read.
#[derive(Clone, Debug)]
pub struct ProcessMemory {
    process: Arc<Process>,
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// `/proc/PID/mem` of this process: empty when the process has ended or runs another program.
    memory: File,
    pub(super) pages: PageMap,
    mappings: Vec<Mapping>,
    /// The page faults that must not be waited for, if the process was stopped when it was opened.
    serving: Serving,
    files: Mutex<Files>,
}

/// The mapped files, by device and inode. `None` for a file that cannot be opened.
#[derive(Debug, Default)]
struct Files {
    opened: HashMap<(u64, u64), Option<Arc<OpenFile>>>,
    /// The files that the process has open.
    descriptors: Option<HashMap<(u64, u64), PathBuf>>,
}

impl ProcessMemory {
    /// Opens the memory of the process with this PID.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no such process, or this user may not read its memory.
    pub fn open(pid: u32) -> Result<Self> {
        let failed = |error: io::Error| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => "there is no such process",
                io::ErrorKind::PermissionDenied => {
                    "no permission to read its memory: be root, or its owner where kernel.yama.ptrace_scope is 0"
                }
                _ => "its memory cannot be read",
            };
            Error::io(format!("process {pid}: {why}"), error)
        };
        let directory = PathBuf::from(format!("/proc/{pid}"));
        // Opened first, because it requires the permission to read the memory. The other files require less.
        let memory = File::open(directory.join("mem")).map_err(failed)?;
        let mappings = mappings(&directory).map_err(failed)?;
        let serving =
            if StoppedProcess::is_stopped(pid).map_err(failed)? { Serving::of(&directory) } else { Serving::default() };
        let pages = PageMap::open(&directory);
        let pid = i32::try_from(pid).map_err(|_| failed(io::ErrorKind::NotFound.into()))?;
        Ok(Self { process: Arc::new(Process { pid, memory, pages, mappings, serving, files: Mutex::default() }) })
    }

    /// Returns the PID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid.unsigned_abs()
    }

    /// Takes `size` bytes from the virtual address `address` on. Addresses in the range that are not mapped cannot be
    /// read.
    ///
    /// ```
    /// # let directory = tempfile::tempdir()?;
    /// # let writer = vmsnap::SnapshotWriter::new(directory.path().join("vm1"), false)?;
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
    /// [`Error::is_invalid_argument`] if nothing in the range is mapped, or `address` is not the first of a page.
    pub fn range(&self, address: u64, size: u64) -> Result<ProcessRange> {
        let process = &self.process;
        let refused = |why: &str| {
            let text = format!("process {}: {why} ({size} bytes from {address:#x})", process.pid);
            Err(Error::invalid_argument(text))
        };
        let Some(end) = address.checked_add(size) else {
            return refused("the range ends after the last address");
        };
        if !address.is_multiple_of(rustix::param::page_size() as u64) {
            return refused("the range does not begin at a page boundary");
        }
        let ranges = process.held_ranges(address..end);
        if size > 0 && ranges.iter().all(|range| matches!(range.holder, PageHolder::Nowhere)) {
            return refused("nothing is mapped in the range: /proc/PID/maps lists the mappings");
        }
        Ok(ProcessRange { process: Arc::clone(process), addresses: address..end, ranges })
    }
}

impl Process {
    fn held_ranges(&self, addresses: Range<u64>) -> Vec<HeldRange> {
        let (mut ranges, mut at) = (Vec::new(), addresses.start);
        let mut add = |to: u64, holder: PageHolder| {
            if to > at {
                ranges.push(HeldRange { addresses: at..to, holder });
                at = to;
            }
        };
        for mapping in &self.mappings {
            let start = mapping.addresses.start.max(addresses.start);
            let end = mapping.addresses.end.min(addresses.end);
            if start >= end {
                continue;
            }
            add(start, PageHolder::Nowhere);
            if self.serving.brings(mapping) {
                add(end, PageHolder::Awaited);
                continue;
            }
            let file = if mapping.opaque || !mapping.has_file() { None } else { self.file(mapping) };
            match file {
                Some(file) => {
                    let offset = mapping.file_offset + (start - mapping.addresses.start);
                    // A last page that the file fills only in part belongs to the mapping, and later pages to neither.
                    let pages = file.length().saturating_sub(offset) & !(rustix::param::page_size() as u64 - 1);
                    let part = FileMemory::within(file, offset, pages.min(end - start));
                    let file_end = start + part.size();
                    add(file_end, if mapping.shared { PageHolder::Shared(part) } else { PageHolder::Private(part) });
                    add(end, PageHolder::Opaque);
                }
                None if mapping.is_anonymous() => add(end, PageHolder::Anonymous),
                None => add(end, PageHolder::Opaque),
            }
        }
        add(addresses.end, PageHolder::Nowhere);
        ranges
    }

    /// Returns the file of a mapping, if it can be opened: through the link of the kernel, which requires root, or
    /// through a descriptor of the process.
    fn file(&self, mapping: &Mapping) -> Option<Arc<OpenFile>> {
        let files = &mut *lock(&self.files);
        let identity = mapping.identity;
        if let Some(file) = files.opened.get(&identity) {
            return file.clone();
        }
        let Range { start, end } = mapping.addresses;
        let direct = PathBuf::from(format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid));
        let descriptors = files.descriptors.get_or_insert_with(|| {
            let directory = PathBuf::from(format!("/proc/{}", self.pid));
            self.serving.descriptors(&directory)
        });
        let file = [Some(&direct), descriptors.get(&identity)].into_iter().flatten().find_map(|path| {
            // Only a regular file is opened: opening a pipe waits, and opening a device may have side effects.
            let is_it = |found: &fs::Metadata| found.is_file() && (found.dev(), found.ino()) == identity;
            fs::metadata(path).ok().filter(is_it)?;
            let file = File::open(path).ok()?;
            file.metadata().ok().filter(is_it)?;
            OpenFile::of(file, true).ok().flatten().map(Arc::new)
        });
        files.opened.insert(identity, file.clone());
        file
    }

    /// Calls `run` for each run of pages, with true if the process has them.
    pub(super) fn runs(
        &self,
        addresses: Range<u64>,
        run: impl FnMut(bool, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.looked(self.pages.runs(addresses, run))
    }

    /// Returns the first of the addresses at which the process has a page.
    pub(super) fn next(&self, addresses: Range<u64>) -> io::Result<Option<u64>> {
        self.looked(self.pages.next(addresses))
    }

    /// Returns the result of a search in the page map, if the process still exists.
    fn looked<T>(&self, found: io::Result<T>) -> io::Result<T> {
        self.check_alive()?;
        found.map_err(|error| self.refused("its page map cannot be read", error))
    }

    /// Reads from the memory of the process. A missing page is created by the read.
    pub(super) fn read(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        let result = match self.read_directly(address, buf) {
            Ok(count) => Ok(count),
            Err(error) if is_of_page(&error) => Err(error),
            // The call was refused (by a seccomp filter, for example), interrupted, or is impossible now. That is not a
            // property of the page.
            Err(first) => retry(|| self.read_file(address, buf)).map_err(|error| {
                let text = format!("process_vm_readv failed ({first}), and so did reading /proc/{}/mem", self.pid);
                if is_of_page(&error) { error } else { self.refused(&text, error) }
            }),
        };
        // Another process may have the PID by now, so check that it is still the right one.
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
        // SAFETY: the kernel writes only to `buf`, at most its length. The address belongs to another process and is
        // only a number here.
        let count = unsafe { libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(count) {
            Ok(0) => Err(unreadable()),
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn read_file(&self, address: u64, buf: &mut [u8]) -> io::Result<usize> {
        // The vsyscall page of the kernel is at an address that a file offset cannot express.
        if i64::try_from(address).is_err() {
            return Err(unreadable());
        }
        match self.memory.read_at(buf, address)? {
            0 => Err(gone()),
            count => Ok(count),
        }
    }

    /// Fails if the process has ended, or runs another program.
    fn check_alive(&self) -> io::Result<()> {
        match retry(|| self.memory.read_at(&mut [0], NOWHERE)) {
            Ok(0) => Err(gone()),
            // Nothing is mapped there, but the process exists.
            _ => Ok(()),
        }
    }

    /// Makes an error of a call that the system refused, which is not an error of a page.
    fn refused(&self, what: &str, error: io::Error) -> io::Error {
        Error::io(format!("process {}: {what}", self.pid), error).into()
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the process has ended, or runs another program")
}

pub(super) fn unreadable() -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}
