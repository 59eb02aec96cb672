//! [`PageIndex`]: the slot with the last copy of each page of an area of guest memory.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, Kind, Result};

/// The pages of a group, which has an entry in the map: one bit each.
const GROUP_LENGTH: usize = 64;
const GROUP_PAGES: u64 = GROUP_LENGTH as u64;

/// The pages of a group that have a slot. A slot is stored with one added.
type Slots = Box<[u32; GROUP_LENGTH]>;

/// Consecutive pages of which at least one was received.
#[derive(Default)]
struct Group {
    /// A bit for each page that was received.
    received: u64,
    /// 0 for a page without data. It is `None` in a group of zeros, for a stream needs only nine bytes for a page of zeros.
    slots: Option<Slots>,
}

/// An index that takes 4 bytes for a page, in groups of pages of which at least one was received. So its size depends
/// on the pages that were received, and not on the size of the area, which comes from a stream.
#[derive(Default)]
pub(super) struct PageIndex {
    groups: BTreeMap<u64, Group>,
}

impl PageIndex {
    /// Records that the last copy of a page is in a slot, which a number from [`check_slot`] names. Returns whether
    /// the page was received before.
    pub(super) fn set_slot(&mut self, page: u64, slot: u32) -> bool {
        let (group, place) = self.place(page);
        group.slots.get_or_insert_with(|| Box::new([0; _]))[place] = slot.saturating_add(1);
        group.receive(place)
    }

    /// Records that a page is zero. Returns whether the page was received before.
    pub(super) fn set_zero(&mut self, page: u64) -> bool {
        let (group, place) = self.place(page);
        if let Some(slots) = &mut group.slots {
            slots[place] = 0;
        }
        group.receive(place)
    }

    fn place(&mut self, page: u64) -> (&mut Group, usize) {
        let place = usize::try_from(page % GROUP_PAGES).unwrap_or_default();
        (self.groups.entry(page / GROUP_PAGES).or_default(), place)
    }

    /// Drops the groups without data, when all pages were received.
    pub(super) fn settle(&mut self) {
        self.groups.retain(|_, group| group.slots.iter().flat_map(|slots| slots.iter()).any(|slot| *slot > 0));
    }

    /// Iterates over the pages in `pages` that are not zero, each with its slot. After [`PageIndex::settle`], the first
    /// is found in a short time, however far it is.
    pub(super) fn data(&self, pages: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let groups = self.groups.range(pages.start / GROUP_PAGES..pages.end.div_ceil(GROUP_PAGES));
        let groups = groups.filter_map(|(number, group)| Some((number, group.slots.as_ref()?)));
        let slots = groups.flat_map(|(number, slots)| (number * GROUP_PAGES..).zip(slots.iter().copied()));
        let data = slots.filter(move |(page, slot)| *slot > 0 && pages.contains(page));
        data.map(|(page, slot)| (page, u64::from(slot - 1)))
    }
}

impl Group {
    /// Returns whether a page was received before.
    fn receive(&mut self, place: usize) -> bool {
        let bit = 1 << place;
        let before = self.received & bit != 0;
        self.received |= bit;
        before
    }
}

/// Returns the number of a slot for the index.
///
/// # Errors
///
/// `OutOfMemory` if there are too many slots: 2^32 pages of 4 KiB take 16 TiB.
pub(super) fn check_slot(slot: u64) -> Result<u32> {
    let slot = u32::try_from(slot).ok().filter(|slot| *slot < u32::MAX);
    slot.ok_or_else(|| {
        let text =
            "is full: it holds at most 16 TiB of pages that are not zero, with each copy of a page that came again";
        Error::new(Kind::OutOfMemory, text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_copy_of_each_page_is_found() {
        let mut index = PageIndex::default();
        assert!(!index.set_slot(70, 0));
        assert!(!index.set_zero(3));
        assert!(index.set_slot(3, 1));
        assert!(index.set_zero(70));
        assert!(index.set_slot(70, 2));
        assert!(!index.set_slot(1 << 50, 3));
        assert_eq!(index.data(0..u64::MAX).collect::<Vec<_>>(), [(3, 1), (70, 2), (1 << 50, 3)]);
        for (pages, expected) in [(0..3, 0), (3..4, 1), (4..70, 0), (4..71, 1), (71..71, 0), (0..64, 1)] {
            assert_eq!(index.data(pages.clone()).count(), expected, "{pages:?}");
        }
    }

    #[test]
    fn groups_without_data_are_dropped_when_it_is_settled() {
        let mut index = PageIndex::default();
        for page in (0..1 << 40).step_by(1 << 30) {
            index.set_zero(page);
        }
        index.set_slot(5, 9);
        assert_eq!(index.groups.len(), 1024);
        index.settle();
        assert_eq!(index.groups.len(), 1);
        assert_eq!(index.data(0..1 << 40).collect::<Vec<_>>(), [(5, 9)]);
    }

    #[test]
    fn as_many_slots_as_fit_into_the_index_are_allowed() {
        let last = u64::from(u32::MAX - 1);
        let mut index = PageIndex::default();
        index.set_slot(0, check_slot(last).unwrap());
        assert_eq!(index.data(0..1).next(), Some((0, last)));
        for slot in [last + 1, 1 << 32, u64::MAX] {
            let text = check_slot(slot).unwrap_err().to_string();
            assert!(text.contains("16 TiB"), "{text}");
        }
    }
}
