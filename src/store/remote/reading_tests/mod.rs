//! Snapshots read in place, from a server that counts requests, and from the store in memory.

mod blocks;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use bytes::Bytes;
use object_store::Attributes;

use super::cache::{self, BlockCache, BlockName};
use super::pool::BLOCK_BYTES;
use super::settings::tests::url;
use super::test_server::{Reply, Request, Server};
use super::{Bucket, Remote};
use crate::error::Result;
use crate::location::{Location, StoreUrl};
use crate::memory::{GuestDestination, GuestRegion, MemoryOptions};
use crate::snapshot::{SnapshotOptions, SnapshotReader};
use crate::store::{CacheOptions, RemoteOptions, Store};
use crate::threads::{Interrupt, lock};
use crate::verify::ProblemKind;

type Files = BTreeMap<String, Vec<u8>>;

/// The answer of S3 for an object. All objects have the same `etag`.
fn answer(files: &Files, request: &Request, etag: &str) -> Reply {
    let name = request.target.trim_start_matches("/bucket/vm1/");
    let Some(bytes) = files.get(name) else { return Reply::error(404, "NoSuchKey", "") };
    if request.header("if-match").is_some_and(|expected| expected != etag) {
        return Reply::error(412, "PreconditionFailed", "");
    }
    let reply = match request.header("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) {
        None => Reply::object(bytes),
        Some((first, last)) => {
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            if first >= bytes.len() {
                return Reply::error(416, "InvalidRange", "");
            }
            let last = last.min(bytes.len() - 1);
            Reply::part(&format!("bytes {first}-{last}/{}", bytes.len()), &bytes[first..=last])
        }
    };
    reply.with("ETag", etag)
}

fn serve(files: Files) -> Server {
    Server::start(move |_, request| answer(&files, request, "\"1\""))
}

fn names(server: &Server) -> Vec<String> {
    let mut names: Vec<_> =
        server.requests().iter().map(|request| request.target.replace("/bucket/vm1/", "")).collect();
    names.sort();
    names
}

fn options(server: &Server, base: &SnapshotOptions) -> SnapshotOptions {
    SnapshotOptions { remote: server.bucket().options().clone(), ..base.clone() }
}

fn open(server: &Server, base: &SnapshotOptions) -> SnapshotReader {
    options(server, base).open("s3://bucket/vm1").unwrap()
}

/// The files of a directory.
fn files(directory: &Path) -> Files {
    let mut files = Files::new();
    let mut left = vec![directory.to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let name = path.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
            files.insert(name, std::fs::read(path).unwrap());
        }
    }
    files
}

/// Bytes that do not repeat from block to block.
fn pattern(length: usize) -> Vec<u8> {
    (0..=length as u64 / 8).flat_map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_le_bytes()).take(length).collect()
}

/// A snapshot with 9 MiB of guest memory, of which the last page is not zero, and a large fragment.
fn snapshot(options: &SnapshotOptions, compressed: bool) -> (Files, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1");
    let mut staged = options.create(&path).unwrap();
    let ram = pattern(9 << 20);
    let memory = MemoryOptions::new().compress(compressed);
    staged.writer().write_memory(&[GuestRegion::new(0x1000, &ram)], &memory).unwrap();
    let devices = staged.writer().add_namespace("devices").unwrap();
    let mut fragment = devices.raw_fragment("sda").unwrap();
    std::io::Write::write_all(&mut fragment, &pattern(5 << 20)).unwrap();
    fragment.finish().unwrap();
    staged.commit().unwrap();
    (files(&path), ram)
}

fn encrypted() -> SnapshotOptions {
    SnapshotOptions::new().key([7; 32].into())
}

/// Answers requests for these objects only when all of them were asked for.
struct Together {
    groups: Vec<&'static [&'static str]>,
    asked: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Together {
    fn wait(&self, name: &str) {
        let mut asked = lock(&self.asked);
        asked.push(name.to_owned());
        self.changed.notify_all();
        let Some(group) = self.groups.iter().find(|group| group.contains(&name)) else { return };
        while !group.iter().all(|other| asked.iter().any(|name| name == other)) {
            let (again, waited) = self.changed.wait_timeout(asked, Duration::from_secs(60)).unwrap();
            assert!(!waited.timed_out(), "{name} was asked for alone");
            asked = again;
        }
    }
}

#[test]
fn the_first_bytes_of_guest_memory_take_two_round_trips() {
    for (base, compressed) in
        [(SnapshotOptions::new(), false), (SnapshotOptions::new(), true), (encrypted(), false), (encrypted(), true)]
    {
        let (files, ram) = snapshot(&base, compressed);
        let together = Together {
            groups: vec![&["enc_metadata", "vmsnap_manifest"], &["mem", "mem_metadata"]],
            asked: Mutex::default(),
            changed: Condvar::new(),
        };
        let server = Server::start(move |_, request| {
            together.wait(request.target.trim_start_matches("/bucket/vm1/"));
            answer(&files, request, "\"1\"")
        });
        let reader = open(&server, &base);
        assert_eq!(reader.location(), Path::new("s3://bucket/vm1"));
        assert_eq!(reader.list_namespaces().unwrap(), ["devices"]);
        let memory = reader.memory().unwrap();
        let mut page = [0; 4096];
        memory.read_at(0x1000, &mut page).unwrap();
        assert_eq!(page, ram[..4096]);
        assert_eq!(names(&server), ["enc_metadata", "mem", "mem_metadata", "vmsnap_manifest"]);
        assert!(server.requests().iter().all(|request| request.method == "GET"));
    }
}

#[test]
fn a_whole_snapshot_is_read_and_restored() {
    for (base, compressed) in [(SnapshotOptions::new(), true), (encrypted(), false), (encrypted(), true)] {
        let (files, ram) = snapshot(&base, compressed);
        let blocks = files["mem"].len().div_ceil(BLOCK_BYTES);
        let server = serve(files);
        let reader = open(&server, &base);
        let mut back = vec![0; ram.len()];
        reader.memory().unwrap().restore(&mut [GuestDestination::buffer(&mut back)]).unwrap();
        assert!(back == ram);
        assert_eq!(names(&server).iter().filter(|name| *name == "mem").count(), blocks, "each block is fetched once");
        let mut bytes = Vec::new();
        let mut fragment = reader.namespace("devices").unwrap().raw_fragment("sda").unwrap();
        std::io::Read::read_to_end(&mut fragment, &mut bytes).unwrap();
        assert!(bytes == pattern(5 << 20));
        // A handle reads the same in another process.
        let text = serde_json::to_vec(&reader).unwrap();
        let again: SnapshotReader = serde_json::from_slice(&text).unwrap();
        assert_eq!(again.namespace("devices").unwrap().raw_fragment("sda").unwrap().size(), 5 << 20);
    }
}

#[test]
fn nothing_is_asked_before_the_first_read_of_a_plain_fragment() {
    let (files, _) = snapshot(&SnapshotOptions::new(), false);
    let server = serve(files);
    let reader = open(&server, &SnapshotOptions::new());
    let fragment = reader.namespace("devices").unwrap().raw_fragment("sda").unwrap();
    assert_eq!(fragment.size(), 5 << 20);
    assert_eq!(server.requests().len(), 2);
    assert!(reader.raw_fragment("absent").unwrap_err().is_not_found());
    assert!(reader.raw_fragment("devices").unwrap_err().is_not_found());
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn a_place_without_a_manifest_is_not_a_snapshot() {
    let (mut files, _) = snapshot(&encrypted(), false);
    files.remove("vmsnap_manifest");
    let incomplete = serve(files);
    let error = options(&incomplete, &encrypted()).open("s3://bucket/vm1").unwrap_err();
    assert!(error.is_corrupt() && error.to_string().contains("not complete"), "{error}");
    let empty = serve(Files::new());
    let error = options(&empty, &SnapshotOptions::new()).open("s3://bucket/vm1").unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains("s3://bucket/vm1"), "{error}");
}

fn cache_options(directory: &Path) -> CacheOptions {
    CacheOptions { directory: directory.to_owned(), max_bytes: 1 << 30 }
}

fn cached(server: &Server, base: &SnapshotOptions, directory: &Path) -> SnapshotOptions {
    let mut options = options(server, base);
    options.remote.cache = Some(cache_options(directory));
    options
}

fn read_sda(options: &SnapshotOptions) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 5 << 20];
    let reader = options.open("s3://bucket/vm1")?;
    let read = reader.namespace("devices")?.raw_fragment("sda")?.read_at(0, &mut bytes)?;
    assert_eq!(read, bytes.len());
    Ok(bytes)
}

#[test]
fn a_cached_block_is_not_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("a").join("cache");
    let (files, _) = snapshot(&encrypted(), false);
    let server = serve(files.clone());
    let options = cached(&server, &encrypted(), &directory);
    assert!(read_sda(&options).unwrap() == pattern(5 << 20));
    assert_eq!(server.requests().len(), 2 + 3);
    assert_eq!(cache::usage(&directory).unwrap().blocks, 3);
    assert!(read_sda(&options).unwrap() == pattern(5 << 20));
    assert_eq!(server.requests().len(), 2 + 3 + 2);

    // The blocks stay encrypted, and only its owner may read it.
    let mut blocks: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    blocks.sort_by_key(|path| std::fs::metadata(path).unwrap().len());
    let stored = std::fs::read(&blocks[2]).unwrap();
    assert!(files["devices/sda"].windows(64).step_by(64).any(|window| stored[32..96] == *window));
    assert_eq!(std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);

    // Damaged blocks are fetched once more: one that is too short, one with other contents, one that is a link.
    std::fs::write(&blocks[0], b"short").unwrap();
    let mut damaged = std::fs::read(&blocks[1]).unwrap();
    damaged[1000] ^= 1;
    std::fs::write(&blocks[1], &damaged).unwrap();
    std::fs::remove_file(&blocks[2]).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &blocks[2]).unwrap();
    assert!(read_sda(&options).unwrap() == pattern(5 << 20));
    assert_eq!(server.requests().len(), 2 + 3 + 2 + 2 + 3);
    assert!(read_sda(&options).unwrap() == pattern(5 << 20));
    assert_eq!(server.requests().len(), 2 + 3 + 2 + 2 + 3 + 2);

    // A verification reads the store itself.
    assert_eq!(cache::empty(&directory).unwrap().blocks, 3);
    assert_eq!(cache::usage(&directory).unwrap(), cache::CacheUsage::default());
    assert_eq!(cache::usage(&folder.path().join("absent")).unwrap().blocks, 0);
}

#[test]
fn a_cached_block_whose_tag_fails_is_fetched_once_more() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = snapshot(&encrypted(), false);
    let manifest = *blake3::hash(&files["vmsnap_manifest"]).as_bytes();
    let stored = files["devices/sda"].clone();
    let server = serve(files);
    let options = cached(&server, &encrypted(), folder.path());
    let cache = BlockCache::open(&cache_options(folder.path())).unwrap().unwrap();
    // The digest fits, and the contents are wrong: in the header, in a segment.
    for (number, damaged) in [(0, 40), (0, 100_000), (2, 10)] {
        let name = BlockName::new(&manifest, "devices/sda", number);
        let start = usize::try_from(number).unwrap() * BLOCK_BYTES;
        let mut block = stored[start..stored.len().min(start + BLOCK_BYTES)].to_vec();
        let right = block.clone();
        block[damaged] ^= 1;
        cache.store(&name, &block);
        assert!(read_sda(&options).unwrap() == pattern(5 << 20));
        assert!(cache.load(&name, right.len()).unwrap() == right, "the cache has the right block now");
    }
    // If the store has wrong bytes, the second try is the last.
    let mut wrong = server_files(&server);
    wrong.get_mut("devices/sda").unwrap()[100_000] ^= 1;
    let wrong = serve(wrong);
    cache::empty(folder.path()).unwrap();
    let error = read_sda(&cached(&wrong, &encrypted(), folder.path())).unwrap_err();
    assert!(error.is_authentication(), "{error}");
    assert!(names(&wrong).iter().filter(|name| *name == "devices/sda").count() <= 4);
}

/// The objects of a server, read through it.
fn server_files(server: &Server) -> Files {
    let bucket = server.bucket();
    let whole = super::Wanted::Whole { max_bytes: 1 << 30 };
    ["enc_metadata", "vmsnap_manifest", "mem", "mem_metadata", "devices/sda"]
        .into_iter()
        .map(|name| {
            let got = bucket.get(name, whole.clone(), None, &mut Interrupt::new(&mut || Ok(()))).unwrap();
            (name.to_owned(), got.bytes.to_vec())
        })
        .collect()
}

fn in_memory(name: &str, files: &Files) -> Remote {
    let url = url(&format!("memory://{name}/vm1"));
    let bucket = Bucket::new(url.clone(), RemoteOptions::default()).unwrap();
    for (name, bytes) in files {
        put(&bucket, name, bytes);
    }
    Remote::new(url, &RemoteOptions::default()).unwrap()
}

fn put(bucket: &Bucket, name: &str, bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    bucket.put(name, bytes, Attributes::new(), None, &mut Interrupt::new(&mut || Ok(()))).unwrap();
}

fn listed(url: &StoreUrl) -> Vec<String> {
    let bucket = Bucket::new(url.clone(), RemoteOptions::default()).unwrap();
    bucket.list(&mut Interrupt::new(&mut || Ok(()))).unwrap().into_iter().map(|each| each.name).collect()
}

#[test]
fn a_verification_finds_what_differs_in_the_store() {
    for base in [SnapshotOptions::new(), encrypted()] {
        let (mut files, _) = snapshot(&base, false);
        in_memory("verified", &files);
        let report = base.verify("memory://verified/vm1").unwrap();
        assert!(report.is_ok(), "{report:?}");

        files.get_mut("devices/sda").unwrap()[1_000_000] ^= 1;
        files.get_mut("mem").unwrap().pop();
        files.insert("more".to_owned(), vec![1]);
        files.insert(".vmsnap-push".to_owned(), vec![1]);
        let remote = in_memory("differs", &files);
        let report = base.verify("memory://differs/vm1").unwrap();
        let kinds: Vec<_> = report.problems.iter().map(|problem| (&*problem.path, problem.kind)).collect();
        let changed = if base.is_encrypted() { ProblemKind::NotAuthentic } else { ProblemKind::Changed };
        let expected = [
            (".vmsnap-push", ProblemKind::Extra),
            ("devices/sda", changed),
            ("mem", ProblemKind::Truncated),
            ("more", ProblemKind::Extra),
        ];
        assert_eq!(kinds, expected);
        remote.remove(&mut Interrupt::new(&mut || Ok(()))).unwrap();
        assert!(listed(remote.url()).is_empty());
    }
}

#[test]
fn only_a_snapshot_is_removed() {
    let mut go_on = || Ok(());
    let interrupt = &mut Interrupt::new(&mut go_on);
    let files = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), vec![1])).collect::<Files>();
    for (at, names, text) in [
        ("absent", &[][..], "has no vmsnap_manifest"),
        ("other", &["mem"], "has no vmsnap_manifest"),
        ("push", &[".vmsnap-push", "enc_metadata", "mem"], "vmsnap clean"),
        ("outer", &["vmsnap_manifest", "mem", "inner/vmsnap_manifest"], "another snapshot below it, at \"inner\""),
    ] {
        let remote = in_memory(at, &files(names));
        let error = remote.remove(interrupt).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(listed(remote.url()).len(), names.len());
    }
    // A removal that failed before its end is repeated.
    let remote = in_memory("broken", &files(&["enc_metadata", "mem"]));
    remote.remove(interrupt).unwrap();
    assert!(listed(remote.url()).is_empty());
}

#[test]
fn a_removal_begins_with_the_manifest_and_ends_with_the_key_metadata() {
    let listing = ["enc_metadata", "mem", "vmsnap_manifest"].map(|name| {
        format!(
            "<Contents><Key>vm1/{name}</Key><LastModified>2025-11-01T00:00:00.000Z</LastModified><ETag>\"1\"</ETag>\
             <Size>1</Size></Contents>"
        )
    });
    let listing = format!("<ListBucketResult>{}</ListBucketResult>", listing.concat());
    let server = Server::start(move |_, request| {
        if request.method == "GET" {
            return Reply::object(listing.as_bytes());
        }
        let body = String::from_utf8_lossy(&request.body);
        let keys = body.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        let deleted: Vec<_> = keys.map(|key| format!("<Deleted><Key>{key}</Key></Deleted>")).collect();
        Reply::object(format!("<DeleteResult>{}</DeleteResult>", deleted.concat()).as_bytes())
    });
    let remote = Remote::new(url("s3://bucket/vm1"), server.bucket().options()).unwrap();
    remote.remove(&mut Interrupt::new(&mut || Ok(()))).unwrap();
    let removed: Vec<_> = server.requests().into_iter().filter(|request| request.method != "GET").collect();
    let text: String = removed.iter().map(|each| each.target.clone() + &String::from_utf8_lossy(&each.body)).collect();
    let at = |name: &str| text.find(name).unwrap_or_else(|| panic!("{name} is not in {text}"));
    assert!(at("vmsnap_manifest") < at("vm1/mem") && at("vm1/mem") < at("enc_metadata"), "{text}");
}

#[test]
fn other_key_metadata_replaces_only_the_version_that_was_read() {
    let (files, _) = snapshot(&encrypted(), false);
    in_memory("rekeyed", &files);
    let at = Path::new("memory://rekeyed/vm1");
    let new = SnapshotOptions::new().key([8; 32].into());
    crate::rekey(at, &encrypted(), &new).unwrap();
    assert_eq!(new.open(at).unwrap().namespace("devices").unwrap().list_fragments().unwrap(), ["sda"]);
    assert!(encrypted().open(at).unwrap_err().is_authentication());

    let stores = [(); 2].map(|()| {
        let store = Store::at(Location::new(at).unwrap(), &RemoteOptions::default()).unwrap();
        store.head(&mut || Ok(())).unwrap();
        store
    });
    stores[0].replace_key_metadata(b"first", &mut || Ok(())).unwrap();
    assert!(stores[1].replace_key_metadata(b"second", &mut || Ok(())).unwrap_err().is_state());
    stores[0].replace_key_metadata(b"third", &mut || Ok(())).unwrap();
}
