//! Staged snapshots are complete or absent.

use std::io::Write;
use std::path::Path;

use vmsnap::{SecretKey, SnapshotOptions, SnapshotReader, SnapshotWriter, StagedSnapshot, clean};

fn both() -> [SnapshotOptions; 2] {
    [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::generate().unwrap())]
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn fill(staged: &StagedSnapshot) {
    let writer = staged.writer();
    writer.write_fragment("clock", &12_u64).unwrap();
    let mut memory = writer.add_namespace("ram").unwrap().raw_fragment_with_chunk_size("mem", 64 << 10).unwrap();
    memory.write_all(&vec![7; (8 << 20) + 5]).unwrap();
    memory.finish().unwrap();
    writer.raw_fragment("empty").unwrap().finish().unwrap();
}

#[test]
fn nothing_is_at_the_path_until_the_commit_and_then_all_of_it() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1");
        let mut staged = options.create(&path).unwrap();
        fill(&staged);
        assert!(!path.exists());
        let id = staged.commit().unwrap();
        assert_eq!(entries(directory.path()), ["vm1"]);
        let reader = options.clone().require_sealed(true).expect_seal_digest(id.seal_digest).open(&path).unwrap();
        assert_eq!(reader.snapshot_id().unwrap(), Some(id.snapshot_id));
        assert_eq!(reader.list_fragments().unwrap(), ["clock", "empty"]);
        assert_eq!(reader.list_namespaces().unwrap(), ["ram"]);
        assert_eq!(reader.read_fragment::<u64>("clock").unwrap(), 12);
        assert_eq!(reader.namespace("ram").unwrap().raw_fragment("mem").unwrap().size(), (8 << 20) + 5);
        assert!(staged.commit().unwrap_err().is_state());
        assert!(options.append(&path).unwrap_err().is_sealed());
        drop(staged);
        assert_eq!(entries(directory.path()), ["vm1"]);
    }
}

#[test]
fn dropped_or_discarded_it_is_absent() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1");
        let staged = options.create(&path).unwrap();
        fill(&staged);
        drop(staged);
        assert_eq!(entries(directory.path()), [""; 0]);
        options.create(&path).unwrap().discard().unwrap();
        assert_eq!(entries(directory.path()), [""; 0]);
    }
}

#[test]
fn nothing_is_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm1");
    let mut staged = SnapshotOptions::new().create(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = staged.commit().unwrap_err();
    assert!(error.raw_os_error() == Some(17) && error.to_string().contains("vm1"), "{error}");
    std::fs::remove_dir(&path).unwrap();
    staged.commit().unwrap();
    assert_eq!(SnapshotOptions::new().create(&path).unwrap_err().raw_os_error(), Some(17));
    let orphan = directory.path().join("absent/vm1");
    assert_eq!(SnapshotOptions::new().create(orphan).unwrap_err().raw_os_error(), Some(2));
    assert_eq!(entries(directory.path()), ["vm1"]);
}

#[test]
fn an_open_fragment_and_an_unfinished_one_keep_it_from_being_committed() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1");
        let mut staged = options.create(&path).unwrap();
        let mut fragment = staged.writer().raw_fragment("half").unwrap();
        fragment.write_all(b"half").unwrap();
        let error = staged.commit().unwrap_err();
        assert!(error.is_state() && error.to_string().contains("still being written"), "{error}");
        drop(fragment);
        let error = staged.commit().unwrap_err();
        assert!(error.is_state() && error.to_string().contains("\"half\""), "{error}");
        drop(staged);
        assert_eq!(entries(directory.path()), [""; 0]);

        let mut staged = options.create(&path).unwrap();
        staged.writer().raw_fragment("given up").unwrap().discard().unwrap();
        staged.commit().unwrap();
        assert_eq!(options.open(&path).unwrap().list_fragments().unwrap(), [""; 0]);
    }
}

#[test]
fn fragments_of_a_handle_that_travelled_are_entered_by_the_commit() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1");
        let mut staged = options.create(&path).unwrap();
        let mut state = Vec::new();
        ciborium::into_writer(staged.writer(), &mut state).unwrap();
        let other: SnapshotWriter = ciborium::from_reader(&state[..]).unwrap();
        let mut fragment = other.raw_fragment("there").unwrap();
        fragment.write_all(&vec![3; 700_000]).unwrap();
        fragment.finish().unwrap();
        let mut fragment = staged.writer().raw_fragment("here").unwrap();
        fragment.write_all(&vec![3; 700_000]).unwrap();
        fragment.finish().unwrap();
        staged.commit().unwrap();
        let reader = options.open(&path).unwrap();
        assert_eq!(reader.list_fragments().unwrap(), ["here", "there"]);
        assert_eq!(reader.raw_fragment("there").unwrap().size(), 700_000);
    }
}

#[test]
fn a_snapshot_written_in_place_is_sealed_once() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1");
        let writer = options.create_in_place(&path).unwrap();
        writer.write_fragment("clock", &12_u64).unwrap();
        assert!(options.clone().require_sealed(true).open(&path).unwrap_err().is_not_sealed());
        let open = writer.raw_fragment("open").unwrap();
        assert!(options.seal(&path).unwrap_err().is_state());
        open.finish().unwrap();
        let id = options.seal(&path).unwrap();
        assert!(options.seal(&path).unwrap_err().is_sealed());
        assert!(writer.raw_fragment("more").unwrap_err().is_sealed());
        assert!(writer.add_namespace("more").unwrap_err().is_sealed());
        assert_eq!(options.open(&path).unwrap().seal_digest(), Some(id.seal_digest));
        let other = options.clone().expect_seal_digest([0; 32]).open(&path).unwrap_err();
        assert!(other.is_authentication(), "{other}");
    }
}

#[test]
fn a_sealed_snapshot_gives_only_what_its_manifest_lists() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1");
        let mut staged = options.create(&path).unwrap();
        fill(&staged);
        staged.commit().unwrap();
        std::fs::copy(path.join("clock"), path.join("added")).unwrap();
        std::fs::create_dir(path.join("room")).unwrap();
        std::fs::remove_file(path.join("empty")).unwrap();
        let reader = options.open(&path).unwrap();
        assert_eq!(reader.list_fragments().unwrap(), ["clock", "empty"]);
        assert_eq!(reader.raw_fragment("added").unwrap_err().raw_os_error(), Some(2));
        assert_eq!(reader.namespace("room").unwrap_err().raw_os_error(), Some(2));
        assert!(reader.raw_fragment("empty").unwrap_err().is_corrupt());
        let mut state = Vec::new();
        ciborium::into_writer(&reader, &mut state).unwrap();
        let other: SnapshotReader = ciborium::from_reader(&state[..]).unwrap();
        assert_eq!(other.list_fragments().unwrap(), ["clock", "empty"]);
        std::fs::OpenOptions::new().append(true).open(path.join("clock")).unwrap().write_all(b"x").unwrap();
        assert!(reader.raw_fragment("clock").unwrap_err().is_corrupt());
    }
}

#[test]
fn without_its_manifest_a_committed_snapshot_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for (number, options) in both().into_iter().enumerate() {
        let path = directory.path().join(number.to_string());
        options.create(&path).unwrap().commit().unwrap();
        std::fs::remove_file(path.join("vmsnap_manifest")).unwrap();
        let strict = options.clone().require_sealed(true).open(&path).unwrap_err();
        assert!(strict.is_not_sealed() || strict.is_corrupt());
        if number == 1 {
            assert!(options.open(&path).unwrap_err().is_corrupt());
            assert!(options.append(&path).unwrap_err().is_corrupt());
            assert!(options.seal(&path).unwrap_err().is_corrupt());
        }
    }
}

#[test]
fn clean_removes_what_is_abandoned_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let staged = SnapshotOptions::new().create(directory.path().join("vm1")).unwrap();
    let left = directory.path().join(".vmsnap-0123456789abcdef");
    std::fs::create_dir_all(left.join("deep/deeper")).unwrap();
    for other in [".vmsnap-1", ".vmsnap-0123456789ABCDEF", "vmsnap-0123456789abcdef"] {
        std::fs::create_dir(directory.path().join(other)).unwrap();
    }
    let cleaned = clean(directory.path()).unwrap();
    assert_eq!(cleaned.removed, [left]);
    assert_eq!(cleaned.held.len(), 1);
    drop(staged);
    assert_eq!(entries(directory.path()).len(), 3);
}
