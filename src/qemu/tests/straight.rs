//! Guest memory that is written to the snapshot as it comes.

use super::builder::{BLOCKS, Stream, Trickle, live};
use super::{device_state, fills};
use crate::qemu::BlockRegion;
use crate::{SecretKey, SnapshotOptions, SnapshotWriter};

/// A guest that stands still: each page once, in the order of each block.
fn still() -> Stream {
    Stream::begun(&BLOCKS)
        .end_section()
        .part()
        .page("pc.ram", 0, 1)
        .next_zero(1)
        .next_page(2, 2)
        .next_page(3, 3)
        .next_zero(4)
        .end_section()
        .part()
        .page("pc.ram", 5, 4)
        .next_page(6, 0)
        .next_page(7, 5)
        .page("pc.bios", 0, 0xb0)
        .next_page(1, 0xb1)
        .page("/objects/hot", 2, 6)
        .end_section()
        .end()
        .end_section()
        .devices()
        .described()
}

/// Where the pages go. The block `pc.ram` is in two regions.
fn regions() -> [BlockRegion; 3] {
    [
        BlockRegion::new(1 << 32, "pc.ram", 0, 3 << 12),
        BlockRegion::new(2 << 32, "pc.ram", 3 << 12, 5 << 12),
        BlockRegion::new(3 << 32, "/objects/hot", 0, 4 << 12),
    ]
}

fn names(writer: &SnapshotWriter) -> Vec<String> {
    let entries = writer.location().read_dir().unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with("vmsnap") && !name.starts_with("enc"));
    names.sort_unstable();
    names
}

#[test]
fn a_guest_that_stands_still_is_written_as_it_comes() {
    for options in [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::generate().unwrap())] {
        for step in [1, 4095, 4096, 1 << 20] {
            let folder = tempfile::tempdir().unwrap();
            let mut staged = options.create(folder.path().join("vm")).unwrap();
            let stream = still();
            let input = &mut Trickle(&stream.0, step, false);
            let received = staged.writer().receive_migration(input, None, &regions(), "device_state").unwrap();
            let report = received.written().unwrap();
            assert_eq!((report.logical_bytes, report.data_bytes, report.ranges), (12 << 12, 6 << 12, 6));
            assert!(report.unreadable.is_empty());
            assert_eq!((received.page_bytes(), received.repeated_bytes()), (9 << 12, 0));
            let refused = received.memory("pc.ram", 0, 4096).map(drop).unwrap_err();
            assert!(refused.is_state() && refused.to_string().contains("as it came"), "{refused}");
            let stored = ["mem", "mem_metadata"].map(|name| staged.writer().location().join(name));
            let stored = stored.map(|path| path.metadata().unwrap().len());
            assert_eq!(stored.iter().sum::<u64>(), report.stored_bytes);
            staged.commit().unwrap();
            assert!(options.verify(folder.path().join("vm")).unwrap().is_ok());
            let reader = options.open(folder.path().join("vm")).unwrap();
            assert_eq!(fills(&reader, 1 << 32, 3), [1, 0, 2]);
            assert_eq!(fills(&reader, 2 << 32, 5), [3, 0, 4, 0, 5]);
            assert_eq!(fills(&reader, 3 << 32, 4), [0, 0, 6, 0]);
            let expected = Stream::begun(&BLOCKS)
                .end_section()
                .part()
                .page("pc.bios", 0, 0xb0)
                .next_page(1, 0xb1)
                .end_section()
                .end()
                .end_section()
                .devices()
                .described();
            assert!(device_state(&reader) == expected.0);
        }
    }
}

#[test]
fn guest_memory_that_cannot_be_written_as_it_comes_is_kept() {
    let [low, high, hot] = regions();
    let cases: [(Stream, Vec<BlockRegion>); 7] = [
        (live(), regions().to_vec()),
        (still(), vec![hot.clone(), low.clone(), high.clone()]),
        // A page is in no region; a block is too short, is not in the stream, or is not guest memory.
        (still(), vec![low.clone(), high.clone()]),
        (still(), vec![low.clone(), BlockRegion::new(2 << 32, "pc.ram", 3 << 12, 6 << 12), hot.clone()]),
        (still(), vec![low.clone(), high.clone(), hot.clone(), BlockRegion::new(4 << 32, "mem", 0, 1 << 12)]),
        (still(), vec![low.clone(), high.clone(), hot.clone(), BlockRegion::new(4 << 32, "pc.bios", 0, 1 << 12)]),
        // Two regions show the same pages.
        (still(), vec![low, high, hot, BlockRegion::new(4 << 32, "pc.ram", 2 << 12, 2 << 12)]),
    ];
    for (number, (stream, regions)) in cases.iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let staged = SnapshotOptions::new().create(folder.path().join("vm")).unwrap();
        let received = staged.writer().receive_migration(&mut &stream.0[..], None, regions, "device_state").unwrap();
        assert!(received.written().is_none(), "{number}");
        assert_eq!(names(staged.writer()), ["device_state"], "{number}");
        let mut page = [9; 4096];
        let memory = received.memory("pc.ram", 3 << 12, 5 << 12).unwrap();
        crate::GuestMemorySource::read_at(&memory, 0, &mut page).unwrap();
        assert!(page == [if number == 0 { 5 } else { 3 }; 4096], "{number}");
    }
}

#[test]
fn memory_that_qemu_left_out_is_not_written_as_zeros() {
    let stream = Stream::new()
        .configured()
        .subsection("configuration/capabilities")
        .u32(1)
        .name("x-ignore-shared")
        .start("ram")
        .u64(2 << 12 | 4)
        .name("mem")
        .u64(1 << 12)
        .u64(0x10_0000)
        .name("hot")
        .u64(1 << 12)
        .u64(0x20_0000)
        .end_section()
        .end()
        .page("hot", 0, 1)
        .end_section()
        .devices()
        .described();
    let folder = tempfile::tempdir().unwrap();
    let staged = SnapshotOptions::new().create(folder.path().join("vm")).unwrap();
    let regions = [BlockRegion::new(0, "mem", 0, 1 << 12), BlockRegion::new(1 << 32, "hot", 0, 1 << 12)];
    let received = staged.writer().receive_migration(&mut &stream.0[..], None, &regions, "device_state").unwrap();
    assert!(received.written().is_none());
    assert_eq!(names(staged.writer()), ["device_state"]);
}

#[test]
fn after_an_error_the_fragments_do_not_exist() {
    let folder = tempfile::tempdir().unwrap();
    let staged = SnapshotOptions::new().create(folder.path().join("vm")).unwrap();
    let writer = staged.writer();
    let receive =
        |stream: &[u8]| writer.receive_migration(&mut &stream[..], None, &regions(), "device_state").map(drop);
    let whole = still();
    for stream in [&whole.0[..whole.0.len() - 1], &whole.0[..30_000], &whole.0[..5000]] {
        assert!(receive(stream).unwrap_err().is_corrupt());
        assert!(names(writer).is_empty());
    }
    for name in ["mem", "mem_metadata", "device_state"] {
        writer.write_fragment(name, &1_u8).unwrap();
        assert_eq!(receive(&whole.0).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        assert_eq!(names(writer), [name]);
        std::fs::remove_file(writer.location().join(name)).unwrap();
    }
    // The progress ends it, at the first or at the last report.
    for end in [0, 12 << 12] {
        let stop = &mut |progress: crate::MemoryProgress| {
            if progress.done_bytes >= end { Err(crate::Error::interrupted()) } else { Ok(()) }
        };
        let trickle = &mut Trickle(&whole.0, 100, false);
        let error = writer.receive_migration_interruptible(trickle, None, &regions(), "device_state", stop);
        assert!(error.unwrap_err().is_interrupted());
        assert!(names(writer).is_empty());
    }
}
