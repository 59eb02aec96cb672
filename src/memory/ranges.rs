//! Lists of data ranges: merges neighbours, and finds data between zeros.

use std::ops::Range;

use crate::zeros::{PAGE_BYTES, is_zero};

pub(super) fn page_end(offset: u64) -> u64 {
    (offset / PAGE_BYTES as u64 + 1) * PAGE_BYTES as u64
}

/// Appends a range to an ascending list, or extends the last range if the two touch.
pub(super) fn append(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Appends a range to an ascending list, or extends the last range if the gap between them is shorter than `min_gap`.
pub(super) fn append_near(ranges: &mut Vec<Range<u64>>, range: Range<u64>, min_gap: u64) {
    match ranges.last_mut() {
        Some(last) if range.start - last.end < min_gap => last.end = range.end,
        _ => append(ranges, range),
    }
}

/// Appends the ranges of pages in `data` that are not zero. `data` is at offset `start` of its region.
pub(super) fn find_data(data: &[u8], start: u64, min_gap: u64, ranges: &mut Vec<Range<u64>>) {
    let mut from = 0;
    while from < data.len() {
        let at = start + from as u64;
        let end = page_end(at).min(start + data.len() as u64);
        let to = usize::try_from(end - start).unwrap_or(0);
        if !is_zero(&data[from..to]) {
            append_near(ranges, at..end, min_gap);
        }
        from = to;
    }
}

/// Moves the pages of `data` that are not zero to its beginning, and appends their ranges. `data` is at offset `start`
/// of its region. Zeros between two ranges remain if they are shorter than `min_gap`. Returns the number of bytes that
/// are left.
pub(super) fn drop_zeros(data: &mut [u8], start: u64, min_gap: u64, ranges: &mut Vec<Range<u64>>) -> usize {
    let first = ranges.len().saturating_sub(1);
    find_data(data, start, min_gap, ranges);
    let mut kept = 0;
    for range in &ranges[first..] {
        let from = usize::try_from(range.start.max(start) - start).unwrap_or(0);
        let to = usize::try_from(range.end.max(start) - start).unwrap_or(0);
        if from != kept && to > from {
            data.copy_within(from..to, kept);
        }
        kept += to.saturating_sub(from);
    }
    kept
}

/// Returns the bytes of a range, or `None` if the range is empty or not in `bytes`.
pub(super) fn bytes_in<'a>(bytes: &'a [u8], range: &Range<u64>) -> Option<&'a [u8]> {
    let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
    bytes.get(start..end).filter(|bytes| !bytes.is_empty())
}
