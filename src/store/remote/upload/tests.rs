use super::super::settings::tests::url;
use super::super::{Bucket, Wanted, has_proof, proof_attributes};
use super::*;
use crate::manifest::Proof;
use crate::store::RemoteOptions;
use crate::threads::for_each;

const PART: usize = 1000;

fn bucket(name: &str) -> Bucket {
    Bucket::new(url(&format!("memory://upload {name}/vm1")), RemoteOptions::default()).unwrap()
}

fn object(bucket: &Bucket, flights: &Arc<Flights>) -> UploadedObject {
    let attributes = proof_attributes(&Proof::Blake3([0xab; 32]));
    UploadedObject::with_parts(bucket.objects().unwrap(), "mem", attributes, PART, flights).unwrap()
}

fn with<T>(call: impl FnOnce(&mut Interrupt<'_>) -> Result<T>) -> Result<T> {
    call(&mut Interrupt::new(&mut || Ok(())))
}

fn read(bucket: &Bucket) -> Option<Vec<u8>> {
    let wanted = Wanted::Whole { max_bytes: 1 << 30 };
    let found = with(|interrupt| bucket.get_many(&[("mem", wanted)], interrupt)).unwrap().pop().unwrap().unwrap();
    found.map(|found| found.bytes.to_vec())
}

fn contents(length: usize) -> Vec<u8> {
    (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).take(length).collect()
}

#[test]
fn an_object_of_any_size_is_stored() {
    let (bucket, flights) = (bucket("sizes"), Flights::new(3));
    for length in [0, 1, PART - 1, PART, PART + 1, 2 * PART, 5 * PART + 7] {
        let (object, bytes) = (object(&bucket, &flights), contents(length));
        for (number, step) in bytes.chunks(77).enumerate() {
            with(|interrupt| object.write_all_at(step, number as u64 * 77, interrupt)).unwrap();
        }
        assert_eq!(object.stored_size().unwrap(), length as u64);
        assert_eq!(object.is_finished(), None);
        with(|interrupt| object.finish(interrupt)).unwrap();
        assert_eq!(object.is_finished(), Some(true));
        assert_eq!(read(&bucket).unwrap(), bytes, "{length}");
        assert!(with(|interrupt| object.write_all_at(b"more", 0, interrupt)).unwrap_err().is_state());
        if length <= PART {
            // The memory store drops the metadata of uploads in parts.
            let headed = with(|interrupt| bucket.head("mem", interrupt)).unwrap().unwrap();
            assert!(has_proof(&headed, &Proof::HeaderTag { chunk_size_bytes: 1, tag: [0xab; 32] }));
            assert!(!has_proof(&headed, &Proof::Blake3([0xac; 32])));
        }
        object.discard().unwrap();
        object.discard().unwrap();
        assert_eq!(read(&bucket), None);
    }
}

#[test]
fn writes_come_in_any_order_from_any_thread() {
    let (bucket, flights) = (bucket("order"), Flights::new(2));
    let bytes = contents(20 * PART + 123);
    for threads in [1, 4] {
        let object = object(&bucket, &flights);
        // The two numbers have no common divisor, so each write comes once.
        let pieces: Vec<_> = bytes.chunks(83).enumerate().collect();
        let order = (0..pieces.len()).map(|number| pieces[number * 101 % pieces.len()]);
        assert!(!pieces.len().is_multiple_of(101));
        let interrupt = &mut || Ok(());
        for_each(&mut vec![(); threads], order, &mut Interrupt::new(interrupt), |(), (number, piece), interrupt| {
            let (left, right) = piece.split_at(piece.len() / 2);
            object.write_runs_at(&[left, &[], right], number as u64 * 83, interrupt)
        })
        .unwrap();
        with(|interrupt| object.finish(interrupt)).unwrap();
        assert_eq!(read(&bucket).unwrap(), bytes);
    }
}

#[test]
fn a_gap_is_an_error_unless_the_size_is_set() {
    let (bucket, flights) = (bucket("gap"), Flights::new(2));
    let gap = object(&bucket, &flights);
    with(|interrupt| gap.write_all_at(b"end", 2 * PART as u64, interrupt)).unwrap();
    assert!(with(|interrupt| gap.finish(interrupt)).unwrap_err().to_string().contains("gap"));
    assert!(with(|interrupt| gap.finish(interrupt)).unwrap_err().is_state());
    assert_eq!(gap.is_finished(), Some(false));
    for length in [10, PART, 3 * PART + 5] {
        let sparse = object(&bucket, &flights);
        with(|interrupt| sparse.write_all_at(b"data", 5, interrupt)).unwrap();
        assert!(sparse.set_size(8).unwrap_err().is_invalid_argument());
        sparse.set_size(length as u64).unwrap();
        with(|interrupt| sparse.finish(interrupt)).unwrap();
        let mut expected = vec![0; length];
        expected[5..9].copy_from_slice(b"data");
        assert_eq!(read(&bucket).unwrap(), expected);
    }
}

#[test]
fn memory_holds_the_parts_under_way_and_one_part_a_thread() {
    let (bucket, flights) = (bucket("memory"), Flights::new(2));
    let object = object(&bucket, &flights);
    // All permits are taken, so nothing can be sent.
    let permits: Vec<_> = (0..2).map(|_| with(|interrupt| flights.permit(1, interrupt)).unwrap()).collect();
    let bytes = contents(3 * PART);
    with(|interrupt| object.write_all_at(&bytes[..PART], 0, interrupt)).unwrap();
    let stop = &mut || Err(Error::interrupted());
    let error = object.write_all_at(&bytes[PART..], PART as u64, &mut Interrupt::new(stop)).unwrap_err();
    assert!(error.is_interrupted());
    drop(permits);
    assert!(with(|interrupt| object.write_all_at(b"more", 0, interrupt)).unwrap_err().is_state());
    assert!(with(|interrupt| object.finish(interrupt)).unwrap_err().is_state());
    object.discard().unwrap();
    assert_eq!(read(&bucket), None);
}

#[test]
fn an_abandoned_object_never_counts_as_finished() {
    let (bucket, flights) = (bucket("abandoned"), Flights::new(2));
    let object = object(&bucket, &flights);
    with(|interrupt| object.write_all_at(&contents(3 * PART), 0, interrupt)).unwrap();
    object.abandon();
    assert_eq!(object.is_finished(), Some(false));
    assert!(with(|interrupt| object.finish(interrupt)).is_err());
    object.discard().unwrap();
    assert_eq!(read(&bucket), None);
}

#[test]
fn ten_thousand_parts_are_enough_if_the_size_is_known() {
    assert_eq!(part_bytes(None).unwrap(), MIN_PART_BYTES);
    assert_eq!(part_bytes(Some(MIN_PART_BYTES as u64 * MAX_PARTS)).unwrap(), MIN_PART_BYTES);
    assert_eq!(part_bytes(Some(MIN_PART_BYTES as u64 * MAX_PARTS + 1)).unwrap(), MIN_PART_BYTES + (1 << 20));
    assert_eq!(part_bytes(Some(1 << 40)).unwrap(), 105 << 20);
    assert!(part_bytes(Some(u64::MAX)).unwrap_err().is_invalid_argument());
    let (bucket, flights) = (bucket("parts"), Flights::new(2));
    let object = object(&bucket, &flights);
    let error = with(|interrupt| object.write_all_at(b"x", PART as u64 * MAX_PARTS, interrupt)).unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("raw_fragment_with_size"), "{error}");
    assert!(object.set_size(PART as u64 * MAX_PARTS + 1).is_err());
}

#[test]
fn a_name_that_a_store_changes_is_refused_at_once() {
    let objects = bucket("names").objects().unwrap();
    let made = UploadedObject::new(objects, "a\nb", Attributes::new(), None, &Flights::new(1));
    assert!(made.err().unwrap().is_invalid_argument());
}
