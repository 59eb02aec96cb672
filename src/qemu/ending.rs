//! [`Ending`]: whether a stream was truncated. The sections of devices have no lengths, so this is read off the end.

use super::format::section::{END_OF_STREAM, FOOTER, VMDESCRIPTION};

/// Places that look like the beginning of a description of the machine. Honest streams have one or two.
const MAX_CANDIDATES: usize = 64;

/// A complete stream ends in one of two ways:
///
/// ```text
/// 0 | 6 | u32 length | JSON     a description of the machine
/// 0                             without one (the machine's option suppress-vmdesc)
/// ```
pub(super) struct Ending {
    /// The last 8 bytes.
    window: u64,
    seen: u64,
    /// Where each description that may have begun ends.
    candidates: Vec<u64>,
    has_footers: bool,
}

impl Ending {
    pub(super) fn new(has_footers: bool) -> Self {
        Self { window: u64::MAX, seen: 0, candidates: Vec::new(), has_footers }
    }

    pub(super) fn pass(&mut self, bytes: &[u8]) {
        const MASK: u64 = 0x00ff_ff00_0000_00ff;
        const BEGINNING: u64 = u64::from_be_bytes([0, END_OF_STREAM, VMDESCRIPTION, 0, 0, 0, 0, b'{']);
        for byte in bytes {
            self.window = self.window << 8 | u64::from(*byte);
            if self.window & MASK == BEGINNING {
                let length = self.window >> 8 & u64::from(u32::MAX);
                self.add(self.seen + length);
            }
            self.seen += 1;
        }
    }

    fn add(&mut self, end: u64) {
        self.candidates.retain(|end| *end > self.seen);
        if self.candidates.len() == MAX_CANDIDATES {
            self.candidates.remove(0);
        }
        self.candidates.push(end);
    }

    pub(super) fn is_complete(&self) -> bool {
        let [_, _, footer, .., last] = self.window.to_be_bytes();
        match last {
            b'}' => self.candidates.contains(&self.seen),
            // Zeros are frequent, but the last section ends with a footer.
            END_OF_STREAM => self.seen == 1 || !self.has_footers || footer == FOOTER,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_complete(bytes: &[u8], has_footers: bool) -> bool {
        let mut ending = Ending::new(has_footers);
        bytes.chunks(3).for_each(|part| ending.pass(part));
        ending.is_complete()
    }

    #[test]
    fn a_description_is_the_end_of_a_stream() {
        let described = b"\x04device\x00\x06\x00\x00\x00\x07{\"a\":1}";
        assert!(is_complete(described, true));
        for length in 0..described.len() {
            assert!(!is_complete(&described[..length], true), "{length}");
        }
        let mut longer = described.to_vec();
        longer.push(b'}');
        assert!(!is_complete(&longer, true));
    }

    #[test]
    fn without_a_description_a_footer_and_the_end_byte_are_the_end() {
        assert!(is_complete(b"\x04device\x7e\x00\x00\x00\x05\x00", true));
        assert!(!is_complete(b"\x04device\x00\x00\x00\x05\x00", true));
        assert!(is_complete(b"\x04device\x00\x00\x00\x05\x00", false));
        assert!(is_complete(b"\x00", true));
        assert!(!is_complete(b"", false));
    }

    #[test]
    fn many_false_beginnings_take_little_memory() {
        let mut ending = Ending::new(true);
        (0..10_000).for_each(|_| ending.pass(b"\x00\x06\x7f\xff\xff\xff{"));
        assert_eq!(ending.candidates.len(), MAX_CANDIDATES);
        ending.pass(b"\x00\x06\x00\x00\x00\x02{}");
        assert!(ending.is_complete());
    }
}
