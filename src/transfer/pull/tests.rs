use std::io::Write;
use std::path::PathBuf;

use super::*;
use crate::store::remote::test_store::TestStore;
use crate::{SecretKey, SnapshotReader};

const URL: &str = "s3://bucket/vm1";

fn options(store: &TestStore, key: Option<&SecretKey>) -> SnapshotOptions {
    let endpoint = store.endpoint();
    let options = SnapshotOptions::new().threads(2).storage_options([
        ("endpoint", &*endpoint),
        ("region", "eu-west-1"),
        ("access_key_id", "test"),
        ("secret_access_key", "of the test"),
    ]);
    key.into_iter().fold(options, |options, key| options.key(key.clone()))
}

/// A store with a snapshot: a large fragment with a hole, and small ones.
fn stored(key: Option<&SecretKey>) -> (TestStore, SealId) {
    let store = TestStore::start();
    let mut staged = options(&store, key).create(URL).unwrap();
    let writer = staged.writer();
    let mut memory = writer.raw_fragment("mem").unwrap();
    memory.write_all(&vec![7; 5 << 20]).unwrap();
    memory.write_all(&vec![0; 3 << 20]).unwrap();
    memory.write_all(b"end").unwrap();
    memory.finish().unwrap();
    let devices = writer.add_namespace("devices").unwrap();
    devices.add_namespace("none").unwrap();
    for number in 0..12_u32 {
        devices.write_fragment(&format!("vcpu{number}"), &number).unwrap();
    }
    writer.raw_fragment("empty").unwrap().finish().unwrap();
    let id = staged.commit().unwrap();
    (store, id)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn check(reader: &SnapshotReader) {
    assert_eq!(reader.namespace("devices").unwrap().read_fragment::<u32>("vcpu11").unwrap(), 11);
    assert!(reader.namespace("devices").unwrap().namespace("none").is_ok());
}

#[test]
fn a_pulled_snapshot_has_the_bytes_of_the_objects() {
    for key in [None, Some(SecretKey::generate().unwrap())] {
        let ((store, id), folder) = (stored(key.as_ref()), tempfile::tempdir().unwrap());
        let options = options(&store, key.as_ref());
        let copy = folder.path().join("copy");
        assert_eq!(options.pull(URL, &copy).unwrap(), id);
        for name in store.names() {
            assert_eq!(std::fs::read(copy.join(&name)).unwrap(), store.get(&name).unwrap(), "{name}");
        }
        assert!(options.verify(&copy).unwrap().problems.is_empty());
        check(&options.open(&copy).unwrap());

        let archive = folder.path().join("vm1.vmsnap.tar");
        assert_eq!(options.pull(URL, &archive).unwrap(), id);
        let packed = folder.path().join("packed");
        options.pack(&copy, &packed).unwrap();
        assert_eq!(std::fs::read(&archive).unwrap(), std::fs::read(&packed).unwrap());
        assert_eq!(entries(folder.path()).len(), 3);
        let error = options.pull(URL, &copy).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
    }
}

#[test]
fn damage_of_any_object_leaves_nothing() {
    for key in [None, Some(SecretKey::generate().unwrap())] {
        let ((store, _), folder) = (stored(key.as_ref()), tempfile::tempdir().unwrap());
        let names =
            ["mem", "devices/vcpu7", "vmsnap_manifest"].into_iter().chain(key.is_some().then_some("enc_metadata"));
        for name in names {
            let bytes = store.get(name).unwrap();
            let mut changed = bytes.clone();
            changed[bytes.len() / 2] ^= 1;
            for damaged in [&changed[..], &bytes[..bytes.len() - 1], &[&bytes[..], b"x"].concat()] {
                store.put(name, damaged);
                let error = options(&store, key.as_ref()).pull(URL, folder.path().join("copy")).unwrap_err();
                let is_found = error.is_corrupt()
                    || error.is_authentication()
                    || error.is_unsupported_format()
                    || error.is_key_unavailable();
                assert!(is_found, "{name}: {error}");
                assert!(entries(folder.path()).is_empty());
            }
            store.put(name, &bytes);
        }
        options(&store, key.as_ref()).pull(URL, folder.path().join("copy")).unwrap();
    }
}

#[test]
fn a_pull_that_loses_the_store_at_any_request_leaves_nothing() {
    let ((store, _), folder) = (stored(None), tempfile::tempdir().unwrap());
    for number in 0.. {
        store.die_at(number, false);
        let pulled = options(&store, None).pull(URL, folder.path().join("copy"));
        if !store.revive() {
            pulled.unwrap();
            break;
        }
        let error = pulled.unwrap_err();
        assert!(error.is_transient(), "{number}: {error}");
        assert!(entries(folder.path()).is_empty());
    }
}

#[test]
fn a_pull_can_be_stopped_and_needs_a_url_and_a_snapshot() {
    let ((store, _), folder) = (stored(None), tempfile::tempdir().unwrap());
    let target = folder.path().join("copy");
    let stop = &mut || Err(Error::interrupted());
    assert!(
        options(&store, None)
            .pull_interruptible(URL, &target, &Progress::default(), stop)
            .unwrap_err()
            .is_interrupted()
    );
    let error = options(&store, None).pull(folder.path(), &target).unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("s3://"), "{error}");
    let error = options(&store, None).pull("s3://bucket/other", &target).unwrap_err();
    assert!(error.is_not_found(), "{error}");
    assert!(options(&store, None).pull(URL, "s3://bucket/other").unwrap_err().is_invalid_argument());
    assert!(entries(folder.path()).is_empty());
}
