//! Snapshots of vmsnap can be read without vmsnap, as `docs/format.md` describes: encrypted fragments with `fast-floe`
//! alone, plain ones with `ciborium` alone.

use std::collections::BTreeMap;
use std::io::Write;

use ciborium::Value;
use fast_floe::{Key, Provider};
use serde::{Deserialize, Serialize};
use vmsnap::{SecretKey, SnapshotOptions};

use super::{pattern, place};

const WRAPPING_KEY: [u8; 32] = [7; 32];

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Vcpu {
    rip: u64,
    gdt: Vec<u8>,
    running: bool,
}

fn vcpu() -> Vcpu {
    Vcpu { rip: 0xfff0, gdt: vec![1, 2, 3], running: true }
}

/// Uses the pure-Rust provider, even if another one wrote the snapshot.
fn key(bytes: [u8; 32]) -> Key {
    Key::from_bytes_with_provider(bytes, Provider::RUSTCRYPTO)
}

fn fragment_aad(path: &str) -> Vec<u8> {
    [b"vmsnap/1/fragment\0", path.as_bytes()].concat()
}

fn map(bytes: &[u8]) -> BTreeMap<String, Value> {
    let value: Value = ciborium::from_reader(bytes).unwrap();
    value.into_map().unwrap().into_iter().map(|(key, value)| (key.into_text().unwrap(), value)).collect()
}

#[test]
fn encrypted_fragments_read_with_fast_floe_alone() {
    let (_directory, root) = place();
    let mut staged = SnapshotOptions::new().key(SecretKey::from(WRAPPING_KEY)).create(&root).unwrap();
    let disks = staged.writer().add_namespace("disks").unwrap();
    let data = pattern(3 * 4096 + 5);
    for (name, chunk) in [("small", 32), ("page", 4096), ("whole", 1 << 20)] {
        let mut fragment = disks.raw_fragment_with_chunk_size(name, chunk).unwrap();
        fragment.write_all(&data).unwrap();
        fragment.finish().unwrap();
    }
    disks.raw_fragment("empty").unwrap().finish().unwrap();
    staged.writer().write_fragment("vcpu0", &vcpu()).unwrap();
    staged.commit().unwrap();

    let wrapped = std::fs::read(root.join("enc_metadata")).unwrap();
    let payload = map(&fast_floe::decrypt(&key(WRAPPING_KEY), b"vmsnap/1/key", &wrapped).unwrap());
    assert_eq!(payload["format"], Value::from("vmsnap-key"));
    let data_key: [u8; 32] = payload["data_key"].as_bytes().unwrap().as_slice().try_into().unwrap();
    let open =
        |aad: &[u8], file: &str| fast_floe::decrypt(&key(data_key), aad, &std::fs::read(root.join(file)).unwrap());

    for name in ["small", "page", "whole"] {
        let path = format!("disks/{name}");
        assert_eq!(open(&fragment_aad(&path), &path).unwrap(), data);
        assert!(open(&fragment_aad(name), &path).is_err(), "the fragment must be bound to its path");
    }
    assert_eq!(open(&fragment_aad("disks/empty"), "disks/empty").unwrap(), b"");
    let value: Vcpu = ciborium::from_reader(open(&fragment_aad("vcpu0"), "vcpu0").unwrap().as_slice()).unwrap();
    assert_eq!(value, vcpu());

    let manifest = map(&open(b"vmsnap/1/manifest", "vmsnap_manifest").unwrap());
    assert_eq!(manifest["snapshot_id"], payload["snapshot_id"]);
    let listed = manifest["fragments"].as_map().unwrap().iter().map(|(path, _)| path.as_text().unwrap());
    assert_eq!(listed.collect::<Vec<_>>(), ["disks/empty", "disks/page", "disks/small", "disks/whole", "vcpu0"]);
}

#[test]
fn plain_fragments_read_with_ciborium_alone() {
    let (_directory, root) = place();
    let mut staged = SnapshotOptions::new().create(&root).unwrap();
    staged.writer().write_fragment("vcpu0", &vcpu()).unwrap();
    staged.commit().unwrap();

    let value: Vcpu = ciborium::from_reader(std::fs::File::open(root.join("vcpu0")).unwrap()).unwrap();
    assert_eq!(value, vcpu());
    let manifest = map(&std::fs::read(root.join("vmsnap_manifest")).unwrap());
    assert_eq!(manifest["encrypted"], Value::from(false));
    assert_eq!(manifest["fragments"].as_map().unwrap()[0].0, Value::from("vcpu0"));
}
