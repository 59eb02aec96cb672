//! The source of an encrypted fragment: one FLOE message. `docs/format.md` describes its bytes.
//!
//! Segments have a fixed size, so the offset of a segment follows from its index. Each thread reads its segments,
//! decrypts them into the caller's buffer, and never waits for the others.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::batches::{Batches, batch_bytes};
use crate::buffer;
use crate::cipher::{
    Decryption, Decryptor, HEADER_BYTES, HEADER_TAG_BYTES, SEGMENT_OVERHEAD_BYTES, SecretKey,
    check_declared_chunk_size, header_tag, segment_offset, segment_size,
};
use crate::error::{Error, Kind, Result};
use crate::manifest::{Entry, Proof};
use crate::store::bytes::ReadAt;
use crate::threads::{Interrupt, for_each, lock};

/// An idle fragment keeps at most this many workers, and none with a larger buffer.
const MAX_IDLE_WORKERS: usize = 8;
const MAX_IDLE_SEGMENT_BYTES: usize = 2 << 20;

pub(super) struct EncryptedSource {
    object: Arc<dyn ReadAt>,
    decryption: Decryption,
    header_tag: [u8; HEADER_TAG_BYTES],
    chunk_size_bytes: usize,
    /// Idle workers, each with a cipher state and buffers.
    idle: Mutex<Vec<DecryptionWorker>>,
}

struct DecryptionWorker {
    decryptor: Decryptor,
    segments: Vec<u8>,
    chunk: Vec<u8>,
}

impl EncryptedSource {
    /// Opens a message: verifies the header and the last segment, and so the length.
    ///
    /// `aad` is the one that it was encrypted with. `expected` is the entry in the manifest, if there is one. If the
    /// object is on another machine, the tag and the sizes in that entry, which is authentic, replace the last segment.
    pub(super) fn open(
        object: &Arc<dyn ReadAt>,
        key: &SecretKey,
        aad: &[u8],
        expected: Option<&Entry>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        match Self::open_once(object, key, aad, expected, interrupt) {
            Err(error)
                if (error.is_authentication() || error.is_corrupt()) && object.distrust(0..HEADER_BYTES as u64) =>
            {
                Self::open_once(object, key, aad, expected, interrupt)
            }
            opened => opened,
        }
    }

    fn open_once(
        object: &Arc<dyn ReadAt>,
        key: &SecretKey,
        aad: &[u8],
        expected: Option<&Entry>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        let object = Arc::clone(object);
        let stored_size = object.size();
        let mut header = [0; HEADER_BYTES];
        if stored_size < (HEADER_BYTES + SEGMENT_OVERHEAD_BYTES) as u64 {
            return Err(Error::corrupt(format!(
                "is {stored_size} bytes long, shorter than any encrypted fragment (is it truncated, or a plain file in \
                 an encrypted snapshot?)"
            )));
        }
        object.read_exact_at(&mut header, 0, interrupt).map_err(|error| not_read(&*object, error))?;
        check_declared_chunk_size(header)?;
        let header_tag = header_tag(&header);
        let differs = || Error::corrupt("differs from the manifest: it was changed or swapped");
        if let Some(Entry { proof: Proof::HeaderTag { tag, .. }, .. }) = expected
            && *tag != header_tag
        {
            return Err(differs());
        }
        let decryption = Decryption::start(key, aad, header, stored_size)?;
        let chunk_size_bytes = decryption.chunk_size_bytes();
        let source = Self { object, decryption, header_tag, chunk_size_bytes, idle: Mutex::default() };
        if let Some(entry) = expected.filter(|_| source.object.is_remote()) {
            return if entry.size == source.size() { Ok(source) } else { Err(differs()) };
        }
        let mut worker = source.worker();
        worker.load(&source, source.decryption.last_index(), source.decryption.last_index(), interrupt)?;
        worker.decrypt_chunk(&source, source.decryption.last_index(), 0)?;
        source.put_back([worker]);
        Ok(source)
    }

    pub(super) fn size(&self) -> u64 {
        self.decryption.size()
    }

    pub(super) fn header_tag(&self) -> [u8; HEADER_TAG_BYTES] {
        self.header_tag
    }

    pub(super) fn chunk_size_bytes(&self) -> usize {
        self.chunk_size_bytes
    }

    /// Says that the plaintext of a range is read soon, in order.
    pub(super) fn prefetch(&self, range: Range<u64>) {
        let chunk_size = self.chunk_size_bytes as u64;
        let start = segment_offset(range.start / chunk_size, self.chunk_size_bytes);
        let end = segment_offset(range.end.div_ceil(chunk_size), self.chunk_size_bytes);
        self.object.prefetch(start..end.min(self.object.size()));
    }

    /// Fills `buf` from `offset`; both must be within the size. After an error, the caller must wipe `buf`.
    pub(super) fn read(
        &self,
        offset: u64,
        buf: &mut [u8],
        threads: usize,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let batches = Batches::new(offset, buf, batch_bytes(self.chunk_size_bytes));
        let mut one = None;
        let mut many = Vec::new();
        let workers = match threads.min(batches.len()) {
            0 => return Ok(()),
            1 => std::slice::from_mut(one.insert(self.worker())),
            count => {
                many.extend((0..count).map(|_| self.worker()));
                &mut many[..]
            }
        };
        let result = for_each(workers, batches, interrupt, |worker, (offset, batch), interrupt| {
            worker.read_batch(self, offset, batch, interrupt)
        });
        self.put_back(one.into_iter().chain(many));
        result
    }

    fn worker(&self) -> DecryptionWorker {
        let idle = lock(&self.idle).pop();
        idle.unwrap_or_else(|| DecryptionWorker {
            decryptor: self.decryption.decryptor(),
            segments: Vec::new(),
            chunk: Vec::new(),
        })
    }

    /// Keeps a few workers with small buffers for the next calls.
    fn put_back(&self, workers: impl IntoIterator<Item = DecryptionWorker>) {
        let mut idle = lock(&self.idle);
        idle.extend(workers.into_iter().filter(|worker| worker.segments.len() <= MAX_IDLE_SEGMENT_BYTES));
        idle.truncate(MAX_IDLE_WORKERS);
    }

    /// Drops copies of the segments of a range that did not verify. Returns whether there were any.
    fn distrust(&self, offset: u64, length: usize) -> bool {
        let chunk_size = self.chunk_size_bytes as u64;
        let start = segment_offset(offset / chunk_size, self.chunk_size_bytes);
        let end = segment_offset((offset + length as u64).div_ceil(chunk_size), self.chunk_size_bytes);
        self.object.distrust(start..end.min(self.object.size()))
    }

    fn chunk_bytes(&self, index: u64) -> usize {
        if index == self.decryption.last_index() { self.decryption.last_chunk_bytes() } else { self.chunk_size_bytes }
    }

    /// The position in a worker's buffer of segment `index`, which is its segment number `number`.
    fn loaded_segment(&self, index: u64, number: usize) -> Range<usize> {
        let start = number * segment_size(self.chunk_size_bytes);
        start..start + self.chunk_bytes(index) + SEGMENT_OVERHEAD_BYTES
    }
}

impl DecryptionWorker {
    /// Reads the segments of a batch at once, and decrypts each to its position. If one does not verify, and came from
    /// a copy of the object, it is read once more.
    fn read_batch(
        &mut self,
        source: &EncryptedSource,
        offset: u64,
        batch: &mut [u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        match self.read_batch_once(source, offset, batch, interrupt) {
            Err(error) if error.is_authentication() && source.distrust(offset, batch.len()) => {
                self.read_batch_once(source, offset, batch, interrupt)
            }
            read => read,
        }
    }

    fn read_batch_once(
        &mut self,
        source: &EncryptedSource,
        offset: u64,
        mut batch: &mut [u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let chunk_size = source.chunk_size_bytes as u64;
        let first_index = offset / chunk_size;
        self.load(source, first_index, (offset + batch.len() as u64 - 1) / chunk_size, interrupt)?;
        let mut from = usize::try_from(offset % chunk_size).unwrap_or(0);
        for (number, index) in (first_index..).enumerate() {
            let chunk_bytes = source.chunk_bytes(index);
            let (place, rest) = batch.split_at_mut(batch.len().min(chunk_bytes - from));
            if place.len() == chunk_bytes {
                let segment = source.loaded_segment(index, number);
                self.decryptor.decrypt(index, &self.segments[segment], place)?;
            } else {
                self.decrypt_chunk(source, index, number)?;
                place.copy_from_slice(&self.chunk[from..from + place.len()]);
            }
            if rest.is_empty() {
                break;
            }
            batch = rest;
            from = 0;
        }
        Ok(())
    }

    /// Reads the segments `first..=last`.
    fn load(&mut self, source: &EncryptedSource, first: u64, last: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let full = usize::try_from(last - first).unwrap_or(usize::MAX);
        let stored = full * segment_size(source.chunk_size_bytes) + source.chunk_bytes(last) + SEGMENT_OVERHEAD_BYTES;
        buffer::at_least(&mut self.segments, stored)?;
        let offset = segment_offset(first, source.chunk_size_bytes);
        let object = &*source.object;
        object.read_exact_at(&mut self.segments[..stored], offset, interrupt).map_err(|error| not_read(object, error))
    }

    /// Decrypts segment `index` into the worker's own buffer.
    fn decrypt_chunk(&mut self, source: &EncryptedSource, index: u64, number: usize) -> Result<()> {
        let segment = source.loaded_segment(index, number);
        buffer::fit(&mut self.chunk, source.chunk_bytes(index))?;
        self.decryptor.decrypt(index, &self.segments[segment], &mut self.chunk)
    }
}

/// A file that became shorter does not verify any more. An object on another machine has its own errors.
fn not_read(object: &dyn ReadAt, error: Error) -> Error {
    if error.is_corrupt() && !object.is_remote() {
        Error::with_source(Kind::Authentication, error.to_string(), error)
    } else {
        error
    }
}
