//! An encrypted fragment: one FLOE message, `docs/format.md` has its bytes.
//!
//! Segments have a fixed size, so a thread that has a chunk knows where its segment lies: it seals it into a buffer of its
//! own and writes it there, or reads it from there and opens it, and never meets the others.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use super::STRIP_BYTES;
use super::pieces::Pieces;
use crate::cipher::{
    HEADER_BYTES, Opener, Opening, SEGMENT_OVERHEAD_BYTES, Sealer, Sealing, SecretKey, check_declared_chunk_size,
    segment_offset, segment_size,
};
use crate::error::{Error, Kind, Result};
use crate::name::SnapshotPath;
use crate::threads::{Poll, for_each, lock};

/// Smaller writes are gathered up to this much (or a chunk for each thread), so that there is work for all threads.
const GATHER_BYTES: usize = 1 << 20;

/// Binds a fragment to its path: moved, swapped or renamed, it does not open.
fn aad(path: &SnapshotPath) -> Vec<u8> {
    [b"vmsnap/1/fragment\0", path.as_str().as_bytes()].concat()
}

/// Chunks that make a strip.
fn strip_chunks(chunk_size_bytes: usize) -> usize {
    (STRIP_BYTES / chunk_size_bytes).max(1)
}

pub(super) struct SealedSink {
    file: File,
    sealing: Sealing,
    chunk_size_bytes: usize,
    /// Plaintext not sealed yet, from the start of chunk `next_index`. Whether a chunk is the last shows only when more
    /// follows, so at least one byte always stays behind here.
    gathered: Vec<u8>,
    gather_bytes: usize,
    next_index: u64,
    threads: usize,
    workers: Vec<SealWorker>,
}

struct SealWorker {
    sealer: Sealer,
    segments: Vec<u8>,
}

impl SealedSink {
    pub(super) fn new(
        file: File,
        key: &SecretKey,
        path: &SnapshotPath,
        chunk_size_bytes: usize,
        threads: usize,
    ) -> Result<Self> {
        let (sealing, header) = Sealing::start(key, &aad(path), chunk_size_bytes)?;
        file.write_all_at(&header, 0).map_err(not_written)?;
        Ok(Self {
            file,
            sealing,
            chunk_size_bytes,
            gathered: Vec::new(),
            gather_bytes: GATHER_BYTES.div_ceil(chunk_size_bytes).max(threads) * chunk_size_bytes,
            next_index: 0,
            threads,
            workers: Vec::new(),
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }

    pub(super) fn written(&self) -> u64 {
        self.next_index * self.chunk_size_bytes as u64 + self.gathered.len() as u64
    }

    /// Takes a small write that there is room for.
    pub(super) fn gather(&mut self, data: &[u8]) -> bool {
        let fits = self.gathered.len() + data.len() <= self.gather_bytes;
        if fits {
            self.gathered.extend_from_slice(data);
        }
        fits
    }

    pub(super) fn write(&mut self, mut data: &[u8], poll: &mut Poll<'_>) -> Result<()> {
        if self.gather(data) {
            return Ok(());
        }
        let chunk_size_bytes = self.chunk_size_bytes;
        let missing = (chunk_size_bytes - self.gathered.len() % chunk_size_bytes) % chunk_size_bytes;
        let (completing, rest) = data.split_at(missing);
        self.gathered.extend_from_slice(completing);
        data = rest;

        let (body, tail) = data.split_at((data.len() - 1) / chunk_size_bytes * chunk_size_bytes);
        let mut gathered = std::mem::take(&mut self.gathered);
        self.seal_all([&gathered, body], poll)?;
        gathered.clear();
        gathered.extend_from_slice(tail);
        self.gathered = gathered;
        Ok(())
    }

    pub(super) fn finish(&mut self, poll: &mut Poll<'_>) -> Result<()> {
        let gathered = std::mem::take(&mut self.gathered);
        let (body, last) =
            gathered.split_at(gathered.len().saturating_sub(1) / self.chunk_size_bytes * self.chunk_size_bytes);
        self.seal_all([body, &[]], poll)?;
        let index = self.next_index;
        let offset = segment_offset(index, self.chunk_size_bytes);
        let worker = self.workers(1);
        worker[0].segments.resize(last.len() + SEGMENT_OVERHEAD_BYTES, 0);
        let SealWorker { sealer, segments } = &mut worker[0];
        sealer.seal_last(index, last, segments)?;
        self.file.write_all_at(&self.workers[0].segments, offset).map_err(not_written)
    }

    /// Seals the chunks of two buffers that follow each other, none of them the last, by all threads.
    fn seal_all(&mut self, [first, second]: [&[u8]; 2], poll: &mut Poll<'_>) -> Result<()> {
        let chunk_size_bytes = self.chunk_size_bytes;
        let strip_chunks = strip_chunks(chunk_size_bytes);
        let strip_bytes = strip_chunks * chunk_size_bytes;
        let first_strips = first.len().div_ceil(strip_bytes);
        let first_index = self.next_index;
        let second_index = first_index + (first.len() / chunk_size_bytes) as u64;

        let strips = (0..first_strips + second.len().div_ceil(strip_bytes)).map(|number| {
            let (buffer, base, number) = match number.checked_sub(first_strips) {
                None => (first, first_index, number),
                Some(number) => (second, second_index, number),
            };
            let start = number * strip_bytes;
            let end = buffer.len().min(start + strip_bytes);
            (base + (number * strip_chunks) as u64, &buffer[start..end])
        });
        let threads = self.threads.min(strips.len());
        self.workers(threads);
        let file = &self.file;
        for_each(&mut self.workers[..threads], strips, poll, |worker, (index, strip)| {
            let SealWorker { sealer, segments } = worker;
            let stored = strip.len() / chunk_size_bytes * segment_size(chunk_size_bytes);
            if segments.len() < stored {
                segments.resize(stored, 0);
            }
            let places = segments.chunks_exact_mut(segment_size(chunk_size_bytes));
            for ((index, chunk), segment) in (index..).zip(strip.chunks_exact(chunk_size_bytes)).zip(places) {
                sealer.seal(index, chunk, segment)?;
            }
            file.write_all_at(&segments[..stored], segment_offset(index, chunk_size_bytes)).map_err(not_written)
        })?;
        self.next_index = second_index + (second.len() / chunk_size_bytes) as u64;
        Ok(())
    }

    /// At least `count` workers, made on first need and kept: each has a cipher state and a buffer.
    fn workers(&mut self, count: usize) -> &mut [SealWorker] {
        while self.workers.len() < count {
            self.workers.push(SealWorker { sealer: self.sealing.sealer(), segments: Vec::new() });
        }
        &mut self.workers
    }
}

fn not_written(error: std::io::Error) -> Error {
    Error::io("cannot be written", error)
}

pub(super) struct SealedSource {
    file: File,
    opening: Opening,
    chunk_size_bytes: usize,
    /// Workers that no call uses now: a cipher state and buffers each.
    idle: Mutex<Vec<OpenWorker>>,
}

struct OpenWorker {
    opener: Opener,
    segments: Vec<u8>,
    chunk: Vec<u8>,
}

impl SealedSource {
    /// Verifies the header and the last segment, hence the length.
    pub(super) fn open(file: File, stored_size: u64, key: &SecretKey, path: &SnapshotPath) -> Result<Self> {
        let mut header = [0; HEADER_BYTES];
        if stored_size < (HEADER_BYTES + SEGMENT_OVERHEAD_BYTES) as u64 {
            return Err(Error::corrupt(format!(
                "has {stored_size} bytes, fewer than any encrypted fragment (truncated, or a plain file in an encrypted \
                 snapshot?)"
            )));
        }
        file.read_exact_at(&mut header, 0).map_err(not_read)?;
        check_declared_chunk_size(header)?;
        let opening = Opening::start(key, &aad(path), header, stored_size)?;
        let chunk_size_bytes = opening.chunk_size_bytes();
        let source = Self { file, opening, chunk_size_bytes, idle: Mutex::default() };
        let mut worker = source.worker();
        worker.load(&source, source.opening.last_index(), source.opening.last_index())?;
        worker.open_chunk(&source, source.opening.last_index(), 0)?;
        lock(&source.idle).push(worker);
        Ok(source)
    }

    pub(super) fn size(&self) -> u64 {
        self.opening.size()
    }

    pub(super) fn chunk_size_bytes(&self) -> usize {
        self.chunk_size_bytes
    }

    /// Fills `buf` from `offset`; both lie within the size. On an error the buffer's contents are for the caller to wipe.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8], threads: usize, poll: &mut Poll<'_>) -> Result<()> {
        let pieces = Pieces::new(offset, buf, strip_chunks(self.chunk_size_bytes) * self.chunk_size_bytes);
        let mut one = None;
        let mut many = Vec::new();
        let workers = match threads.min(pieces.len()) {
            0 => return Ok(()),
            1 => std::slice::from_mut(one.insert(self.worker())),
            count => {
                many.extend((0..count).map(|_| self.worker()));
                &mut many[..]
            }
        };
        let result = for_each(workers, pieces, poll, |worker, (offset, piece)| worker.read_piece(self, offset, piece));
        lock(&self.idle).extend(one.into_iter().chain(many));
        result
    }

    fn worker(&self) -> OpenWorker {
        let idle = lock(&self.idle).pop();
        idle.unwrap_or_else(|| OpenWorker { opener: self.opening.opener(), segments: Vec::new(), chunk: Vec::new() })
    }

    fn chunk_bytes(&self, index: u64) -> usize {
        if index == self.opening.last_index() { self.opening.last_chunk_bytes() } else { self.chunk_size_bytes }
    }

    /// Where segment `index` lies among those a worker has loaded, of which it is number `number`.
    fn loaded_segment(&self, index: u64, number: usize) -> std::ops::Range<usize> {
        let start = number * segment_size(self.chunk_size_bytes);
        start..start + self.chunk_bytes(index) + SEGMENT_OVERHEAD_BYTES
    }
}

impl OpenWorker {
    /// Reads the segments of a piece at once, and opens each into its place.
    fn read_piece(&mut self, source: &SealedSource, offset: u64, mut piece: &mut [u8]) -> Result<()> {
        let chunk_size = source.chunk_size_bytes as u64;
        let first_index = offset / chunk_size;
        self.load(source, first_index, (offset + piece.len() as u64 - 1) / chunk_size)?;
        let mut from = usize::try_from(offset % chunk_size).unwrap_or(0);
        for (number, index) in (first_index..).enumerate() {
            let chunk_bytes = source.chunk_bytes(index);
            let (place, rest) = piece.split_at_mut(piece.len().min(chunk_bytes - from));
            if place.len() == chunk_bytes {
                let segment = source.loaded_segment(index, number);
                self.opener.open(index, &self.segments[segment], place)?;
            } else {
                self.open_chunk(source, index, number)?;
                place.copy_from_slice(&self.chunk[from..from + place.len()]);
            }
            if rest.is_empty() {
                break;
            }
            piece = rest;
            from = 0;
        }
        Ok(())
    }

    /// Reads the segments `first..=last` from the file.
    fn load(&mut self, source: &SealedSource, first: u64, last: u64) -> Result<()> {
        let full = usize::try_from(last - first).unwrap_or(usize::MAX);
        let stored = full * segment_size(source.chunk_size_bytes) + source.chunk_bytes(last) + SEGMENT_OVERHEAD_BYTES;
        if self.segments.len() < stored {
            self.segments.resize(stored, 0);
        }
        let offset = segment_offset(first, source.chunk_size_bytes);
        source.file.read_exact_at(&mut self.segments[..stored], offset).map_err(not_read)
    }

    /// Opens segment `index` into the worker's own buffer.
    fn open_chunk(&mut self, source: &SealedSource, index: u64, number: usize) -> Result<()> {
        let segment = source.loaded_segment(index, number);
        self.chunk.resize(source.chunk_bytes(index), 0);
        self.opener.open(index, &self.segments[segment], &mut self.chunk)
    }
}

fn not_read(error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Error::with_source(Kind::Authentication, "became shorter while it was read", error)
        }
        _ => Error::io("cannot be read", error),
    }
}
