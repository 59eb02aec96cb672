//! Tests for zeros.

/// The unit in which zeros and holes are found, which is independent of the page size of the guest.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Bytes that are combined before the next decision whether to go on.
const STEP_BYTES: usize = 256;

/// Whether all bytes are zero. Most pages with data show it in their first bytes. The compiler makes vector
/// instructions of the inner loop on every processor.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    let (steps, rest) = page.as_chunks::<STEP_BYTES>();
    steps.iter().all(|step| step.iter().fold(0, |bits, byte| bits | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_seen() {
        for length in [0, 1, STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1, PAGE_BYTES] {
            let mut page = vec![0; length];
            assert!(is_zero(&page));
            for at in 0..length {
                page[at] = 1 << (at % 8);
                assert!(!is_zero(&page), "{at} of {length}");
                page[at] = 0;
            }
        }
    }
}
