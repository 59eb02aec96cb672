use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::store::remote::test_store::TestStore;
use crate::{Pushed, SecretKey};

const URL: &str = "s3://bucket/vm1";

fn options(store: &TestStore) -> SnapshotOptions {
    let endpoint = store.endpoint();
    SnapshotOptions::new().threads(2).storage_options([
        ("endpoint", &*endpoint),
        ("region", "eu-west-1"),
        ("access_key_id", "test"),
        ("secret_access_key", "of the test"),
    ])
}

struct Source {
    folder: tempfile::TempDir,
    key: SecretKey,
    id: SealId,
}

impl Source {
    /// A snapshot with fragments of several sizes; the largest has two parts.
    fn new() -> Self {
        let (folder, key) = (tempfile::tempdir().unwrap(), SecretKey::generate().unwrap());
        let mut staged = SnapshotOptions::new().key(key.clone()).create(folder.path().join("vm1")).unwrap();
        fill(staged.writer());
        let id = staged.commit().unwrap();
        Self { folder, key, id }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("vm1")
    }

    fn push(&self, store: &TestStore) -> Result<Pushed> {
        options(store).key(self.key.clone()).push(self.path(), URL)
    }

    /// The objects of a complete push.
    fn expected() -> Vec<String> {
        ["devices/vcpu0", "empty", "enc_metadata", "mem", "vmsnap_manifest"].map(str::to_owned).into()
    }

    fn check(&self, store: &TestStore) {
        assert_eq!(store.names(), Self::expected());
        for name in Self::expected() {
            assert_eq!(store.get(&name).unwrap(), std::fs::read(self.path().join(&name)).unwrap(), "{name}");
        }
        assert_eq!(store.open_uploads(), 0);
    }
}

fn fill(writer: &crate::SnapshotWriter) {
    let bytes: Vec<u8> = (0..9_u32 << 18).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut memory = writer.raw_fragment("mem").unwrap();
    memory.write_all(&bytes).unwrap();
    memory.finish().unwrap();
    writer.raw_fragment("empty").unwrap().finish().unwrap();
    writer.add_namespace("devices").unwrap().write_fragment("vcpu0", &"registers").unwrap();
}

#[test]
fn the_objects_of_a_push_are_the_files() {
    let (source, store) = (Source::new(), TestStore::start());
    let pushed = source.push(&store).unwrap();
    assert_eq!((pushed.id, pushed.already_there, pushed.resumed_bytes), (source.id, false, 0));
    source.check(&store);
    let log = store.take_log();
    assert_eq!(log.last().unwrap(), "POST ", "the claim is removed by the last request: {log:?}");
    assert_eq!(log[log.len() - 2], "PUT vm1/vmsnap_manifest");

    let again = source.push(&store).unwrap();
    assert!(again.already_there && again.id == source.id && again.sent_bytes == 0);
    assert_eq!(store.take_log(), ["GET vm1/vmsnap_manifest", "GET vm1/.vmsnap-push"]);

    let archive = source.folder.path().join("vm1.vmsnap.tar");
    options(&store).key(source.key.clone()).pack(source.path(), &archive).unwrap();
    let fresh = TestStore::start();
    options(&fresh).key(source.key.clone()).push(&archive, URL).unwrap();
    source.check(&fresh);
}

#[test]
fn a_push_that_dies_at_any_request_is_no_snapshot_and_resumes_or_is_cleaned() {
    let source = Source::new();
    for loses_answer in [false, true] {
        for number in 0.. {
            let store = TestStore::start();
            store.die_at(number, loses_answer);
            let pushed = source.push(&store);
            if !store.revive() {
                pushed.unwrap();
                break;
            }
            let is_complete = store.get(MANIFEST).is_some();
            match &pushed {
                // Only the claim could not be removed.
                Ok(_) => assert!(is_complete),
                Err(error) => assert!(error.is_transient(), "{number}: {error}"),
            }
            if is_complete {
                let mut expected = Source::expected();
                expected.push(CLAIM.to_owned());
                expected.sort();
                assert!(store.names() == expected || store.names() == Source::expected());
            }
            let open_uploads = store.open_uploads();
            if number % 2 == 0 {
                let cleaned = options(&store).clean(URL, Duration::ZERO).unwrap();
                assert!(cleaned.held.is_empty());
                assert!(store.names() == if is_complete { Source::expected() } else { vec![] }, "{:?}", store.names());
            }
            let resumed = source.push(&store).unwrap();
            assert_eq!(resumed.already_there, is_complete);
            assert_eq!(store.names(), Source::expected());
            // A lifecycle rule removes uploads, which cannot be listed.
            assert_eq!(store.open_uploads(), open_uploads);
        }
    }
}

#[test]
fn a_resumed_push_sends_only_the_rest() {
    let source = Source::new();
    // As if it had been killed before the last steps.
    let claimed = TestStore::start();
    claimed.die_at(8, false);
    source.push(&claimed).unwrap_err();
    claimed.revive();
    claimed.expire_uploads();
    claimed.take_log();
    let there = claimed.names();
    let resumed = source.push(&claimed).unwrap();
    let sizes = |name: &String| std::fs::metadata(source.path().join(name)).unwrap().len();
    assert_eq!(resumed.resumed_bytes, there.iter().filter(|name| *name != CLAIM).map(sizes).sum::<u64>());
    let log = claimed.take_log();
    for name in there.iter().filter(|name| *name != CLAIM) {
        assert!(log.contains(&format!("HEAD vm1/{name}")) && !log.contains(&format!("PUT vm1/{name}")), "{log:?}");
    }
    source.check(&claimed);
}

#[test]
fn another_object_of_the_same_size_is_sent_again() {
    let (source, store) = (Source::new(), TestStore::start());
    store.die_at(8, false);
    source.push(&store).unwrap_err();
    store.revive();
    store.expire_uploads();
    let file = std::fs::read(source.path().join("devices/vcpu0")).unwrap();
    store.put("devices/vcpu0", &vec![7; file.len()]);
    source.push(&store).unwrap();
    source.check(&store);
}

#[test]
fn of_two_pushes_at_once_one_wins_and_the_other_says_so() {
    let (first, second, store) = (Source::new(), Source::new(), TestStore::start());
    store.die_at(8, false);
    first.push(&store).unwrap_err();
    store.revive();
    store.expire_uploads();
    let error = second.push(&store).unwrap_err();
    assert!(error.is_state() && error.to_string().contains("pushes another snapshot there since"), "{error}");
    first.push(&store).unwrap();
    let error = second.push(&store).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
    first.check(&store);

    let store = TestStore::start();
    std::thread::scope(|scope| {
        let results =
            [&first, &second].map(|source| scope.spawn(|| source.push(&store))).map(|push| push.join().unwrap());
        let won: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
        assert_eq!(won.len(), 1, "{results:?}");
        (if won[0].id == first.id { &first } else { &second }).check(&store);
    });
}

#[test]
fn a_place_that_was_taken_over_has_nothing_of_the_first_push() {
    let (first, store) = (Source::new(), TestStore::start());
    store.die_at(8, false);
    first.push(&store).unwrap_err();
    store.revive();
    store.expire_uploads();
    store.put("left", b"of the first");
    let second = Source::new();
    let pushed = options(&store).key(second.key.clone()).take_over(true).push(second.path(), URL).unwrap();
    assert_eq!(pushed.resumed_bytes, 0);
    second.check(&store);
}

#[test]
fn other_objects_at_the_prefix_stay() {
    let (source, store) = (Source::new(), TestStore::start());
    store.put("notes.txt", b"of somebody");
    for take_over in [false, true] {
        let error = options(&store).key(source.key.clone()).take_over(take_over).push(source.path(), URL).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
        assert!(error.to_string().contains("notes.txt"), "{error}");
        assert_eq!(store.names(), ["notes.txt"]);
    }
}

#[test]
fn damage_in_the_source_removes_what_was_sent() {
    let (source, store) = (Source::new(), TestStore::start());
    let file = source.path().join("devices/vcpu0");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = source.push(&store).unwrap_err();
    assert!(error.is_authentication() && error.to_string().contains("vcpu0"), "{error}");
    assert_eq!((store.names(), store.open_uploads()), (vec![], 0));
}

#[test]
fn an_unsealed_snapshot_and_a_wrong_name_are_refused_before_anything_is_sent() {
    let (folder, store) = (tempfile::tempdir().unwrap(), TestStore::start());
    let path = folder.path().join("vm1");
    options(&store).create_in_place(&path).unwrap().write_fragment("a\u{1}b", &1).unwrap();
    let error = options(&store).push(&path, URL).unwrap_err();
    assert!(error.is_not_sealed() && error.to_string().contains("vmsnap seal"), "{error}");
    options(&store).seal(&path).unwrap();
    let error = options(&store).push(&path, URL).unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("control character"), "{error}");
    assert!(store.names().is_empty());
    let error = options(&store).push(&path, folder.path().join("copy")).unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("s3://"), "{error}");
}

#[test]
fn a_snapshot_is_written_straight_into_the_store() {
    let (store, key) = (TestStore::start(), SecretKey::generate().unwrap());
    let options = options(&store).key(key);
    let mut staged = options.create(URL).unwrap();
    assert_eq!(staged.location(), Path::new(URL));
    let error = staged.writer().write_fragment("a/b", &1).unwrap_err();
    assert!(error.is_invalid_argument());
    fill(staged.writer());
    let error = staged.writer().write_fragment("empty", &1).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
    let error = serde_json::to_string(staged.writer()).unwrap_err();
    assert!(error.to_string().contains("one process"), "{error}");
    assert!(store.get(MANIFEST).is_none() && store.get(CLAIM).is_some());
    let begun = staged.writer().raw_fragment("begun").unwrap();
    assert!(staged.commit().unwrap_err().is_state());
    begun.discard().unwrap();
    let id = staged.commit().unwrap();
    assert_eq!(store.names(), ["devices/vcpu0", "empty", "enc_metadata", "mem", "vmsnap_manifest"]);
    assert_eq!(store.open_uploads(), 0);

    // The same bytes in a directory are a snapshot.
    let folder = tempfile::tempdir().unwrap();
    for name in store.names() {
        let at = folder.path().join("vm1").join(&name);
        std::fs::create_dir_all(at.parent().unwrap()).unwrap();
        std::fs::write(at, store.get(&name).unwrap()).unwrap();
    }
    let verified = options.verify(folder.path().join("vm1")).unwrap();
    assert_eq!((verified.problems, verified.seal), (vec![], Some(id)));

    let error = options.create(URL).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
}

#[test]
fn a_create_that_dies_at_any_request_is_complete_or_is_cleaned() {
    for loses_answer in [false, true] {
        for number in 0.. {
            let store = TestStore::start();
            store.die_at(number, loses_answer);
            let mut alive = None;
            let created = options(&store).create(URL).and_then(|mut staged| {
                let written = staged.writer().write_fragment("clock", &1).and_then(|()| {
                    let mut memory = staged.writer().raw_fragment("mem")?;
                    memory.write_all_interruptible(&vec![7; 9 << 20], &mut || Ok(()))?;
                    memory.finish()
                });
                let committed = written.and_then(|()| staged.commit());
                // A killed process does not clean up.
                alive = Some(std::mem::ManuallyDrop::new(staged));
                committed
            });
            if !store.revive() {
                created.unwrap();
                break;
            }
            let is_complete = store.get(MANIFEST).is_some();
            assert!(created.is_ok() || created.unwrap_err().is_transient());
            let rest = is_complete || store.get(CLAIM).is_some() || store.names().is_empty();
            assert!(rest, "{number}: {:?}", store.names());
            if number % 2 == 0 {
                // The process lives: dropping removes everything, and also a manifest that a commit has stored.
                if let Some(staged) = alive.take() {
                    let was_committed = format!("{staged:?}").contains("committed");
                    drop(std::mem::ManuallyDrop::into_inner(staged));
                    assert_eq!(store.names().is_empty(), !was_committed, "{number}: {:?}", store.names());
                    if !was_committed {
                        continue;
                    }
                }
            }
            options(&store).clean(URL, Duration::ZERO).unwrap();
            let expected: &[&str] = if is_complete { &["clock", "mem", MANIFEST] } else { &[] };
            assert_eq!(store.names(), expected, "{number}");
        }
    }
}

#[test]
fn an_error_of_the_caller_leaves_nothing() {
    let store = TestStore::start();
    let staged = options(&store).create(URL).unwrap();
    let mut memory = staged.writer().raw_fragment("mem").unwrap();
    memory.write_all(&vec![7; 20 << 20]).unwrap();
    staged.writer().write_fragment("clock", &1).unwrap();
    drop(staged);
    drop(memory);
    assert_eq!((store.names(), store.open_uploads()), (vec![], 0));
}

#[test]
fn a_writer_whose_claim_was_taken_over_completes_nothing_and_removes_nothing() {
    let store = TestStore::start();
    let mut first = options(&store).create(URL).unwrap();
    first.writer().write_fragment("clock", &1).unwrap();
    let mut second = options(&store).take_over(true).create(URL).unwrap();
    second.writer().write_fragment("clock", &2).unwrap();
    let error = first.commit().unwrap_err();
    assert!(error.is_state() && error.to_string().contains("taken over"), "{error}");
    drop(first);
    assert!(store.get("clock").is_some());
    second.commit().unwrap();
    assert_eq!(store.names(), ["clock", "vmsnap_manifest"]);
}

#[test]
fn clean_leaves_what_is_new_and_what_is_complete() {
    let store = TestStore::start();
    let staged = options(&store).create("s3://bucket/vm1/fleet/a").unwrap();
    options(&store).create("s3://bucket/vm1/fleet/b").unwrap().commit().unwrap();
    let cleaned = options(&store).clean(URL, Duration::from_secs(3600)).unwrap();
    assert_eq!((cleaned.removed.len(), &*cleaned.held), (0, &[PathBuf::from("s3://bucket/vm1/fleet/a")][..]));
    store.put("fleet/a/mem", b"x");
    store.put("other", b"x");
    let cleaned = options(&store).clean(URL, Duration::ZERO).unwrap();
    assert_eq!((cleaned.held.len(), &*cleaned.removed), (0, &[PathBuf::from("s3://bucket/vm1/fleet/a")][..]));
    assert_eq!(store.names(), ["fleet/b/vmsnap_manifest", "other"]);
    drop(staged);
}
