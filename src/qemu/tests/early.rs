//! Streams with the early state of a virtio-mem device.

use super::builder::Stream;
use super::{device_state, fills, received, refused};
use crate::qemu::SentBlock;
use crate::{SecretKey, SnapshotOptions};

/// The memory of the device: 128 units of 1 MiB, so two words of the bitmap.
const BLOCKS: [(&str, u64); 3] = [("pc.ram", 8 << 12), ("pc.bios", 1 << 12), ("/objects/hot", 128 << 20)];

fn begun() -> Stream {
    Stream::begun(&BLOCKS).end_section()
}

fn with_state() -> Stream {
    begun().early("0000:00:01.0/", 128 << 20, 1 << 20).footer(9)
}

fn whole() -> Stream {
    with_state()
        .part()
        .page("pc.ram", 1, 1)
        .page("/objects/hot", 2, 2)
        .page("pc.bios", 0, 0xb0)
        .end_section()
        .end()
        .end_section()
        .devices()
        .described()
}

/// The fragment with the rest of it.
fn thinned() -> Stream {
    with_state().part().page("pc.bios", 0, 0xb0).end_section().end().end_section().devices().described()
}

/// A short stream, for a fuzzer.
pub(super) fn seed() -> Stream {
    with_state().part().zero("/objects/hot", 2).end_section().end().end_section().devices().bytes(&[0])
}

#[test]
fn the_state_of_virtio_mem_stays_before_all_pages() {
    for options in [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::generate().unwrap())] {
        let (_folder, stream, reader) = received(&options, &mut &whole().0[..], None).unwrap();
        assert_eq!(stream.blocks()[2].records, 1);
        assert!(device_state(&reader) == thinned().0);
        let blocks = [
            SentBlock::new("pc.ram").range(0, 1 << 32, 2 << 12).range(2 << 12, 2 << 32, 6 << 12),
            SentBlock::new("/objects/hot").range(0, 3 << 32, 4 << 12),
        ];
        let mut sent = Vec::new();
        reader.send_migration(&mut sent, &blocks, "device_state").unwrap();
        // The pages are in a section after it.
        let before = with_state().part().0;
        assert!(sent[..before.len()] == before);

        let (_folder, _, again) = received(&options, &mut &sent[..], None).unwrap();
        assert!(device_state(&again) == thinned().0);
        assert_eq!(fills(&again, 1 << 32, 2), [0, 1]);
        assert_eq!(fills(&again, 3 << 32, 4), [0, 0, 2, 0]);
    }
}

#[test]
fn a_machine_may_have_several_virtio_mem_devices_and_no_footers() {
    let early = |stream: Stream| stream.early("a/", 128 << 20, 2 << 20).early("", 128 << 20, 1 << 20);
    let stream = early(Stream::begun(&BLOCKS).u64(0x10)).end().u64(0x10).bytes(&[0]);
    let (_folder, _, reader) = received(&SnapshotOptions::new(), &mut &stream.0[..], None).unwrap();
    assert!(device_state(&reader) == stream.0);
}

#[test]
fn early_state_that_is_not_understood_is_refused_by_name() {
    let headed = |name: &str, version: u32| begun().bytes(&[4]).u32(9).name(name).u32(0).u32(version);
    let early = |size: u64, unit: u64| begun().early("", size, unit).footer(9);
    let fits_no_block = "\"virtio-mem-device-early\" describes";
    let cases = [
        (headed("0000:00:02.0/vhost-early", 1), "\"0000:00:02.0/vhost-early\" comes before the end of section \"ram\""),
        (headed("virtio-mem-device-early/x", 1), "\"virtio-mem-device-early/x\" comes before the end"),
        (headed("x-virtio-mem-device-early", 1), "\"x-virtio-mem-device-early\" comes before the end"),
        (headed("virtio-mem-device-early", 2), "\"virtio-mem-device-early\" has version 2, and vmsnap reads version 1"),
        (headed("", 1), "the name of a section is empty"),
        (early(64 << 20, 1 << 20), fits_no_block),
        (early(1 << 63, 1 << 20), fits_no_block),
        (early(128 << 20, 0), fits_no_block),
        (early(128 << 20, 1 << 12), fits_no_block),
        (early(128 << 20, 3 << 20), fits_no_block),
        (early(128 << 20, 1 << 40), fits_no_block),
        (early(0, 1 << 20), fits_no_block),
        (begun().early("", 128 << 20, 1 << 20).footer(2), "\"virtio-mem-device-early\" does not end with its footer"),
        (begun().early("", 128 << 20, 1 << 20).bytes(&[5; 9]), "does not end with its footer"),
        (with_state().devices(), "the section \"timer\" comes before the end of section \"ram\""),
        (Stream::new().early("", 128 << 20, 1 << 20), "\"virtio-mem-device-early\" comes before the end"),
        (with_state().part().end_section().early("", 128 << 20, 1 << 20), "-early\" comes before the end of section"),
        (with_state().start("block"), "the section \"block\" is migrated in rounds"),
    ];
    for (stream, text) in cases {
        refused(&stream, text);
    }
    // The size of a hostile block does not make vmsnap read so much.
    let blocks = [("pc.ram", 8 << 12), ("0000:00:01.0/vm", 1 << 62)];
    refused(&Stream::begun(&blocks).end_section().early("", 1 << 62, 1 << 20).footer(9), fits_no_block);
}

#[test]
fn a_stream_that_ends_within_early_state_is_truncated() {
    let start = begun().0.len();
    let whole = with_state().0;
    for length in start + 1..=whole.len() {
        refused(&Stream(whole[..length].to_vec()), "truncated");
    }
}
