//! Batches: the data that one thread works on at a time, and a buffer cut into batches.

/// The size of a batch, which one thread encrypts, decrypts, reads, writes or hashes at a time. It fits the
/// second-level cache of every common processor twice, and is large enough that a system call per batch costs almost
/// nothing.
pub(super) const BATCH_BYTES: usize = 256 << 10;

/// The size of a batch of whole chunks.
pub(super) fn batch_bytes(chunk_size_bytes: usize) -> usize {
    (BATCH_BYTES / chunk_size_bytes).max(1) * chunk_size_bytes
}

/// A buffer and its offset in the fragment, cut at multiples of `batch_bytes`.
pub(super) struct Batches<'a> {
    offset: u64,
    rest: &'a mut [u8],
    batch_bytes: usize,
}

impl<'a> Batches<'a> {
    pub(super) fn new(offset: u64, buf: &'a mut [u8], batch_bytes: usize) -> Self {
        Self { offset, rest: buf, batch_bytes }
    }

    /// The distance from the start of the batch to the offset.
    fn bytes_into_batch(&self) -> usize {
        usize::try_from(self.offset % self.batch_bytes as u64).unwrap_or(0)
    }
}

impl<'a> Iterator for Batches<'a> {
    type Item = (u64, &'a mut [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let length = (self.batch_bytes - self.bytes_into_batch()).min(self.rest.len());
        let (batch, rest) = std::mem::take(&mut self.rest).split_at_mut(length);
        let offset = self.offset;
        self.rest = rest;
        self.offset += length as u64;
        Some((offset, batch))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = if self.rest.is_empty() {
            0
        } else {
            (self.bytes_into_batch() + self.rest.len()).div_ceil(self.batch_bytes)
        };
        (count, Some(count))
    }
}

impl ExactSizeIterator for Batches<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_the_buffer_once_and_end_at_multiples() {
        for (offset, length) in [(0, 0), (0, 1), (3, 4), (3, 5), (3, 6), (4, 8), (7, 17)] {
            let mut buf = vec![0; length];
            let batches = Batches::new(offset, &mut buf, 4);
            let count = batches.len();
            let ranges: Vec<_> = batches.map(|(at, batch)| (at, at + batch.len() as u64)).collect();
            assert_eq!(ranges.len(), count);
            let mut end = offset;
            for (from, to) in ranges {
                assert_eq!(from, end);
                assert!(from < to && from / 4 == (to - 1) / 4);
                end = to;
            }
            assert_eq!(end, offset + length as u64);
        }
    }
}
