//! Reads the fragment `mem` as one stream: the data of all ranges in order, whether stored as it is or compressed with
//! LZ4.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use super::lz4;
use super::metadata::{BlockIndex, Layout};
use crate::buffer;
use crate::error::{Error, Result};
use crate::fragment::FragmentReader;
use crate::threads::{Interrupt, lock};

/// A sequential read takes at least this many bytes at a time.
const READ_BATCH_BYTES: usize = 512 << 10;

/// A destination of at least this length is filled directly. A shorter one gets a copy out of a buffer.
const MIN_DIRECT_READ_BYTES: u64 = 128 << 10;

/// How many destinations [`Data::scatter`] looks at to find how much to read: as many as a batch has pages.
const MAX_PLACES_AHEAD: usize = READ_BATCH_BYTES / 4096;

/// Decrypted and decompressed blocks that are kept after a small read, because the next one is often close to it.
const MAX_CACHED_BLOCKS: usize = 16;

/// Blocks longer than this are not cached.
const MAX_CACHED_BLOCK_BYTES: usize = 1 << 20;

type CachedBlock = (u64, Arc<Vec<u8>>);

/// The stream of data in `mem`.
pub(super) struct Data {
    fragment: FragmentReader,
    size: u64,
    frame: Option<Frame>,
    /// The most recently used block is at the end.
    cache: Mutex<Vec<CachedBlock>>,
    /// Buffers of finished small reads, which later ones use again.
    idle: Mutex<Vec<ReadBuffers>>,
}

/// A compressed `mem`.
struct Frame {
    block_size: u64,
    /// Where the size word of each block begins, and last where the end mark begins. A snapshot without an index has
    /// them computed when they are first needed.
    offsets: OnceLock<Vec<u64>>,
}

/// The buffers with which one thread reads data.
#[derive(Default)]
pub(crate) struct ReadBuffers {
    stored: Vec<u8>,
    data: Vec<u8>,
    /// The range of the stream that is in `data`.
    holds: Range<u64>,
}

impl Data {
    pub(super) fn open(
        fragment: FragmentReader,
        layout: &Layout,
        compressed: bool,
        index: Option<BlockIndex>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        let size = layout.data_bytes;
        let frame = if compressed { Some(Frame::open(&fragment, index, interrupt)?) } else { None };
        match (&frame, fragment.size()) {
            (None, stored) if stored > size => Err(too_many(stored - size)),
            (None, stored) if stored < size => Err(too_few(size - stored)),
            _ => Ok(Self { fragment, size, frame, cache: Mutex::default(), idle: Mutex::default() }),
        }
    }

    /// Says that the data from `start` on is read soon, in order.
    pub(super) fn prefetch(&self, start: u64) {
        let start = match &self.frame {
            None => start,
            Some(frame) => {
                let offsets = frame.offsets.get().map_or(&[][..], Vec::as_slice);
                let Some(offset) = offsets.get(to_usize(start / frame.block_size)) else { return };
                *offset
            }
        };
        self.fragment.prefetch(start..self.fragment.size());
    }

    /// Sets whether reads leave the pages of `mem` out of the page cache.
    pub(super) fn set_uncached(&self, uncached: bool) {
        self.fragment.set_uncached(uncached);
    }

    /// Drops the pages that uncached reads left in the page cache.
    pub(super) fn drop_rest(&self) {
        self.fragment.drop_rest();
    }

    /// Returns the length of the LZ4 blocks, or else of the chunks. Data is read in whole ones, because a part takes as
    /// much time as all of it.
    fn block_bytes(&self) -> u64 {
        match &self.frame {
            Some(frame) => frame.block_size,
            None => self.fragment.chunk_size_bytes().unwrap_or(1) as u64,
        }
    }

    /// Passes the data from `start` to `end` to `take`, in order and in parts of any length.
    pub(super) fn read(
        &self,
        buffers: &mut ReadBuffers,
        mut start: u64,
        end: u64,
        interrupt: &mut Interrupt<'_>,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let block_bytes = self.block_bytes();
        let batch_bytes = (READ_BATCH_BYTES as u64 / block_bytes).max(1) * block_bytes;
        while start < end {
            let first = start - start % block_bytes;
            let last = (first + batch_bytes).min(end.next_multiple_of(block_bytes)).min(self.size);
            let data = self.read_blocks(buffers, first, last, interrupt)?;
            let from = usize::try_from(start - first).unwrap_or(usize::MAX);
            let to = usize::try_from(last.min(end) - first).unwrap_or(usize::MAX);
            take(&data[from..to])?;
            start = last;
        }
        Ok(())
    }

    /// Fills the slices of `places` one after the other with the data from `at` on, and calls `ready` before it writes
    /// to one. A long slice is read, decrypted or decompressed directly into its memory; a short one gets a copy.
    pub(super) fn scatter(
        &self,
        buffers: &mut ReadBuffers,
        mut at: u64,
        places: &mut [&mut [u8]],
        interrupt: &mut Interrupt<'_>,
        mut ready: impl FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let block_bytes = self.block_bytes();
        let batch_bytes = (READ_BATCH_BYTES as u64 / block_bytes).max(1) * block_bytes;
        let min_direct_bytes = block_bytes.max(MIN_DIRECT_READ_BYTES);
        let mut first = 0;
        while let Some(place) = places.get_mut(first) {
            let left = place.len() as u64;
            let whole = left.min(batch_bytes) / block_bytes * block_bytes;
            let length = if left == 0 {
                first += 1;
                continue;
            } else if left >= min_direct_bytes && at.is_multiple_of(block_bytes) {
                let now = place.split_off_mut(..to_usize(whole)).unwrap_or_default();
                ready(now)?;
                self.fill_blocks(&mut buffers.stored, at, now, interrupt)?;
                whole
            } else {
                if !buffers.holds.contains(&at) {
                    // Read up to the next slice that is filled directly.
                    let short = places[first..].iter().map(|place| place.len() as u64);
                    let wanted: u64 = match left {
                        left if left > min_direct_bytes + block_bytes => 1,
                        _ => short
                            .take_while(|length| *length <= min_direct_bytes + block_bytes)
                            .take(MAX_PLACES_AHEAD)
                            .sum(),
                    };
                    let start = at - at % block_bytes;
                    let end = (at + wanted).min(start + batch_bytes).next_multiple_of(block_bytes).min(self.size);
                    self.read_blocks(buffers, start, end, interrupt)?;
                }
                let place = &mut places[first];
                let length = left.min(buffers.holds.end - at);
                let now = place.split_off_mut(..to_usize(length)).unwrap_or_default();
                ready(now)?;
                let from = usize::try_from(at - buffers.holds.start).unwrap_or(usize::MAX);
                now.copy_from_slice(&buffers.data[from..from + now.len()]);
                length
            };
            at += length;
        }
        Ok(())
    }

    /// Fills `buf` with the data from `start` on, through the cache of blocks. Meant for a few bytes.
    pub(super) fn read_small(&self, start: u64, mut buf: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let block_bytes = self.block_bytes();
        if block_bytes == 1 {
            return self.fill(start, buf, interrupt);
        }
        if block_bytes > MAX_CACHED_BLOCK_BYTES as u64 {
            let mut done = 0;
            let end = start + buf.len() as u64;
            return self.read(&mut ReadBuffers::default(), start, end, interrupt, |data| {
                buf[done..done + data.len()].copy_from_slice(data);
                done += data.len();
                Ok(())
            });
        }
        let mut at = start;
        while !buf.is_empty() {
            let from = to_usize(at % block_bytes);
            let length = buf.len().min(to_usize(block_bytes) - from);
            let block = self.cached(at / block_bytes, from + length, interrupt)?;
            let (now, later) = std::mem::take(&mut buf).split_at_mut(length);
            now.copy_from_slice(&block[from..from + length]);
            buf = later;
            at += length as u64;
        }
        Ok(())
    }

    /// Returns at least the first `wanted` bytes of a block.
    fn cached(&self, index: u64, wanted: usize, interrupt: &mut Interrupt<'_>) -> Result<Arc<Vec<u8>>> {
        self.fragment.check_owner()?;
        let mut is_known = false;
        {
            let mut cache = lock(&self.cache);
            if let Some(at) = cache.iter().position(|(held, _)| *held == index) {
                let found = cache.remove(at);
                is_known = found.1.len() < wanted;
                if !is_known {
                    let block = Arc::clone(&found.1);
                    cache.push(found);
                    return Ok(block);
                }
            }
        }
        // The cache is not locked meanwhile, so other threads go on; at worst two of them read the same block. Buffers
        // are used again, because the pages of new ones would fault.
        let mut buffers = lock(&self.idle).pop().unwrap_or_default();
        let first = index * self.block_bytes();
        let mut length = to_usize(self.block_bytes().min(self.size - first));
        match &self.frame {
            // Half of a block on average. A second read beyond that part decompresses the whole block.
            Some(frame) if lz4::DECOMPRESSES_BEGINNINGS && !is_known => {
                length = wanted;
                buffer::at_least(&mut buffers.data, length)?;
                let ReadBuffers { stored, data, .. } = &mut buffers;
                frame.read_beginning(&self.fragment, self.size, first, stored, &mut data[..length], interrupt)?;
            }
            _ => drop(self.read_blocks(&mut buffers, first, first + length as u64, interrupt)?),
        }
        let mut data = std::mem::take(&mut buffers.data);
        data.truncate(length);
        buffers.holds = 0..0;
        let block = Arc::new(data);
        let mut cache = lock(&self.cache);
        if cache.len() == MAX_CACHED_BLOCKS {
            // Its buffer is used again, unless another thread copies from it at this moment.
            buffers.data = Arc::try_unwrap(cache.remove(0).1).unwrap_or_default();
        }
        cache.push((index, Arc::clone(&block)));
        drop(cache);
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_CACHED_BLOCKS {
            idle.push(buffers);
        }
        Ok(block)
    }

    /// Returns the data from `first` to `last`, which are both at the beginning of a block or at the end.
    fn read_blocks<'a>(
        &self,
        buffers: &'a mut ReadBuffers,
        first: u64,
        last: u64,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<&'a [u8]> {
        let length = usize::try_from(last - first).unwrap_or(usize::MAX);
        let ReadBuffers { stored, data, holds } = buffers;
        if *holds != (first..last) {
            *holds = 0..0;
            buffer::at_least(data, length)?;
            self.fill_blocks(stored, first, &mut data[..length], interrupt)?;
            *holds = first..last;
        }
        Ok(&data[..length])
    }

    /// Fills `buf` with whole blocks from `first` on.
    fn fill_blocks(
        &self,
        stored: &mut Vec<u8>,
        first: u64,
        buf: &mut [u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        match &self.frame {
            None => self.fill(first, buf, interrupt),
            Some(frame) => frame.read(&self.fragment, self.size, first, stored, buf, interrupt),
        }
    }

    fn fill(&self, offset: u64, buf: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        match self.fragment.read_at_alone(offset, buf, interrupt)? {
            read if read == buf.len() => Ok(()),
            read => Err(too_few((buf.len() - read) as u64)),
        }
    }
}

impl Frame {
    fn open(fragment: &FragmentReader, index: Option<BlockIndex>, interrupt: &mut Interrupt<'_>) -> Result<Self> {
        let mut header = [0; lz4::HEADER_BYTES];
        let read = fragment.read_at_alone(0, &mut header, interrupt)?;
        if read < header.len() {
            return Err(too_few((header.len() - read) as u64));
        }
        let block_size = lz4::block_size_of(header)? as u64;
        let offsets = OnceLock::new();
        if let Some(index) = index {
            if index.block_size != block_size {
                let text =
                    format!("the LZ4 frame has blocks of {block_size} bytes, but its index says {}", index.block_size);
                return Err(Error::corrupt(text));
            }
            let mut offset = lz4::HEADER_BYTES as u64;
            let found = std::iter::once(offset).chain(index.lengths().map(|length| {
                offset += lz4::SIZE_WORD_BYTES as u64 + u64::from(length);
                offset
            }));
            let found = buffer::collect(found)?;
            check_end(fragment, found.last().copied().unwrap_or(0), interrupt)?;
            let _ = offsets.set(found);
        }
        Ok(Self { block_size, offsets })
    }

    /// Returns where the blocks begin. A snapshot of crosvm does not have an index, so its size words are followed from
    /// the first to the last.
    fn offsets(&self, fragment: &FragmentReader, size: u64, interrupt: &mut Interrupt<'_>) -> Result<&[u64]> {
        if let Some(offsets) = self.offsets.get() {
            return Ok(offsets);
        }
        let mut offsets = Vec::new();
        let mut offset = lz4::HEADER_BYTES as u64;
        loop {
            buffer::reserve(&mut offsets, 1)?;
            offsets.push(offset);
            let mut word = [0; lz4::SIZE_WORD_BYTES];
            let read = fragment.read_at_alone(offset, &mut word, interrupt)?;
            if read < word.len() {
                return Err(too_few((word.len() - read) as u64));
            }
            let Some((length, _)) = lz4::stored_length(word) else { break };
            if offsets.len() as u64 > size.div_ceil(self.block_size) {
                return Err(Error::corrupt("too many bytes: there are more blocks than the data ranges need"));
            }
            offset += (word.len() + length) as u64;
        }
        if offsets.len() as u64 <= size.div_ceil(self.block_size) {
            return Err(Error::corrupt(
                "failed to fill whole buffer: there are fewer blocks than the data ranges need",
            ));
        }
        check_end(fragment, offset, interrupt)?;
        Ok(self.offsets.get_or_init(|| offsets))
    }

    /// Fills `data` with whole blocks from `first` on. Only the last one may be shorter.
    fn read(
        &self,
        fragment: &FragmentReader,
        size: u64,
        first: u64,
        stored: &mut Vec<u8>,
        data: &mut [u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let blocks = data.chunks_mut(to_usize(self.block_size));
        let (offsets, stored) = self.read_stored(fragment, size, first, blocks.len(), stored, interrupt)?;
        unpack_each(offsets, stored, blocks, lz4::unpack)
    }

    /// Fills `data` with the beginning of the block at `first`.
    fn read_beginning(
        &self,
        fragment: &FragmentReader,
        size: u64,
        first: u64,
        stored: &mut Vec<u8>,
        data: &mut [u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let (offsets, stored) = self.read_stored(fragment, size, first, 1, stored, interrupt)?;
        unpack_each(offsets, stored, std::iter::once(data), lz4::unpack_beginning)
    }

    /// Reads `count` blocks, the first of which is the one at `first`. Returns their offsets, the end of the last one,
    /// and their bytes.
    fn read_stored<'s>(
        &'s self,
        fragment: &FragmentReader,
        size: u64,
        first: u64,
        count: usize,
        stored: &'s mut Vec<u8>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<(&'s [u64], &'s [u8])> {
        let number = to_usize(first / self.block_size);
        let offsets = &self.offsets(fragment, size, interrupt)?[number..=number + count];
        let length = to_usize(offsets[count] - offsets[0]);
        if length > count * lz4::most_stored(to_usize(self.block_size)) {
            return Err(Error::corrupt("an LZ4 block is longer than its size allows"));
        }
        buffer::at_least(stored, length)?;
        let stored = &mut stored[..length];
        if fragment.read_at_alone(offsets[0], stored, interrupt)? < length {
            return Err(Error::corrupt("an LZ4 block extends past the end of the fragment"));
        }
        Ok((offsets, stored))
    }
}

/// Calls `unpack` for each slice of `outs` with the stored block that belongs to it. `offsets` has the offset of each
/// block and the end of the last one.
fn unpack_each<'a>(
    offsets: &[u64],
    mut stored: &[u8],
    outs: impl Iterator<Item = &'a mut [u8]>,
    unpack: impl Fn(&[u8], bool, &mut [u8]) -> Result<()>,
) -> Result<()> {
    for (out, at) in outs.zip(offsets.windows(2)) {
        let (block, others) = stored.split_at(to_usize(at[1] - at[0]));
        let (word, block) = block.split_at(lz4::SIZE_WORD_BYTES);
        match lz4::stored_length(word.try_into().unwrap_or_default()) {
            Some((length, raw)) if length == block.len() => unpack(block, raw, out)?,
            _ => return Err(Error::corrupt("the length of an LZ4 block differs from the one in the index")),
        }
        stored = others;
    }
    Ok(())
}

fn to_usize(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// Checks that the fragment ends with the end mark, whose bytes are not read from another machine.
fn check_end(fragment: &FragmentReader, end_mark: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
    let end = end_mark + lz4::END_MARK.len() as u64;
    match fragment.size() {
        stored if stored > end => Err(too_many(stored - end)),
        stored if stored < end => Err(too_few(end - stored)),
        _ if fragment.is_remote() => Ok(()),
        _ => {
            let mut mark = [1; lz4::END_MARK.len()];
            fragment.read_at_alone(end_mark, &mut mark, interrupt)?;
            if mark == lz4::END_MARK { Ok(()) } else { Err(Error::corrupt("the LZ4 frame has no end mark")) }
        }
    }
}

// Both texts begin with the words of crosvm's own errors, and add the number of bytes.
fn too_many(bytes: u64) -> Error {
    Error::corrupt(format!("too many bytes: {bytes} more than the data ranges need"))
}

fn too_few(bytes: u64) -> Error {
    Error::corrupt(format!("failed to fill whole buffer: {bytes} bytes fewer than the data ranges need"))
}
