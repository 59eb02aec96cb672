//! A buffer cut into what one thread reads at a time.

/// A buffer and its place in the fragment, cut where `strip_bytes` divides the offset.
pub(super) struct Pieces<'a> {
    offset: u64,
    rest: &'a mut [u8],
    strip_bytes: usize,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(offset: u64, buf: &'a mut [u8], strip_bytes: usize) -> Self {
        Self { offset, rest: buf, strip_bytes }
    }

    /// Bytes of the offset's strip that lie before it; less than a strip.
    fn bytes_into_strip(&self) -> usize {
        usize::try_from(self.offset % self.strip_bytes as u64).unwrap_or(0)
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = (u64, &'a mut [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let length = (self.strip_bytes - self.bytes_into_strip()).min(self.rest.len());
        let (piece, rest) = std::mem::take(&mut self.rest).split_at_mut(length);
        let offset = self.offset;
        self.rest = rest;
        self.offset += length as u64;
        Some((offset, piece))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = if self.rest.is_empty() {
            0
        } else {
            (self.bytes_into_strip() + self.rest.len()).div_ceil(self.strip_bytes)
        };
        (count, Some(count))
    }
}

impl ExactSizeIterator for Pieces<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_buffer_once_and_end_at_strips() {
        for (offset, length) in [(0, 0), (0, 1), (3, 4), (3, 5), (3, 6), (4, 8), (7, 17)] {
            let mut buf = vec![0; length];
            let pieces = Pieces::new(offset, &mut buf, 4);
            let count = pieces.len();
            let ranges: Vec<_> = pieces.map(|(at, piece)| (at, at + piece.len() as u64)).collect();
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
