//! Snapshots that crosvm's own code wrote: vmsnap writes the same values as the same bytes, and reads the files
//! correctly.
//!
//! `expected.json` beside each snapshot lists the contents of every fragment, and describes the Rust type in words. The
//! files come from crosvm, so they are in a directory beside the checkout.
//!
//! ```text
//! mod.rs    the snapshots and the tests
//! types.rs  the Rust types
//! cases.rs  the values
//! ```

mod cases;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use ciborium::Value;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use vmsnap::{Format, Result, SnapshotOptions, SnapshotReader};

use cases::{Case, cases};
use types::WideInts;

use crate::place;

const SNAPSHOTS: [(&str, Format); 5] = [
    ("crosvm-cbor/plain", Format::Cbor),
    ("crosvm-cbor/lz4", Format::Cbor),
    ("crosvm-cbor/mem-only-lz4-256k-blocks", Format::Cbor),
    ("crosvm-json/plain", Format::Json),
    ("crosvm-json/lz4", Format::Json),
];

struct Golden {
    directory: PathBuf,
    options: SnapshotOptions,
    expected: Expected,
}

/// The parts of `expected.json` that the tests use.
#[derive(Deserialize)]
struct Expected {
    fragments: Vec<ExpectedFragment>,
    files: BTreeMap<String, ExpectedFile>,
    ram: Vec<ExpectedRam>,
    memory_compressed: bool,
}

#[derive(Deserialize)]
struct ExpectedFragment {
    path: String,
    value: serde_json::Value,
    /// The value that a decoder without the Rust type returns, if it differs.
    decoded: Option<serde_json::Value>,
    crosvm_reads_back: Option<String>,
}

#[derive(Deserialize)]
struct ExpectedFile {
    size: usize,
    sha256: String,
}

#[derive(Deserialize)]
struct ExpectedRam {
    file_relative_to_this_json: PathBuf,
}

impl Golden {
    fn root(&self) -> PathBuf {
        self.directory.join("snapshot")
    }

    fn open(&self) -> SnapshotReader {
        self.options.open(self.root()).unwrap()
    }

    fn bytes(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.root().join(path)).unwrap()
    }

    fn fragment(&self, path: &str) -> &ExpectedFragment {
        self.expected.fragments.iter().find(|fragment| fragment.path == path).unwrap()
    }

    fn place(&self, path: &str) -> String {
        format!("{path} of {}", self.directory.display())
    }

    /// Whether crosvm's reader of that time returned the written value. Otherwise it failed.
    fn crosvm_reads_back(&self, path: &str) -> bool {
        self.fragment(path).crosvm_reads_back.as_deref().is_none_or(|said| said == "equal")
    }
}

/// Returns the directory of all snapshots, or `None` if it is not available.
pub(crate) fn directory() -> Option<PathBuf> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    if !directory.is_dir() {
        assert!(
            std::env::var("VMSNAP_REQUIRE_ALL").as_deref() != Ok("1"),
            "no golden snapshots at {}",
            directory.display()
        );
        eprintln!("skipped: no golden snapshots at {}", directory.display());
        return None;
    }
    Some(directory)
}

fn snapshots() -> Option<Vec<Golden>> {
    let directory = directory()?;
    let snapshot = |(name, format)| {
        let directory = directory.join(name);
        let expected = serde_json::from_slice(&std::fs::read(directory.join("expected.json")).unwrap()).unwrap();
        let options = SnapshotOptions::new().format(format);
        Golden { directory, options, expected }
    };
    Some(SNAPSHOTS.into_iter().map(snapshot).collect())
}

/// Returns the namespace of a path, and the name in it.
fn split(path: &str) -> (Vec<&str>, &str) {
    let mut names: Vec<_> = path.split('/').collect();
    let name = names.pop().unwrap();
    (names, name)
}

fn read<T>(snapshot: &Golden, path: &str, read: impl FnOnce(&SnapshotReader, &str) -> Result<T>) -> Result<T> {
    let (namespaces, name) = split(path);
    let reader = namespaces.iter().fold(snapshot.open(), |reader, name| reader.namespace(name).unwrap());
    read(&reader, name)
}

fn read_raw(snapshot: &Golden, path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    read(snapshot, path, SnapshotReader::raw_fragment).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn paths_below(reader: &SnapshotReader) -> BTreeSet<String> {
    let join = |name: &String| [reader.namespace_path(), name].join("/").trim_start_matches('/').to_owned();
    let mut found: BTreeSet<_> = reader.list_fragments().unwrap().iter().map(join).collect();
    for name in reader.list_namespaces().unwrap() {
        found.extend(paths_below(&reader.namespace(&name).unwrap()));
    }
    found
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

fn write_all(cases: &[Case], options: &SnapshotOptions, root: &Path) {
    let mut namespaces = BTreeMap::from([(String::new(), options.create_in_place(root).unwrap())]);
    for case in cases {
        let (names, name) = split(case.path);
        for depth in 0..names.len() {
            let (parent, path) = (names[..depth].join("/"), names[..=depth].join("/"));
            if !namespaces.contains_key(&path) {
                let namespace = namespaces[&parent].add_namespace(names[depth]).unwrap();
                namespaces.insert(path, namespace);
            }
        }
        (case.write)(&namespaces[&names.join("/")], name).unwrap();
    }
}

#[test]
fn every_golden_fragment_has_a_case() {
    for snapshot in snapshots().into_iter().flatten() {
        let tested: BTreeSet<_> = cases(&snapshot).iter().map(|case| case.path.to_owned()).collect();
        let expected: BTreeSet<_> = snapshot.expected.fragments.iter().map(|fragment| fragment.path.clone()).collect();
        assert_eq!(tested, expected, "{}", snapshot.directory.display());
        assert_eq!(paths_below(&snapshot.open()), expected, "{}", snapshot.directory.display());
    }
}

#[test]
fn the_same_values_give_the_bytes_that_crosvm_wrote() {
    for snapshot in snapshots().into_iter().flatten() {
        let (_directory, root) = place();
        let cases = cases(&snapshot);
        write_all(&cases, &snapshot.options, &root);
        for case in cases {
            let ours = std::fs::read(root.join(case.path)).unwrap();
            let theirs = snapshot.bytes(case.path);
            let text = String::from_utf8_lossy;
            assert!(ours == theirs, "{}:\n{}\n{}", snapshot.place(case.path), text(&ours), text(&theirs));
        }
    }
}

#[test]
fn what_crosvm_wrote_reads_as_the_same_values() {
    for snapshot in snapshots().into_iter().flatten() {
        for case in cases(&snapshot) {
            let place = snapshot.place(case.path);
            let seen = read(&snapshot, case.path, &case.read);
            if snapshot.crosvm_reads_back(case.path) {
                assert!(*seen.as_ref().unwrap() == case.written, "{place}: {}", seen.unwrap());
            } else {
                let error = seen.unwrap_err();
                assert!(error.is_corrupt(), "{place}: {error}");
            }
        }
    }
}

#[test]
fn every_file_reads_as_the_bytes_that_expected_json_tells() {
    for snapshot in snapshots().into_iter().flatten() {
        for (path, file) in &snapshot.expected.files {
            let bytes = read_raw(&snapshot, path);
            assert_eq!((bytes.len(), &hex(&Sha256::digest(&bytes))), (file.size, &file.sha256), "{path}");
        }
        assert!(snapshot.expected.files.keys().eq(&paths_below(&snapshot.open())), "{}", snapshot.directory.display());
    }
}

/// Converts a decoded value to the terms of `expected.json`.
fn in_json_terms(value: &Value) -> serde_json::Value {
    match value {
        Value::Null => json!(null),
        Value::Bool(truth) => json!(truth),
        Value::Integer(number) => json!(i128::from(*number)),
        Value::Float(number) if !number.is_finite() || (*number == 0.0 && number.is_sign_negative()) => {
            json!(format!("{number:?}"))
        }
        Value::Float(number) => json!(number),
        Value::Text(text) => json!(text),
        Value::Bytes(bytes) => json!({"hex": hex(bytes)}),
        Value::Array(values) => values.iter().map(in_json_terms).collect(),
        Value::Map(entries) if entries.iter().all(|(key, _)| key.is_text()) => {
            entries.iter().map(|(key, value)| (key.as_text().unwrap().to_owned(), in_json_terms(value))).collect()
        }
        Value::Map(entries) => {
            entries.iter().map(|(key, value)| json!([in_json_terms(key), in_json_terms(value)])).collect()
        }
        other => panic!("no golden fragment contains {other:?}"),
    }
}

#[test]
fn every_value_is_what_expected_json_tells() {
    for snapshot in snapshots().into_iter().flatten() {
        for fragment in &snapshot.expected.fragments {
            let path = &*fragment.path;
            let seen = match path {
                "mem" => continue, // its size was compared where it was made
                "devices/raw_blob" => json!({"hex": hex(&read_raw(&snapshot, path))}),
                "numbers/vectors/vec_10000_u32" => {
                    let numbers: Vec<u32> = read(&snapshot, path, SnapshotReader::read_fragment).unwrap();
                    json!({
                        "rule": "(i * 2654435761) mod 2^32",
                        "count": numbers.len(),
                        "first": numbers[..3],
                        "last": numbers[9999],
                        "sum": numbers.iter().map(|number| u64::from(*number)).sum::<u64>(),
                    })
                }
                "numbers/wide_ints" => {
                    let wide: WideInts = read(&snapshot, path, SnapshotReader::read_fragment).unwrap();
                    json!({
                        "u128_small": wide.u128_small.to_string(),
                        "u128_u64_max": wide.u128_u64_max.to_string(),
                        "u128_u64_max_plus_1": wide.u128_u64_max_plus_1.to_string(),
                        "u128_max": wide.u128_max.to_string(),
                        "i128_minus_1": wide.i128_minus_1.to_string(),
                        "i128_i64_min": wide.i128_i64_min.to_string(),
                        "i128_minus_2_pow_64": wide.i128_minus_2_pow_64.to_string(),
                        "i128_minus_2_pow_64_minus_1": wide.i128_minus_2_pow_64_minus_1.to_string(),
                        "i128_min": wide.i128_min.to_string(),
                        "i128_max": wide.i128_max.to_string(),
                    })
                }
                _ => in_json_terms(&read::<Value>(&snapshot, path, SnapshotReader::read_fragment).unwrap()),
            };
            assert_eq!(&seen, fragment.decoded.as_ref().unwrap_or(&fragment.value), "{}", snapshot.place(path));
        }
    }
}
