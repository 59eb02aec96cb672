//! Streams made by a builder, whole and damaged. QEMU's own are in `tests/test_migration_stream.py`.

mod builder;
mod early;
mod sent;
mod straight;

use std::io::{self, Read};

use self::builder::{BLOCKS, PAGE, Stream, Trickle, live, thinned};
use super::{MigrationStream, SentBlock};
use crate::error::Result;
use crate::{GuestRegion, MemoryOptions, SecretKey, SnapshotOptions, SnapshotReader};

fn received(
    options: &SnapshotOptions,
    stream: &mut dyn Read,
    blocks: Option<&[&str]>,
) -> Result<(tempfile::TempDir, MigrationStream, SnapshotReader)> {
    let folder = tempfile::tempdir().unwrap();
    let mut staged = options.create(folder.path().join("vm"))?;
    let writer = staged.writer();
    let received = writer.receive_migration(stream, blocks, &[], "device_state");
    if received.is_err() {
        // Nothing is left: the fragment can be written again.
        writer.raw_fragment("device_state").unwrap().discard().unwrap();
    }
    let received = received?;
    let regions = [("pc.ram", 0, 2 << 12), ("pc.ram", 2 << 12, 6 << 12), ("/objects/hot", 0, 4 << 12)];
    let mut base = 0;
    let regions: Vec<_> = regions
        .into_iter()
        .filter(|(name, ..)| received.blocks().iter().any(|block| block.name == *name && block.records > 0))
        .map(|(name, offset, size)| {
            base += 1 << 32;
            GuestRegion::new(base, received.memory(name, offset, size).unwrap())
        })
        .collect();
    writer.write_memory(&regions, &MemoryOptions::new().compress(true).min_gap_bytes(1 << 14))?;
    drop(regions);
    staged.commit()?;
    let reader = options.open(folder.path().join("vm"))?;
    Ok((folder, received, reader))
}

fn device_state(reader: &SnapshotReader) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.raw_fragment("device_state").unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn fills(reader: &SnapshotReader, base: u64, pages: usize) -> Vec<u8> {
    let mut bytes = vec![0; pages * PAGE];
    reader.memory().unwrap().read_at(base, &mut bytes).unwrap();
    bytes.chunks(PAGE).for_each(|page| assert!(page.iter().all(|byte| *byte == page[0])));
    bytes.into_iter().step_by(PAGE).collect()
}

#[test]
fn the_last_record_of_a_page_counts_and_the_rest_is_a_stream() {
    let options = SnapshotOptions::new();
    let (_folder, stream, reader) = received(&options, &mut &live().0[..], None).unwrap();
    assert_eq!(stream.machine_type(), Some("pc-q35-10"));
    assert!(!stream.ignores_shared());
    let blocks: Vec<_> =
        stream.blocks().iter().map(|block| (&*block.name, block.size_bytes, block.records, block.taken)).collect();
    let expected = [("pc.ram", 8 << 12, 8, true), ("pc.bios", 2 << 12, 3, false), ("/objects/hot", 4 << 12, 1, true)];
    assert_eq!(blocks, expected);
    assert_eq!((stream.page_bytes(), stream.repeated_bytes()), (9 << 12, 4 << 12));
    assert_eq!(stream.device_state_bytes(), thinned().0.len() as u64);
    assert!(device_state(&reader) == thinned().0);
    assert_eq!(fills(&reader, 1 << 32, 2), [0, 0]);
    assert_eq!(fills(&reader, 2 << 32, 6), [0, 5, 0, 0, 0, 0]);
    assert_eq!(fills(&reader, 3 << 32, 4), [0, 0, 0, 7]);
    let front = reader.migration_front("device_state").unwrap();
    assert_eq!(front.machine_type.as_deref(), Some("pc-q35-10"));
    assert!(front.blocks.iter().map(|(name, size)| (&**name, *size)).eq(BLOCKS));
}

#[test]
fn any_split_of_the_stream_gives_the_same() {
    let options = SnapshotOptions::new();
    for step in [1, 2, 7, 4095, 4096, 4097, 8200] {
        let stream = live();
        let (_folder, _, reader) = received(&options, &mut Trickle(&stream.0, step, false), None).unwrap();
        assert!(device_state(&reader) == thinned().0, "{step}");
        assert_eq!(fills(&reader, 2 << 32, 6), [0, 5, 0, 0, 0, 0]);
    }
}

#[test]
fn what_was_received_is_sent_and_received_again() {
    for options in [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::generate().unwrap())] {
        let (_folder, _, reader) = received(&options, &mut &live().0[..], None).unwrap();
        let blocks = [
            SentBlock::new("pc.ram").range(0, 1 << 32, 2 << 12).range(2 << 12, 2 << 32, 6 << 12).zeros(true),
            SentBlock::new("/objects/hot").sent_as("hot").range(0, 3 << 32, 4 << 12),
            SentBlock::new("pc.bios").sent_as("bios"),
        ];
        let mut sent = Vec::new();
        let count = reader.send_migration(&mut sent, &blocks, "device_state").unwrap();
        assert_eq!(count, sent.len() as u64);

        let (_folder, stream, again) = received(&options, &mut &sent[..], Some(&["pc.ram", "hot"])).unwrap();
        // The second one is renamed, so `received` does not know it.
        let records: Vec<_> = stream.blocks().iter().map(|block| (&*block.name, block.records)).collect();
        assert_eq!(records, [("pc.ram", 8), ("bios", 3), ("hot", 1)]);
        assert_eq!(fills(&again, 2 << 32, 6), [0, 5, 0, 0, 0, 0]);
        let renamed = device_state(&again);
        assert_eq!(renamed.len() + 3 + 3 + "/objects/".len(), thinned().0.len());

        // Under their own names, the same is left as before.
        let blocks = [SentBlock::new("pc.ram").range(0, 1 << 32, 2 << 12).range(2 << 12, 2 << 32, 6 << 12)];
        let mut sent = Vec::new();
        reader.send_migration(&mut sent, &blocks, "device_state").unwrap();
        let (_folder, stream, again) = received(&options, &mut &sent[..], None).unwrap();
        assert!(device_state(&again) == thinned().0);
        // Only the page that is not zero, and the zeros that were stored because the gap is short.
        assert!((1..8).contains(&stream.blocks()[0].records));
        assert_eq!(fills(&again, 2 << 32, 6), [0, 5, 0, 0, 0, 0]);
    }
}

#[test]
fn pages_of_many_batches_are_sent_in_order() {
    let size = 5 << 20;
    let ram: Vec<u8> = (0..size).map(|at| u8::try_from(at / PAGE % 251).unwrap()).collect();
    let folder = tempfile::tempdir().unwrap();
    let options = SnapshotOptions::new().key(SecretKey::generate().unwrap()).threads(3);
    let writer = options.create_in_place(folder.path().join("vm")).unwrap();
    writer.write_memory(&[GuestRegion::new(77, &ram)], &MemoryOptions::new().compress(true)).unwrap();
    let state = Stream::begun(&[("mem", size as u64)]).u64(0x10).end().u64(0x10).devices().described();
    writer.write_whole("device_state", &state.0, &mut || Ok(())).unwrap();
    let reader = options.open(folder.path().join("vm")).unwrap();
    // Pages of the block that begin and end between pages of the region, and so between data and zeros.
    let most = size as u64 - 8192;
    let block = SentBlock::new("mem").range(0, 77 + 100, most).range(most + 4096, 77 + 4096, 4096);
    let mut sent = Vec::new();
    reader.send_migration(&mut sent, &[block], "device_state").unwrap();

    let writer = options.create_in_place(folder.path().join("again")).unwrap();
    let stream = writer.receive_migration(&mut &sent[..], None, &[], "device_state").unwrap();
    assert_eq!(stream.repeated_bytes(), 0);
    let memory = stream.memory("mem", 0, size as u64).unwrap();
    writer.write_memory(&[GuestRegion::new(0, memory)], &MemoryOptions::new()).unwrap();
    let mut found = vec![0; size];
    options.open(folder.path().join("again")).unwrap().memory().unwrap().read_at(0, &mut found).unwrap();
    assert!(found[..size - 8192] == ram[100..size - 8092]);
    assert!(found[size - 8192..size - 4096].iter().all(|byte| *byte == 0));
    assert!(found[size - 4096..] == ram[4096..8192]);
}

#[test]
fn a_stream_without_pages_of_guest_memory_says_so() {
    // As 0.1 wrote it: the address of each block, and shared memory left out.
    let stream = Stream::new()
        .configured()
        .subsection("configuration/target-page-bits")
        .u32(12)
        .subsection("configuration/capabilities")
        .u32(1)
        .name("x-ignore-shared")
        .subsection("configuration/uuid")
        .bytes(&[7; 16])
        .start("ram")
        .u64(2 << 12 | 4)
        .name("mem")
        .u64(1 << 12)
        .u64(0x10_0000)
        .name("pc.bios")
        .u64(1 << 12)
        .u64(0xfff0_0000)
        .end_section()
        .end()
        .zero("pc.bios", 0)
        .end_section()
        .devices()
        .described();
    let (_folder, received, reader) = received(&SnapshotOptions::new(), &mut &stream.0[..], Some(&["mem"])).unwrap();
    assert!(received.ignores_shared());
    assert_eq!(received.blocks()[0].records, 0);
    assert!(device_state(&reader) == stream.0);
    let text = received.memory("mem", 0, 4096).map(drop).unwrap_err().to_string();
    assert!(text.contains("QEMU left its pages out"), "{text}");
    let front = reader.migration_front("device_state").unwrap();
    assert!(front.ignores_shared);
    assert_eq!(front.blocks, [("mem".to_owned(), 4096), ("pc.bios".to_owned(), 4096)]);
}

/// The stream is refused with this text.
fn refused(stream: &Stream, text: &str) {
    let error = received(&SnapshotOptions::new(), &mut &stream.0[..], None).map(drop).unwrap_err();
    assert!(error.is_corrupt() || error.is_unsupported_format(), "{error}");
    assert!(error.to_string().contains(text), "{error}\n{text}");
    assert!(error.to_string().contains("at byte "), "{error}");
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let blocks = [("pc.ram", 2 << 12)];
    let begun = || Stream::begun(&blocks).end_section();
    let page = |flags: u64| begun().part().u64(flags).name("pc.ram").bytes(&[0; 8]);
    let config = |name: &str| Stream::new().configured().subsection(name);
    let cases = [
        (Stream(b"LibvirtQemudSave".to_vec()), "it begins with \"Libv\", not \"QEVM\", at byte 0"),
        (Stream(b"QFI\xfb\0\0\0\x03".to_vec()), "it begins with \"QFI\\xfb\", not \"QEVM\", at byte 0"),
        (Stream(b"QEVM\0\0\0\x02".to_vec()), "the stream has version 2, and vmsnap reads version 3"),
        (Stream(b"QEVM\x03\0\0\0".to_vec()), "the stream has version 50331648"),
        (Stream::new().bytes(&[7]).u32(0), "the machine type cannot have 0 bytes"),
        (Stream::new().bytes(&[7]).u32(1 << 20), "the machine type cannot have 1048576 bytes"),
        (Stream::new().bytes(&[7]).u32(1).bytes(&[0xff]), "the machine type is not UTF-8"),
        (config("configuration/target-page-bits").u32(16), "the guest's pages have 2^16 bytes"),
        (config("configuration/target-page-bits").u32(77), "the guest's pages have 2^77 bytes"),
        (config("configuration/later"), "the subsection \"configuration/later\""),
        (Stream::new().configured().bytes(&[5]).name("x").u32(2), "the subsection \"x\" has version 2"),
        (config("configuration/capabilities").u32(1).name("mapped-ram"), "the migration capability \"mapped-ram\""),
        (config("configuration/capabilities").u32(u32::MAX), "the stream lists 4294967295 capabilities"),
        (Stream::new().bytes(&[8, 0, 3, 0, 2, 1, 2]), "the command 3 (POSTCOPY_ADVISE)"),
        (begun().bytes(&[8, 0, 8, 0, 4]), "the command 8 (PACKAGED)"),
        (begun().bytes(&[8, 0, 99, 0, 0]), "the command 99,"),
        (Stream::new().start("vfio"), "the section \"vfio\" is migrated in rounds"),
        (begun().start("dirty-bitmap"), "the section \"dirty-bitmap\" is migrated in rounds"),
        (Stream::new().part(), "there is no section of kind 0x2 here"),
        (Stream::new().end(), "there is no section of kind 0x3 here"),
        (Stream::new().bytes(&[0]), "the stream ends before the end of section \"ram\""),
        (Stream::new().configured().configured(), "there is no section of kind 0x7 here"),
        (begun().configured(), "there is no section of kind 0x7 here"),
        (begun().start("ram"), "section \"ram\" begins twice"),
        (begun().end().end_section().start("ram"), "section \"ram\" begins twice"),
        (Stream::new().start("ram").page("pc.ram", 0, 1), "does not begin with a list of its blocks"),
        (Stream::new().devices(), "the section \"timer\" comes before the end of section \"ram\""),
        (begun().devices(), "the section \"timer\" comes before the end of section \"ram\""),
        (begun().bytes(&[0]), "the stream ends before the end of section \"ram\""),
        (begun().bytes(&[9]), "there is no section of kind 0x9 here"),
        (Stream::new().bytes(&[1]).u32(2).name("ram").u32(0).u32(5), "section \"ram\" has version 5"),
        (Stream::new().start("ram").u64(0x10), "does not begin with a list of its blocks"),
        (Stream::begun(&[("a", 100)]), "does not begin with a list of its blocks"),
        (Stream::new().start("ram").u64(4096 | 4).name("a").u64(100), "has 100 bytes, not a multiple of 4096"),
        (Stream::begun(&[("a", 4096), ("a", 4096)]), "the RAM block \"a\" is listed twice"),
        (Stream::new().start("ram").u64(4096 | 4).name("a").u64(8192), "do not match their sum"),
        (Stream::new().start("ram").u64(4096 | 4).bytes(&[1, 0xff]), "the name of a RAM block is not UTF-8"),
        (Stream::new().start("ram").u64(4096 | 4).bytes(&[0]), "the name of a RAM block is empty"),
        (Stream::begun(&blocks).listed(&blocks), "there is a second list of RAM blocks"),
        (Stream::begun(&blocks).end_section().part().page("pc.rom", 0, 1), "\"pc.rom\", which is not in the list"),
        (begun().part().page("pc.ram", 2, 1), "a page is at 0x2000 of the RAM block \"pc.ram\", which has 0x2000"),
        (begun().part().next_page(0, 1), "the first page does not name its RAM block"),
        (begun().part().u64(2).name("pc.ram").bytes(&[9]), "a page of zeros is filled with 0x09"),
        (page(0x40), "the migration capability xbzrle"),
        (page(0x100), "the migration capability compress"),
        (page(0x80), "the migration capability rdma"),
        (page(0x0a), "has the flags 0xa"),
        (page(0x1010), "has the flags 0x10"),
        (page(0x400), "has the flags 0x400"),
        (begun().bytes(&[2]).u32(9), "section 9 continues, but only section \"ram\" began"),
        (begun().part().u64(0x10).footer(9), "section \"ram\" does not end with its footer"),
        (begun().part().u64(0x10).end(), "section \"ram\" does not end with its footer"),
        (begun().end().u64(0x200).end_section(), "the migration capability multifd was on"),
        (begun().end().end_section().part(), "there is no section of kind 0x2 here"),
        (begun().end().end_section().start("late"), "the section \"late\" is migrated in rounds"),
    ];
    for (stream, text) in cases {
        refused(&stream, text);
    }
    let names: Vec<_> = (0..1025).map(|number| number.to_string()).collect();
    let many: Vec<_> = names.iter().map(|name| (&**name, 4096)).collect();
    refused(&Stream::begun(&many), "more than 1024 RAM blocks");
}

#[test]
fn more_guest_memory_than_any_guest_has_is_refused() {
    let most = 16 << 40;
    for (blocks, bytes) in [
        (vec![("pc.ram", most + 4096)], "17592186048512"),
        (vec![("pc.ram", most), ("mem", 4096)], "17592186048512"),
        (vec![("pc.ram", u64::MAX - 4095)], "18446744073709547520"),
    ] {
        let stream = Stream::begun(&blocks);
        let error = received(&SnapshotOptions::new(), &mut &stream.0[..], None).map(drop).unwrap_err();
        let text = format!("the guest has {bytes} bytes of memory, and vmsnap reads at most 16 TiB from a stream");
        assert!(error.is_unsupported_format() && error.to_string().contains(&text), "{error}");
    }
}

#[test]
fn a_truncated_stream_is_refused_wherever_it_ends() {
    let stream = Stream::begun(&[("pc.bios", 1 << 12)])
        .end_section()
        .part()
        .zero("pc.bios", 0)
        .end_section()
        .end()
        .end_section()
        .devices()
        .described();
    let whole = stream.0.len();
    for length in 0..whole {
        // Without the description the stream is complete: the machine's option suppress-vmdesc.
        if length != whole - 22 {
            refused(&Stream(stream.0[..length].to_vec()), "truncated");
        }
    }
}

#[test]
fn a_block_that_was_asked_for_must_be_in_the_stream() {
    let error = received(&SnapshotOptions::new(), &mut &live().0[..], Some(&["mem"])).map(drop).unwrap_err();
    let text = "no RAM block \"mem\", which is guest memory; its blocks are \"pc.ram\", \"pc.bios\", \"/objects/hot\"";
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn memory_that_was_not_taken_is_not_given() {
    let (_folder, stream, _) = received(&SnapshotOptions::new(), &mut &live().0[..], None).unwrap();
    for (block, offset, size, text) in [
        ("pc.bios", 0, 4096, "was not taken"),
        ("mem", 0, 4096, "is not in the migration stream"),
        ("pc.ram", 4096, 8 << 12, "has 32768 bytes, too few for 32768 bytes from offset 4096"),
        ("pc.ram", u64::MAX, 2, "has 32768 bytes, too few"),
    ] {
        let error = stream.memory(block, offset, size).map(drop).unwrap_err();
        assert!(error.is_invalid_argument() && error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_block_without_pages_is_zero_if_shared_memory_was_not_left_out() {
    let stream = Stream::begun(&[("pc.ram", 1 << 12), ("vmem", 3 << 12)])
        .end_section()
        .part()
        .page("pc.ram", 0, 1)
        .end_section()
        .end()
        .end_section()
        .devices()
        .described();
    let folder = tempfile::tempdir().unwrap();
    let staged = SnapshotOptions::new().create(folder.path().join("vm")).unwrap();
    let received = staged.writer().receive_migration(&mut &stream.0[..], None, &[], "device_state").unwrap();
    assert_eq!(received.blocks()[1].records, 0);
    let region = GuestRegion::new(1 << 32, received.memory("vmem", 0, 3 << 12).unwrap());
    let report = staged.writer().write_memory(&[region], &MemoryOptions::new()).unwrap();
    assert_eq!((report.logical_bytes, report.data_bytes), (3 << 12, 0));
}

#[test]
fn blocks_that_do_not_fit_are_refused_before_anything_is_sent() {
    let (_folder, _, reader) = received(&SnapshotOptions::new(), &mut &live().0[..], None).unwrap();
    let ram = || SentBlock::new("pc.ram");
    let cases: [(&[SentBlock], &str); 8] = [
        (&[SentBlock::new("mem")], "there is no RAM block \"mem\"; the blocks are \"pc.ram\", \"pc.bios\""),
        (&[ram(), ram()], "the RAM block \"pc.ram\" is given twice"),
        (&[ram().sent_as("")], "cannot be the name of a RAM block"),
        (&[ram().sent_as("x".repeat(256))], "cannot be the name of a RAM block"),
        (&[ram().sent_as("pc.bios")], "two RAM blocks would be sent as \"pc.bios\""),
        (&[ram().range(100, 1 << 32, 4096)], "4096 bytes at offset 100 of the RAM block \"pc.ram\" are not pages"),
        (&[ram().range(4096, 1 << 32, 8 << 12)], "are not pages of it: it has 32768 bytes"),
        (&[ram().range(0, 5 << 32, 4096)], "no memory at guest-physical address"),
    ];
    for (blocks, text) in cases {
        let mut sent = Vec::new();
        let error = reader.send_migration(&mut sent, blocks, "device_state").unwrap_err();
        assert!(error.is_invalid_argument() && error.to_string().contains(text), "{error}");
        assert!(sent.is_empty());
    }
}

#[test]
fn a_reader_that_stops_is_an_error_of_the_system() {
    let (_folder, _, reader) = received(&SnapshotOptions::new(), &mut &live().0[..], None).unwrap();
    let (pipe, mut stream) = io::pipe().unwrap();
    drop(pipe);
    let error = reader.send_migration(&mut stream, &[], "device_state").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
}

/// A snapshot with guest memory of several batches, which several threads send.
fn large(options: &SnapshotOptions) -> (tempfile::TempDir, SentBlock) {
    let size = 8 << 20;
    let folder = tempfile::tempdir().unwrap();
    let writer = options.create_in_place(folder.path().join("vm")).unwrap();
    writer.write_memory(&[GuestRegion::new(0, vec![7; size])], &MemoryOptions::new()).unwrap();
    let state = Stream::begun(&[("mem", size as u64)]).end_section().end().end_section().devices().described();
    writer.write_whole("device_state", &state.0, &mut || Ok(())).unwrap();
    (folder, SentBlock::new("mem").range(0, 0, size as u64))
}

#[test]
fn a_reader_that_stops_in_the_middle_ends_all_threads() {
    let options = SnapshotOptions::new().key(SecretKey::generate().unwrap()).threads(3);
    let (folder, block) = large(&options);
    let reader = options.open(folder.path().join("vm")).unwrap();
    let (mut pipe, mut stream) = io::pipe().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || pipe.read_exact(&mut vec![0; 3 << 20]).unwrap());
        let error = reader.send_migration(&mut stream, &[block], "device_state").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    });
}

#[test]
fn memory_that_was_changed_is_not_sent() {
    let options = SnapshotOptions::new().key(SecretKey::generate().unwrap()).threads(3);
    let (folder, block) = large(&options);
    let path = folder.path().join("vm/mem");
    let mut stored = std::fs::read(&path).unwrap();
    stored[5 << 20] ^= 1;
    std::fs::write(&path, stored).unwrap();
    let reader = options.open(folder.path().join("vm")).unwrap();
    let mut sent = Vec::new();
    let error = reader.send_migration(&mut sent, &[block], "device_state").unwrap_err();
    assert!(error.is_authentication() && error.to_string().contains("mem"), "{error}");
    // The stream ends before the batch with the changed byte, so QEMU does not accept it.
    assert!(sent.len() < 5 << 20);
}

#[test]
fn progress_ends_a_call_and_counts_guest_memory() {
    let folder = tempfile::tempdir().unwrap();
    let writer = SnapshotOptions::new().create_in_place(folder.path().join("vm")).unwrap();
    let stream = live();
    let stop = &mut |_| Err(crate::Error::interrupted());
    let trickle = &mut Trickle(&stream.0, 100, false);
    let error = writer.receive_migration_interruptible(trickle, None, &[], "device_state", stop).map(drop).unwrap_err();
    assert!(error.is_interrupted());
    assert!(!folder.path().join("vm/device_state").exists());
    let mut told = Vec::new();
    let progress = &mut |progress: crate::MemoryProgress| {
        told.push((progress.done_bytes, progress.total_bytes));
        Ok(())
    };
    writer.receive_migration_interruptible(&mut &stream.0[..], None, &[], "device_state", progress).unwrap();
    assert_eq!(told.last(), Some(&(12 << 12, 12 << 12)));
}

/// Writes the seeds of the fuzzer: `cargo test -- --ignored seeds_of_migration`.
#[test]
#[ignore = "writes into the source tree"]
fn seeds_of_migration() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/migration");
    std::fs::create_dir_all(folder).unwrap();
    let zeros = Stream::begun(&BLOCKS)
        .end_section()
        .part()
        .zero("pc.ram", 0)
        .next_zero(1)
        .zero("pc.bios", 1)
        .end_section()
        .end()
        .end_section()
        .devices()
        .bytes(&[0]);
    std::fs::write(format!("{folder}/zeros"), zeros.0).unwrap();
    std::fs::write(format!("{folder}/thinned"), thinned().0).unwrap();
    std::fs::write(format!("{folder}/early"), early::seed().0).unwrap();
}
