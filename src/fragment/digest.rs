//! BLAKE3 of a plain fragment, computed while it is written or read.
//!
//! BLAKE3 is a tree: aligned pieces of a power of two are subtrees, which threads hash in any order, and what is merged is
//! what `b3sum` prints.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use super::STRIP_BYTES;
use crate::buffer;
use crate::error::Result;
use crate::threads::{Interrupt, for_each};

/// What is hashed at a time, from an offset that it divides: as fast as larger pieces are.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// The digest of a piece.
pub(super) type Subtree = ChainingValue;

/// The digest of what has come so far, in order.
#[derive(Default)]
pub(crate) struct Digest {
    /// Subtrees of whole pieces, larger ones first, none merged that may be the root.
    subtrees: Vec<ChainingValue>,
    /// Whole pieces in them.
    pieces: u64,
    /// The piece that has begun.
    current: Hasher,
}

impl Digest {
    /// Bytes that lack until a piece is whole; a whole piece where none has begun.
    fn until_piece(&self) -> usize {
        PIECE_BYTES - self.bytes_in_piece()
    }

    /// The index of the next piece.
    pub(super) fn next_piece(&self) -> u64 {
        self.pieces + u64::from(self.bytes_in_piece() == PIECE_BYTES)
    }

    fn bytes_in_piece(&self) -> usize {
        usize::try_from(self.current.count()).unwrap_or(PIECE_BYTES)
    }

    /// Takes what comes next.
    pub(crate) fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.until_piece() == 0 {
                self.end_piece();
            }
            let (now, later) = data.split_at(self.until_piece().min(data.len()));
            self.current.update(now);
            data = later;
        }
    }

    /// Takes whole pieces that come next, hashed by [`subtree`]; more must follow, or [`Digest::update`] must have taken some.
    pub(super) fn push(&mut self, pieces: impl IntoIterator<Item = ChainingValue>) {
        if self.until_piece() == 0 {
            self.end_piece();
        }
        for piece in pieces {
            self.push_one(piece);
        }
        self.current = Self::hasher_at(self.pieces);
    }

    /// As [`Digest::update`], by several threads; `also` is called for every part of `data`, with its offset in it.
    pub(crate) fn update_with(
        &mut self,
        data: &[u8],
        threads: usize,
        interrupt: &mut Interrupt<'_>,
        also: impl Fn(usize, &[u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let (head, rest) = data.split_at((self.until_piece() % PIECE_BYTES).min(data.len()));
        // At least a byte is left for the end, which no subtree may be.
        let (body, tail) = rest.split_at(rest.len().saturating_sub(1) / PIECE_BYTES * PIECE_BYTES);
        self.update(head);
        also(0, head)?;
        let first = self.next_piece();
        let strips = body.chunks(STRIP_BYTES);
        let mut workers: Vec<_> = (0..threads.min(strips.len())).map(|_| Vec::new()).collect();
        for_each(&mut workers, strips.enumerate(), interrupt, |done: &mut Vec<_>, (number, strip)| {
            also(head.len() + number * STRIP_BYTES, strip)?;
            // Afterwards: it is in the cache now.
            let pieces = strip.chunks(PIECE_BYTES).zip(first + (number * (STRIP_BYTES / PIECE_BYTES)) as u64..);
            buffer::reserve(done, STRIP_BYTES / PIECE_BYTES)?;
            done.extend(pieces.map(|(piece, index)| (index, subtree(index, piece))));
            Ok(())
        })?;
        let mut subtrees = buffer::collect(workers.into_iter().flatten())?;
        subtrees.sort_unstable_by_key(|(index, _)| *index);
        if !subtrees.is_empty() {
            self.push(subtrees.into_iter().map(|(_, subtree)| subtree));
        }
        self.update(tail);
        also(head.len() + body.len(), tail)
    }

    fn end_piece(&mut self) {
        let piece = self.current.finalize_non_root();
        self.push_one(piece);
        self.current = Self::hasher_at(self.pieces);
    }

    fn push_one(&mut self, piece: ChainingValue) {
        // As many merges as the number of pieces so far has zeros at its end; the last merge is left for the root.
        let merges = if self.pieces == 0 { 0 } else { self.pieces.trailing_zeros() };
        (0..merges).for_each(|_| self.merge());
        self.subtrees.push(piece);
        self.pieces += 1;
    }

    fn merge(&mut self) {
        if let (Some(right), Some(left)) = (self.subtrees.pop(), self.subtrees.pop()) {
            self.subtrees.push(merge_subtrees_non_root(&left, &right, Mode::Hash));
        }
    }

    fn hasher_at(piece: u64) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.set_input_offset(piece * PIECE_BYTES as u64);
        hasher
    }

    pub(crate) fn finish(mut self) -> [u8; 32] {
        if self.subtrees.is_empty() {
            return *self.current.finalize().as_bytes();
        }
        if self.current.count() > 0 {
            self.end_piece();
        }
        while self.subtrees.len() > 2 {
            self.merge();
        }
        match &self.subtrees[..] {
            [left, right] => *merge_subtrees_root(left, right, Mode::Hash).as_bytes(),
            // A single whole piece is not pushed before more comes.
            _ => unreachable!("one subtree is never all there is"),
        }
    }
}

/// One whole piece that is not all there is; `index` counts pieces from the start.
pub(super) fn subtree(index: u64, piece: &[u8]) -> ChainingValue {
    Digest::hasher_at(index).update(piece).finalize_non_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(length: usize) -> Vec<u8> {
        (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).take(length).collect()
    }

    #[test]
    fn in_order_it_is_the_digest_of_the_whole() {
        for pieces in 0..10 {
            for extra in [0, 1, 1023, 1024, 1025, PIECE_BYTES - 1] {
                let data = data(pieces * PIECE_BYTES + extra);
                for step in [1000, PIECE_BYTES, 3 * PIECE_BYTES + 5] {
                    let mut digest = Digest::default();
                    data.chunks(step).for_each(|part| digest.update(part));
                    assert_eq!(digest.finish(), *blake3::hash(&data).as_bytes(), "{} by {step}", data.len());
                }
            }
        }
    }

    #[test]
    fn with_pieces_of_others_it_is_the_digest_of_the_whole() {
        for (before, pieces, after) in
            [(0, 1, 1), (0, 2, 5), (1, 1, 1), (1, 4, PIECE_BYTES), (2, 5, 0), (3, 8, 2 * PIECE_BYTES + 7), (0, 7, 1)]
        {
            let data = data((before + pieces) * PIECE_BYTES + after);
            let mut digest = Digest::default();
            digest.update(&data[..before * PIECE_BYTES]);
            let first = digest.next_piece();
            let body = &data[before * PIECE_BYTES..(before + pieces) * PIECE_BYTES];
            digest.push((first..).zip(body.chunks(PIECE_BYTES)).map(|(index, piece)| subtree(index, piece)));
            digest.update(&data[(before + pieces) * PIECE_BYTES..]);
            assert_eq!(digest.finish(), *blake3::hash(&data).as_bytes(), "{before} {pieces} {after}");
        }
    }
}
