//! Which pages of a block are sent: those of the fragment, or those of guest memory.

use super::builder::{PAGE, Stream};
use crate::qemu::SentBlock;
use crate::{GuestRegion, MemoryOptions, SnapshotOptions, SnapshotReader};

/// A snapshot whose fragment contains pages of `pc.ram`, as vmsnap 0.1 wrote it with QEMU 8.1 and newer. Page 1 of
/// guest memory is 9, and the other two are zero.
fn with_pages() -> (tempfile::TempDir, SnapshotReader) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let writer = SnapshotOptions::new().create_in_place(&path).unwrap();
    let mut ram = vec![0; 3 * PAGE];
    ram[PAGE..2 * PAGE].fill(9);
    writer.write_memory(&[GuestRegion::new(0, ram)], &MemoryOptions::new()).unwrap();
    let state = Stream::begun(&[("pc.ram", 3 << 12), ("pc.bios", 1 << 12)])
        .page("pc.ram", 0, 1)
        .end_section()
        .part()
        .page("pc.bios", 0, 0xb0)
        .page("pc.ram", 1, 2)
        .next_zero(2)
        .end_section()
        .part()
        .next_page(2, 3)
        .end_section()
        .end()
        .page("pc.ram", 0, 4)
        .end_section()
        .devices()
        .described();
    writer.write_whole("device_state", &state.0, &mut || Ok(())).unwrap();
    (folder, SnapshotOptions::new().open(path).unwrap())
}

fn sent(reader: &SnapshotReader, block: SentBlock) -> Vec<u8> {
    let mut sent = Vec::new();
    reader.send_migration(&mut sent, &[block], "device_state").unwrap();
    sent
}

fn begun() -> Stream {
    Stream::begun(&[("pc.ram", 3 << 12), ("pc.bios", 1 << 12)])
}

#[test]
fn pages_of_a_replaced_block_come_from_guest_memory_only() {
    let (_folder, reader) = with_pages();
    let block = SentBlock::new("pc.ram").range(0, 0, 3 << 12).zeros(true).replaced(true);
    let expected = begun()
        .end_section()
        .part()
        .zero("pc.ram", 0)
        .next_page(1, 9)
        .next_zero(2)
        .end_section()
        .part()
        .page("pc.bios", 0, 0xb0)
        .end_section()
        .end()
        .end_section()
        .devices()
        .described();
    assert!(sent(&reader, block) == expected.0);
}

#[test]
fn a_replaced_block_without_ranges_is_sent_without_pages() {
    let (_folder, reader) = with_pages();
    let expected =
        begun().end_section().part().page("pc.bios", 0, 0xb0).end_section().end().end_section().devices().described();
    assert!(sent(&reader, SentBlock::new("pc.ram").replaced(true)) == expected.0);
}

#[test]
fn pages_of_a_block_that_is_not_replaced_stay_and_come_after_those_of_guest_memory() {
    let (_folder, reader) = with_pages();
    let block = SentBlock::new("pc.ram").range(0, 0, 2 << 12);
    let expected = begun()
        .page("pc.ram", 0, 1)
        .end_section()
        .part()
        .page("pc.ram", 1, 9)
        .end_section()
        .part()
        .page("pc.bios", 0, 0xb0)
        .page("pc.ram", 1, 2)
        .next_zero(2)
        .end_section()
        .part()
        .next_page(2, 3)
        .end_section()
        .end()
        .next_page(0, 4)
        .end_section()
        .devices()
        .described();
    assert!(sent(&reader, block) == expected.0);
}
