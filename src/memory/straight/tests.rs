use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::super::spool::{Spool, Spooled};
use super::*;
use crate::cipher::SecretKey;
use crate::memory::GuestRegion;
use crate::snapshot::SnapshotOptions;

/// A page of an area: a number that fills it, or 0.
type Put = (usize, u64, u8);

/// Two areas. The first is in two regions, like the RAM of a PC with 4 GiB.
const AREAS: [u64; 2] = [40, 8];
const REGIONS: [(u64, usize, Range<u64>); 3] = [(0, 0, 0..30), (1 << 32, 0, 30..40), (2 << 32, 1, 0..8)];

fn regions() -> Vec<AreaRegion> {
    let region = |(guest_base, area, pages): &(u64, usize, Range<u64>)| AreaRegion {
        guest_base: *guest_base,
        area: *area,
        range: pages.start * PAGE..pages.end * PAGE,
    };
    REGIONS.iter().map(region).collect()
}

fn with<R>(work: impl FnOnce(&mut Interrupt<'_>) -> R) -> R {
    work(&mut Interrupt::new(&mut || Ok(())))
}

fn put(spool: &mut Spool, puts: &[Put]) {
    for (area, page, fill) in puts {
        match fill {
            0 => drop(spool.put_zero(*area, *page)),
            _ => drop(with(|interrupt| spool.put(*area, *page, &[*fill; PAGE_BYTES], interrupt)).unwrap()),
        }
    }
}

fn spool(straight: Straight) -> Spool {
    let mut spool = Spool::straight(straight);
    for pages in AREAS {
        spool.add_area(pages * PAGE);
    }
    spool
}

fn straight(writer: &SnapshotWriter) -> Straight {
    Straight::new(writer, regions()).unwrap().unwrap()
}

/// The bytes of each region, where the last page counts.
fn expected(puts: &[Put]) -> Vec<Vec<u8>> {
    let mut areas = AREAS.map(|pages| vec![0; usize::try_from(pages * PAGE).unwrap()]);
    for (area, page, fill) in puts {
        let at = usize::try_from(page * PAGE).unwrap();
        areas[*area][at..at + PAGE_BYTES].fill(*fill);
    }
    let bytes =
        |range: &Range<u64>| usize::try_from(range.start * PAGE).unwrap()..usize::try_from(range.end * PAGE).unwrap();
    REGIONS.iter().map(|(_, area, pages)| areas[*area][bytes(pages)].to_vec()).collect()
}

fn kinds() -> [SnapshotOptions; 2] {
    [SnapshotOptions::new().threads(3), SnapshotOptions::new().threads(3).key(SecretKey::generate().unwrap())]
}

fn fragment(options: &SnapshotOptions, path: &Path, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    options.open(path).unwrap().raw_fragment(name).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn check_memory(options: &SnapshotOptions, path: &Path, puts: &[Put]) {
    let report = options.verify(path).unwrap();
    assert!(report.is_ok(), "{report:?}");
    let memory = options.open(path).unwrap().memory().unwrap();
    for ((guest_base, ..), bytes) in REGIONS.iter().zip(expected(puts)) {
        let mut found = vec![9; bytes.len()];
        memory.read_at(*guest_base, &mut found).unwrap();
        assert!(found == bytes, "{guest_base:#x} {puts:?}");
    }
}

/// Pages in the order in which `mem` stores them. `area` 0 is split at page 30.
fn in_order() -> Vec<Put> {
    let pages = (0..40).map(|page| (0, page, [0, 1, 2, 3, 0, 0][usize::try_from(page % 6).unwrap()]));
    pages.chain((0..8).map(|page| (1, page, u8::try_from(page).unwrap()))).collect()
}

#[test]
fn pages_in_order_make_the_fragments_of_a_dump() {
    let all: [Vec<Put>; 5] = [
        in_order(),
        // Nothing at all, only zeros, the last page, and all pages.
        vec![],
        (0..40).map(|page| (0, page, 0)).collect(),
        vec![(1, 7, 5)],
        (0..40).map(|page| (0, page, 1)).chain((0..8).map(|page| (1, page, 2))).collect(),
    ];
    for options in kinds() {
        for puts in &all {
            let folder = tempfile::tempdir().unwrap();
            let [direct, dumped] = ["direct", "dumped"].map(|name| folder.path().join(name));
            let mut staged = options.create(&direct).unwrap();
            let mut spool = spool(straight(staged.writer()));
            put(&mut spool, puts);
            let Spooled::Written(report) = with(|interrupt| spool.finish(interrupt)).unwrap() else {
                panic!("not written");
            };
            staged.commit().unwrap();

            let bytes = expected(puts);
            let regions: Vec<_> =
                REGIONS.iter().zip(&bytes).map(|((base, ..), bytes)| GuestRegion::new(*base, bytes)).collect();
            let mut staged = options.create(&dumped).unwrap();
            let same = staged.writer().write_memory(&regions, &MemoryOptions::new()).unwrap();
            staged.commit().unwrap();
            assert_eq!(MemoryReport { duration: same.duration, ..report }, same);
            for name in [MEMORY, METADATA] {
                assert!(fragment(&options, &direct, name) == fragment(&options, &dumped, name), "{name} {puts:?}");
            }
            check_memory(&options, &direct, puts);
        }
    }
}

#[test]
fn pages_out_of_order_are_kept_until_they_are_dumped() {
    let mut second_first = in_order();
    second_first.rotate_right(8);
    let with_last = |last: Put| in_order().into_iter().chain([last]).collect::<Vec<_>>();
    let mut swapped = in_order();
    swapped.swap(1, 2);
    let all = [
        swapped,
        second_first,
        // The last page is one that came before; of another region; zeros over data, and data over zeros.
        with_last((1, 7, 9)),
        with_last((0, 3, 9)),
        with_last((0, 3, 0)),
        with_last((0, 4, 9)),
        vec![(1, 7, 1), (1, 0, 2)],
        vec![(1, 7, 1), (0, 0, 2), (0, 0, 0), (0, 1, 3)],
    ];
    for options in kinds() {
        for puts in &all {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("vm");
            let mut staged = options.create(&path).unwrap();
            let writer = staged.writer();
            let mut spool = spool(straight(writer));
            put(&mut spool, puts);
            let Spooled::Pages(pages) = with(|interrupt| spool.finish(interrupt)).unwrap() else {
                panic!("{puts:?}");
            };
            assert!(!writer.location().join(MEMORY).exists());
            let pages = Arc::new(pages);
            let regions: Vec<_> = regions()
                .into_iter()
                .map(|region| GuestRegion::new(region.guest_base, pages.source(region.area, region.range)))
                .collect();
            writer.write_memory(&regions, &MemoryOptions::new().compress(true)).unwrap();
            drop(regions);
            staged.commit().unwrap();
            check_memory(&options, &path, puts);
        }
    }
}

#[test]
fn pages_that_no_region_has_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let writer = SnapshotOptions::new().create_in_place(folder.path().join("vm")).unwrap();
    let first = regions().into_iter().take(1).collect();
    let mut spool = spool(Straight::new(&writer, first).unwrap().unwrap());
    put(&mut spool, &[(0, 29, 1), (0, 30, 2)]);
    assert!(matches!(with(|interrupt| spool.finish(interrupt)).unwrap(), Spooled::Pages(_)));
}

#[test]
fn gaps_that_are_too_short_are_stored_as_zeros() {
    for options in kinds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let mut staged = options.create(&path).unwrap();
        let mut straight = straight(staged.writer());
        straight.options = MemoryOptions::new().min_gap_bytes(3 * PAGE);
        let mut spool = spool(straight);
        // Gaps of two, three and one page; the one between two regions is never stored.
        let puts = [(0, 1, 1), (0, 4, 2), (0, 8, 3), (0, 10, 4), (0, 29, 5), (0, 30, 6), (1, 2, 7)];
        put(&mut spool, &puts);
        let Spooled::Written(report) = with(|interrupt| spool.finish(interrupt)).unwrap() else { panic!("kept") };
        staged.commit().unwrap();
        assert_eq!((report.ranges, report.data_bytes), (5, 10 * PAGE));
        assert_eq!(report.logical_bytes, 48 * PAGE);
        let ranges = options.open(&path).unwrap().memory().unwrap().data_ranges(0);
        assert_eq!(ranges, [PAGE..5 * PAGE, 8 * PAGE..11 * PAGE, 29 * PAGE..30 * PAGE]);
        check_memory(&options, &path, &puts);
    }
}

#[test]
fn the_list_of_ranges_of_a_scattered_guest_stays_short() {
    let folder = tempfile::tempdir().unwrap();
    let writer = SnapshotOptions::new().create_in_place(folder.path().join("vm")).unwrap();
    let region = AreaRegion { guest_base: 0, area: 0, range: 0..1 << 40 };
    let mut straight = Straight::new(&writer, vec![region]).unwrap().unwrap();
    for page in (0..1 << 18).step_by(2) {
        straight.place(0, page).unwrap();
    }
    // From then on, a gap of a page is stored.
    assert_eq!(straight.range_count, 1 << 16);
    assert_eq!(straight.place(0, 1 << 27).unwrap(), Some(0));
    assert_eq!(straight.place(0, (1 << 27) + 2).unwrap(), Some(1));
}

#[test]
fn regions_that_mem_cannot_have_are_left_to_the_dump() {
    let folder = tempfile::tempdir().unwrap();
    let writer = SnapshotOptions::new().create_in_place(folder.path().join("vm")).unwrap();
    let region = |guest_base, range| AreaRegion { guest_base, area: 0, range };
    for regions in [
        vec![],
        vec![region(0, 0..PAGE + 1)],
        vec![region(0, 1..PAGE)],
        vec![region(0, 0..2 * PAGE), region(PAGE, 0..PAGE)],
        vec![region(u64::MAX, 0..PAGE)],
    ] {
        assert!(Straight::new(&writer, regions).unwrap().is_none());
    }
    assert!(writer.location().read_dir().unwrap().next().is_none());
}

#[test]
fn after_a_failure_nothing_is_left() {
    for options in kinds() {
        let folder = tempfile::tempdir().unwrap();
        let mut staged = options.create(folder.path().join("vm")).unwrap();
        let writer = staged.writer().clone();
        let names = || {
            let entries = writer.location().read_dir().unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.retain(|name| name.starts_with("mem"));
            names
        };
        // It is dropped, in order and out of order.
        let mut dropped = spool(straight(&writer));
        put(&mut dropped, &in_order());
        assert_eq!(names(), [MEMORY]);
        drop(dropped);
        assert!(names().is_empty());
        let mut dropped = spool(straight(&writer));
        put(&mut dropped, &[(0, 1, 1), (0, 0, 1)]);
        assert!(names().is_empty());
        drop(dropped);
        // A fragment exists.
        writer.write_whole(METADATA, b"", &mut || Ok(())).unwrap();
        let mut late = spool(straight(&writer));
        put(&mut late, &in_order());
        let error = with(|interrupt| late.finish(interrupt)).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(names(), [METADATA]);
        writer.write_whole(MEMORY, b"", &mut || Ok(())).unwrap();
        let error = Straight::new(&writer, regions()).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        staged.commit().unwrap();
    }
}
