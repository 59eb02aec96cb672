//! The promises that every store keeps, in one suite that runs for each.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::archive::assemble;
use super::directory::{Directory, StagedDirectory};
use super::{Draft, RemoteOptions, Store, Survey};
use crate::location::{LocalPath, Location};
use crate::manifest::{Entry, Manifest, Proof};
use crate::name::SnapshotPath;
use crate::threads::{Interrupt, for_each};

const MANIFEST: &[u8] = b"the stored manifest";
const KEY_METADATA: &[u8] = b"the wrapped key";

fn contents() -> [(&'static str, Vec<u8>); 5] {
    let bytes = |length: u32| (0..length).map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    [("a", bytes(10)), ("empty", bytes(0)), ("n/large", bytes(70_000)), ("n/n/small", bytes(512)), ("z", bytes(65_536))]
}

fn path(text: &str) -> SnapshotPath {
    text.to_owned().try_into().unwrap()
}

fn location(at: &Path) -> LocalPath {
    LocalPath::new(at).unwrap()
}

fn manifest(encrypted: bool) -> Manifest {
    let entry = |bytes: &[u8]| {
        let size = bytes.len() as u64;
        Entry { size, stored_size: size, proof: Proof::Blake3(*blake3::hash(bytes).as_bytes()) }
    };
    let fragments = contents().iter().map(|(path, bytes)| ((*path).to_owned(), entry(bytes))).collect();
    Manifest::new([7; 16], encrypted, ["n".into(), "n/n".into()].into(), fragments)
}

fn fill(draft: &Draft, encrypted: bool) {
    let go_on = &mut || Ok(());
    let interrupt = &mut Interrupt::new(go_on);
    if encrypted {
        draft.write_key_metadata(KEY_METADATA).unwrap();
    }
    for namespace in ["n", "n/n"] {
        draft.add_namespace(&path(namespace)).unwrap();
    }
    for (name, bytes) in contents() {
        let object = draft.create(&path(name), None).unwrap();
        object.write_all_at(&bytes, 0, interrupt).unwrap();
        object.finish(interrupt).unwrap();
    }
}

/// A new snapshot in an object store.
#[cfg(feature = "object-store")]
fn upload() -> super::remote::SnapshotUpload {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::remote::{Bucket, SnapshotUpload};
    static COUNT: AtomicU32 = AtomicU32::new(0);

    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let location = Location::new(Path::new(&format!("memory://contract/{number}/vm1"))).unwrap();
    let Location::Url(url) = location else { panic!("a URL is a URL") };
    let bucket = Bucket::new(url, RemoteOptions::default()).unwrap();
    SnapshotUpload::create(bucket, false, &mut Interrupt::new(&mut || Ok(()))).unwrap()
}

/// The same snapshot in an object store.
#[cfg(feature = "object-store")]
fn remote(encrypted: bool) -> Store {
    let draft = upload();
    fill(&Draft::Upload(draft.clone()), encrypted);
    draft.stop_writers().unwrap();
    draft.publish(MANIFEST.to_vec(), &mut Interrupt::new(&mut || Ok(()))).unwrap();
    Store::at(Location::Url(draft.url().clone()), &RemoteOptions::default()).unwrap()
}

/// The snapshot of another store, opened again.
fn opened_again(store: &Store) -> Store {
    Store::at(Location::new(store.path()).unwrap(), &RemoteOptions::default()).unwrap()
}

/// The same snapshot in every kind of store, each made from the draft that leads to it.
fn stores(folder: &Path, manifest: &Manifest, encrypted: bool) -> Vec<Store> {
    let [in_place, staged, archive] = ["in place", "staged", "archive"].map(|name| location(&folder.join(name)));

    let directory = Directory::create_in_place(in_place.clone()).unwrap();
    fill(&Draft::InPlace(directory.clone()), encrypted);
    let locked = directory.lock_exclusive().unwrap();
    directory.write_manifest(&locked, MANIFEST, true).unwrap();

    let draft = StagedDirectory::create(staged.clone()).unwrap();
    fill(&Draft::Staged(draft.directory().clone()), encrypted);
    draft.stop_writers().unwrap();
    draft.publish(MANIFEST, true, &mut || Ok(())).unwrap();
    draft.sync_entry().unwrap();

    let draft = StagedDirectory::create(archive.clone()).unwrap();
    fill(&Draft::Staged(draft.directory().clone()), encrypted);
    draft.stop_writers().unwrap();
    assemble::publish(&draft, manifest, MANIFEST, true, &mut Interrupt::new(&mut || Ok(()))).unwrap();
    draft.finish_archive(true).unwrap();

    let local = [in_place, staged, archive].map(Store::at_path).into_iter();
    #[cfg(feature = "object-store")]
    let local = local.chain([remote(encrypted)]);
    local.collect()
}

fn for_each_store(mut check: impl FnMut(Store, &Manifest, bool)) {
    for encrypted in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let manifest = manifest(encrypted);
        for store in stores(folder.path(), &manifest, encrypted) {
            check(store, &manifest, encrypted);
        }
    }
}

fn read(store: &Store, name: &str, manifest: Option<&Manifest>) -> Vec<u8> {
    let object = store.object(&path(name), manifest).unwrap();
    let mut bytes = vec![1; usize::try_from(object.size()).unwrap()];
    object.read_exact_at(&mut bytes, 0, &mut Interrupt::new(&mut || Ok(()))).unwrap();
    bytes
}

#[test]
fn the_files_at_the_root_are_those_that_were_written() {
    for_each_store(|store, manifest, encrypted| {
        let head = store.head(&mut || Ok(())).unwrap();
        assert_eq!(head.key_metadata.unwrap().as_deref(), encrypted.then_some(KEY_METADATA));
        assert_eq!(head.manifest.unwrap().unwrap(), MANIFEST);
        assert!(store.is_sealed().unwrap());
        store.settle(manifest).unwrap();
    });
}

#[test]
fn every_range_of_an_object_is_read_by_any_thread() {
    for_each_store(|store, manifest, _| {
        for known in [Some(manifest), None] {
            for (name, bytes) in contents() {
                assert_eq!(read(&store, name, known), bytes, "{name}");
            }
        }
        let object = store.object(&path("n/large"), Some(manifest)).unwrap();
        let (_, bytes) = &contents()[2];
        let ranges = (0..70_000_usize).step_by(977).map(|start| start..70_000.min(start + 1 + start % 5000));
        let go_on = &mut || Ok(());
        for_each(&mut [(); 3], ranges, &mut Interrupt::new(go_on), |(), range, interrupt| {
            let mut part = vec![0; range.len()];
            object.read_exact_at(&mut part, range.start as u64, interrupt)?;
            assert_eq!(part, bytes[range]);
            Ok(())
        })
        .unwrap();
        let beside = store.path().parent().filter(|parent| parent.is_dir());
        let target = beside.map_or_else(tempfile::NamedTempFile::new, tempfile::NamedTempFile::new_in).unwrap();
        if object.clone_range(0..65_536, target.as_file(), 0) {
            assert_eq!(
                std::fs::read(target.path()).unwrap(),
                bytes[..65_536],
                "the blocks of another place are shared"
            );
        }
        // Other bytes follow the object in an archive.
        let go_on = &mut || Ok(());
        let interrupt = &mut Interrupt::new(go_on);
        assert!(object.read_exact_at(&mut [0; 2], 69_999, interrupt).unwrap_err().is_corrupt());
    });
}

#[test]
fn an_object_that_is_absent_is_not_found() {
    for_each_store(|store, manifest, _| {
        for known in [Some(manifest), None] {
            let error = store.object(&path("absent"), known).err().unwrap();
            assert!(error.is_not_found(), "{error}");
            assert!(store.object(&path("n"), known).is_err());
        }
    });
}

#[test]
fn a_survey_finds_everything_with_its_stored_size() {
    for_each_store(|store, manifest, _| {
        for known in [Some(manifest), None] {
            let survey = store.survey(known, &mut || Ok(())).unwrap().strict().unwrap();
            let mut found: Vec<_> =
                survey.fragments.iter().map(|stored| (stored.path.as_str(), stored.stored_size)).collect();
            found.sort_unstable();
            let expected = contents().map(|(path, bytes)| (path, bytes.len() as u64));
            assert_eq!(found, expected);
            assert!(survey.fragments.iter().all(|stored| stored.finished));
            assert!(survey.namespaces.iter().map(SnapshotPath::as_str).eq(["n", "n/n"]));
            assert!(survey.strange.is_empty());
        }
    });
}

#[test]
fn an_interrupt_ends_a_survey() {
    for_each_store(|store, manifest, _| {
        let interrupted = store.survey(Some(manifest), &mut || Err(crate::error::Error::interrupted()));
        assert!(interrupted.err().unwrap().is_interrupted());
    });
}

#[test]
fn other_key_metadata_changes_nothing_else() {
    for_each_store(|store, manifest, encrypted| {
        if !encrypted {
            return;
        }
        store.head(&mut || Ok(())).unwrap();
        store.settle(manifest).unwrap();
        for length in [1, 500, 62_000, 63_000, 200_000, 3] {
            let wrapped = vec![9; length];
            opened_again(&store).replace_key_metadata(&wrapped, &mut || Ok(())).unwrap();
            let fresh = opened_again(&store);
            assert_eq!(fresh.head(&mut || Ok(())).unwrap().key_metadata.unwrap().unwrap(), wrapped);
            for store in [&store, &fresh] {
                store.settle(manifest).unwrap();
                for (name, bytes) in contents() {
                    assert_eq!(read(store, name, Some(manifest)), bytes, "{name}");
                }
            }
            assert!(fresh.survey(Some(manifest), &mut || Ok(())).unwrap().strange.is_empty());
        }
        // An open archive stays with its old file, which must not come back; nor must the old object of a bucket.
        let outdated = store.replace_key_metadata(KEY_METADATA, &mut || Ok(()));
        assert_eq!(outdated.is_err_and(|error| error.is_state()), !matches!(store, Store::Directory(_)));
        if let Ok(beside) = std::fs::read_dir(store.path().parent().unwrap()) {
            assert_eq!(beside.count(), 3, "nothing is left");
        }
    });
}

#[test]
fn a_handle_reads_the_same_after_it_was_serialized() {
    for_each_store(|store, manifest, _| {
        let mut bytes = Vec::new();
        ciborium::into_writer(&store, &mut bytes).unwrap();
        let copy: Store = ciborium::from_reader(&bytes[..]).unwrap();
        assert_eq!(copy.path(), store.path());
        for (name, bytes) in contents() {
            assert_eq!(read(&copy, name, Some(manifest)), bytes);
        }
    });
}

#[test]
fn nothing_is_added_to_a_sealed_snapshot() {
    for_each_store(|store, _, _| {
        let refused =
            store.directory().and_then(|directory| Draft::InPlace(directory.clone()).create(&path("more"), None));
        assert!(refused.err().unwrap().is_sealed());
    });
}

fn drafts(folder: &Path) -> (StagedDirectory, Vec<Draft>) {
    let staged = StagedDirectory::create(location(&folder.join("staged"))).unwrap();
    let in_place = Directory::create_in_place(location(&folder.join("in place"))).unwrap();
    let local = [Draft::InPlace(in_place), Draft::Staged(staged.directory().clone())].into_iter();
    #[cfg(feature = "object-store")]
    let local = local.chain([Draft::Upload(upload())]);
    (staged, local.collect())
}

/// The contents of a draft.
fn survey(draft: &Draft) -> Survey {
    match draft {
        Draft::InPlace(directory) | Draft::Staged(directory) => directory.survey(&mut || Ok(())).unwrap(),
        #[cfg(feature = "object-store")]
        Draft::Upload(upload) => upload.survey().unwrap(),
    }
}

/// Whether a commit refuses because something is still being written.
fn is_being_written(draft: &Draft, staged: &StagedDirectory) -> bool {
    let stopped = match draft {
        Draft::InPlace(_) => return true,
        Draft::Staged(_) => staged.stop_writers(),
        #[cfg(feature = "object-store")]
        Draft::Upload(upload) => upload.stop_writers(),
    };
    stopped.is_err_and(|error| error.is_state())
}

#[test]
fn an_object_is_written_in_any_order_by_any_thread() {
    let folder = tempfile::tempdir().unwrap();
    let (_staged, drafts) = drafts(folder.path());
    for draft in drafts {
        let object = draft.create(&path("a"), None).unwrap();
        let parts = (0..40_u16).map(|number| u8::try_from(number * 7 % 40).unwrap());
        let go_on = &mut || Ok(());
        for_each(&mut [(); 3], parts, &mut Interrupt::new(go_on), |(), part, interrupt| {
            object.write_runs_at(&[&[part; 10], &[part + 1; 5]], u64::from(part) * 15, interrupt)
        })
        .unwrap();
        assert_eq!(object.stored_size().unwrap(), 600);
        object.set_size(700).unwrap();
        object.finish(&mut Interrupt::new(&mut || Ok(()))).unwrap();
        let store = Store::at(Location::new(draft.path()).unwrap(), &RemoteOptions::default()).unwrap();
        let expected: Vec<u8> = (0..40_u8).flat_map(|part| [[part; 10].as_slice(), &[part + 1; 5]].concat()).collect();
        assert_eq!(read(&store, "a", None), [expected, vec![0; 100]].concat());
    }
}

#[test]
fn an_object_that_was_not_finished_never_counts_as_complete() {
    let folder = tempfile::tempdir().unwrap();
    let (staged, drafts) = drafts(folder.path());
    for draft in &drafts {
        let survey = || survey(draft);
        let object = draft.create(&path("a"), None).unwrap();
        let again = draft.create(&path("a"), None).err().unwrap();
        assert_eq!(again.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(survey().fragments[0].finished, !draft.is_staged());
        assert!(is_being_written(draft, &staged));

        object.discard().unwrap();
        object.discard().unwrap();
        assert!(survey().fragments.is_empty());

        let object = draft.create(&path("b"), None).unwrap();
        object.write_all_at(b"half", 0, &mut Interrupt::new(&mut || Ok(()))).unwrap();
        object.abandon();
        assert!(survey().fragments.iter().all(|stored| !stored.finished));
        assert_eq!(survey().fragments.len(), usize::from(draft.is_staged()));
    }
    drafts.iter().skip(1).for_each(|draft| assert!(!is_being_written(draft, &staged)));
}

#[test]
fn a_file_of_another_kind_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("file");
    let tar = std::process::Command::new("tar").arg("-cf").arg(&at).arg("-C").arg(folder.path()).arg(".").status();
    let mut said = Vec::new();
    if tar.is_ok_and(|status| status.success()) {
        said.push(Store::at_path(location(&at)).head(&mut || Ok(())).err().unwrap().to_string());
        assert!(said[0].contains("unpack it with tar"), "{said:?}");
    }
    let file = std::fs::File::create(&at).unwrap();
    for contents in [&b""[..], b"\x7fELF"] {
        file.write_all_at(contents, 0).unwrap();
        let error = Store::at_path(location(&at)).head(&mut || Ok(())).err().unwrap();
        assert!(error.is_corrupt() && error.to_string().contains("not a vmsnap archive"), "{error}");
    }
}
