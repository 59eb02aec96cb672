//! Guest memory as a monitor has it: a memfd and its mapping, populated where there is data.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

pub(crate) const PAGE: usize = 4096;

/// The same pseudorandom numbers in every run, not for secrets (xorshift64, Marsaglia 2003).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number from 0 to 1.
    pub(crate) fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A mapping with a single owner.
pub(crate) struct Mapping {
    start: *mut u8,
    bytes: usize,
}

impl Mapping {
    pub(crate) fn of(file: &File, bytes: usize) -> Self {
        // SAFETY: a new shared mapping at an address that the kernel chooses.
        let start =
            unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0) };
        Self { start: start.unwrap().cast(), bytes }
    }

    pub(crate) fn private(bytes: usize) -> Self {
        let (flags, rights) = (MapFlags::PRIVATE, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, rights, flags) };
        Self { start: start.unwrap().cast(), bytes }
    }

    pub(crate) fn slice(&self) -> &[u8] {
        // SAFETY: mapped for that many bytes. No other code writes meanwhile, because `slice_mut` borrows mutably.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped for that many bytes, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and no longer borrowed.
        unsafe { munmap(self.start.cast(), self.bytes).unwrap() };
    }
}

pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) bytes: usize,
    pub(crate) mapping: Mapping,
    /// The data ranges that `SEEK_DATA` reports.
    pub(crate) ranges: Vec<(usize, usize)>,
    pub(crate) data_bytes: usize,
}

impl Guest {
    /// Returns memory that was never used.
    pub(crate) fn fresh(bytes: usize) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes as u64).unwrap();
        let mapping = Mapping::of(&file, bytes);
        Self { file, bytes, mapping, ranges: Vec::new(), data_bytes: 0 }
    }

    pub(crate) fn filled(bytes: usize, fill: impl FnOnce(&mut [u8])) -> Self {
        let mut guest = Self::fresh(bytes);
        fill(guest.mapping.slice_mut());
        guest.ranges = ranges(&guest.file, bytes);
        guest.data_bytes = guest.ranges.iter().map(|(start, end)| end - start).sum();
        guest
    }

    /// Returns the memory in a raw image: its holes stay holes, and all other pages are written.
    pub(crate) fn of(image: &Path) -> Self {
        let source = File::open(image).unwrap();
        let bytes = usize::try_from(source.metadata().unwrap().len()).unwrap();
        Self::filled(bytes, |memory| {
            for (start, end) in ranges(&source, bytes) {
                source.read_exact_at(&mut memory[start..end], start as u64).unwrap();
            }
        })
    }

    pub(crate) fn memory(&self) -> &[u8] {
        self.mapping.slice()
    }

    /// Iterates over the data in slices of `batch_bytes`. A read of a hole through the mapping would fill it, so only
    /// data is read.
    pub(crate) fn data(&self, batch_bytes: usize) -> impl Iterator<Item = &[u8]> {
        self.ranges.iter().flat_map(move |(start, end)| self.memory()[*start..*end].chunks(batch_bytes))
    }

    pub(crate) fn is_data(&self, memory: &[u8]) -> bool {
        self.ranges.iter().all(|(start, end)| memory[*start..*end] == self.memory()[*start..*end])
    }

    /// Whether the data ranges of a file are all within the ranges of this guest.
    pub(crate) fn covers(&self, file: &File) -> bool {
        ranges(file, self.bytes).iter().all(|(start, end)| {
            let at = self.ranges.partition_point(|range| range.1 <= *start);
            self.ranges.get(at).is_some_and(|range| range.0 <= *start && *end <= range.1)
        })
    }
}

/// The shares of a guest that were never written, are zero, and are random. The rest is text-like.
struct Shares(f64, f64, f64);

/// 60 % never written, 10 % zero, 15 % random, 15 % text-like, in runs of `run` pages on average.
pub(crate) fn mixed(bytes: usize, run: usize) -> Guest {
    Guest::filled(bytes, |memory| fill(memory, run, &Shares(0.6, 0.1, 0.15)))
}

/// All pages written: 10 % zero, 45 % random, 45 % text-like, in runs of 64 pages on average.
pub(crate) fn full(bytes: usize) -> Guest {
    Guest::filled(bytes, |memory| fill(memory, 64, &Shares(0.0, 0.1, 0.45)))
}

fn fill(memory: &mut [u8], run: usize, Shares(untouched, zero, noise): &Shares) {
    let mut numbers = Numbers(42);
    // 2,000 words of 2 to 11 letters; words with small numbers are frequent.
    let words: Vec<Vec<u8>> = (0..2000)
        .map(|_| (0..2 + numbers.next() % 10).map(|_| b'a' + (numbers.next() % 26) as u8).chain([b' ']).collect())
        .collect();
    let mut page = 0;
    while page < memory.len() / PAGE {
        // Geometrically distributed, with the mean `run`.
        let length = if run == 1 { 1 } else { 1 + (-numbers.part().ln() * (run - 1) as f64) as usize };
        let end = (page + length).min(memory.len() / PAGE);
        let kind = numbers.part();
        for place in memory[page * PAGE..end * PAGE].chunks_mut(PAGE) {
            if kind < *untouched {
                break;
            } else if kind < untouched + zero {
                place.fill(0);
            } else if kind < untouched + zero + noise {
                place.chunks_mut(8).for_each(|word| word.copy_from_slice(&numbers.next().to_le_bytes()));
            } else {
                let mut filled = 0;
                while filled < PAGE {
                    let word = &words[(numbers.part().powi(3) * 2000.0) as usize];
                    let length = word.len().min(PAGE - filled);
                    place[filled..filled + length].copy_from_slice(&word[..length]);
                    filled += length;
                }
            }
        }
        page = end;
    }
}

/// Returns the data ranges of a file.
pub(crate) fn ranges(file: &File, bytes: usize) -> Vec<(usize, usize)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at as u64)) {
            Err(Errno::NXIO) => return ranges,
            start => start.unwrap() as usize,
        };
        let end = (seek(file, SeekFrom::Hole(start as u64)).unwrap() as usize).min(bytes);
        ranges.push((start, end));
        at = end;
    }
}
