//! BLAKE3 of a plain fragment, computed while it is written or read.
//!
//! BLAKE3 is a tree: an aligned run of bytes whose length is a power of two is a subtree. Threads hash subtrees in any
//! order, and the merged digest is the one that `b3sum` prints.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use super::batches::BATCH_BYTES;
use crate::buffer;
use crate::error::Result;
use crate::threads::{Interrupt, for_each};

/// The size of a subtree that is hashed at a time; it divides the subtree's offset. Larger subtrees are not faster.
pub(super) const SUBTREE_BYTES: usize = 64 << 10;

/// The digest of a subtree.
pub(super) type Subtree = ChainingValue;

/// The digest of all bytes so far, in order.
#[derive(Default)]
pub(crate) struct Digest {
    /// Digests of merged subtrees, larger ones first. The last merge, which may make the root, is left to `finish`.
    merged: Vec<ChainingValue>,
    /// The number of subtrees of [`SUBTREE_BYTES`] in them.
    count: u64,
    /// The current subtree.
    current: Hasher,
}

impl Digest {
    /// The number of bytes until the current subtree is complete.
    fn until_subtree_ends(&self) -> usize {
        SUBTREE_BYTES - self.bytes_in_subtree()
    }

    /// The index of the next subtree.
    pub(super) fn next_subtree(&self) -> u64 {
        self.count + u64::from(self.bytes_in_subtree() == SUBTREE_BYTES)
    }

    fn bytes_in_subtree(&self) -> usize {
        usize::try_from(self.current.count()).unwrap_or(SUBTREE_BYTES)
    }

    /// Adds the next bytes.
    pub(crate) fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.until_subtree_ends() == 0 {
                self.end_subtree();
            }
            let (now, later) = data.split_at(self.until_subtree_ends().min(data.len()));
            self.current.update(now);
            data = later;
        }
    }

    /// Adds the next subtrees, hashed by [`subtree`]. All are whole, except the last of the fragment, which may be short.
    /// Some other bytes must come before or after them.
    pub(super) fn push(&mut self, subtrees: impl IntoIterator<Item = ChainingValue>) {
        if self.until_subtree_ends() == 0 {
            self.end_subtree();
        }
        for subtree in subtrees {
            self.push_one(subtree);
        }
        self.current = Self::hasher_at(self.count);
    }

    /// Adds the next bytes with several threads; `also` is called for every batch of `data`, with its offset in `data`.
    pub(crate) fn update_with(
        &mut self,
        data: &[u8],
        threads: usize,
        interrupt: &mut Interrupt<'_>,
        also: impl Fn(usize, &[u8], &mut Interrupt<'_>) -> Result<()> + Sync,
    ) -> Result<()> {
        let (head, rest) = data.split_at((self.until_subtree_ends() % SUBTREE_BYTES).min(data.len()));
        // At least a byte is left for the end, because the last subtree must not be pushed.
        let (body, tail) = rest.split_at(rest.len().saturating_sub(1) / SUBTREE_BYTES * SUBTREE_BYTES);
        self.update(head);
        also(0, head, interrupt)?;
        let first = self.next_subtree();
        let batches = body.chunks(BATCH_BYTES);
        let mut workers: Vec<_> = (0..threads.min(batches.len())).map(|_| Vec::new()).collect();
        for_each(&mut workers, batches.enumerate(), interrupt, |done: &mut Vec<_>, (number, batch), interrupt| {
            also(head.len() + number * BATCH_BYTES, batch, interrupt)?;
            // After `also`, the batch is in the cache.
            let subtrees = batch.chunks(SUBTREE_BYTES).zip(first + (number * (BATCH_BYTES / SUBTREE_BYTES)) as u64..);
            buffer::reserve(done, BATCH_BYTES / SUBTREE_BYTES)?;
            done.extend(subtrees.map(|(bytes, index)| (index, subtree(index, bytes))));
            Ok(())
        })?;
        let mut subtrees = buffer::collect(workers.into_iter().flatten())?;
        subtrees.sort_unstable_by_key(|(index, _)| *index);
        if !subtrees.is_empty() {
            self.push(subtrees.into_iter().map(|(_, subtree)| subtree));
        }
        self.update(tail);
        also(head.len() + body.len(), tail, interrupt)
    }

    fn end_subtree(&mut self) {
        let subtree = self.current.finalize_non_root();
        self.push_one(subtree);
        self.current = Self::hasher_at(self.count);
    }

    fn push_one(&mut self, subtree: ChainingValue) {
        // As many merges as the count so far has zero bits at its end; the last merge is left for the root.
        let merges = if self.count == 0 { 0 } else { self.count.trailing_zeros() };
        (0..merges).for_each(|_| self.merge());
        self.merged.push(subtree);
        self.count += 1;
    }

    fn merge(&mut self) {
        if let (Some(right), Some(left)) = (self.merged.pop(), self.merged.pop()) {
            self.merged.push(merge_subtrees_non_root(&left, &right, Mode::Hash));
        }
    }

    fn hasher_at(index: u64) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(index * SUBTREE_BYTES as u64);
        hasher
    }

    pub(crate) fn finish(mut self) -> [u8; 32] {
        if self.merged.is_empty() {
            return *self.current.finalize().as_bytes();
        }
        if self.current.count() > 0 {
            self.end_subtree();
        }
        while self.merged.len() > 2 {
            self.merge();
        }
        match &self.merged[..] {
            [left, right] => *merge_subtrees_root(left, right, Mode::Hash).as_bytes(),
            // A single whole subtree is not pushed before more bytes come.
            _ => unreachable!("one subtree is never all there is"),
        }
    }
}

/// The digest of one subtree, which must not be the whole fragment; `index` counts subtrees from the start.
pub(super) fn subtree(index: u64, bytes: &[u8]) -> ChainingValue {
    Digest::hasher_at(index).update(bytes).finalize_non_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(length: usize) -> Vec<u8> {
        (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).take(length).collect()
    }

    #[test]
    fn in_order_it_is_the_digest_of_the_whole() {
        for subtrees in 0..10 {
            for extra in [0, 1, 1023, 1024, 1025, SUBTREE_BYTES - 1] {
                let data = data(subtrees * SUBTREE_BYTES + extra);
                for step in [1000, SUBTREE_BYTES, 3 * SUBTREE_BYTES + 5] {
                    let mut digest = Digest::default();
                    data.chunks(step).for_each(|bytes| digest.update(bytes));
                    assert_eq!(digest.finish(), *blake3::hash(&data).as_bytes(), "{} by {step}", data.len());
                }
            }
        }
    }

    #[test]
    fn with_subtrees_of_others_it_is_the_digest_of_the_whole() {
        for (before, subtrees, after) in [
            (0, 1, 1),
            (0, 2, 5),
            (1, 1, 1),
            (1, 4, SUBTREE_BYTES),
            (2, 5, 0),
            (3, 8, 2 * SUBTREE_BYTES + 7),
            (0, 7, 1),
        ] {
            let data = data((before + subtrees) * SUBTREE_BYTES + after);
            let mut digest = Digest::default();
            digest.update(&data[..before * SUBTREE_BYTES]);
            let first = digest.next_subtree();
            let body = &data[before * SUBTREE_BYTES..(before + subtrees) * SUBTREE_BYTES];
            digest.push((first..).zip(body.chunks(SUBTREE_BYTES)).map(|(index, bytes)| subtree(index, bytes)));
            digest.update(&data[(before + subtrees) * SUBTREE_BYTES..]);
            assert_eq!(digest.finish(), *blake3::hash(&data).as_bytes(), "{before} {subtrees} {after}");
        }
    }
}
