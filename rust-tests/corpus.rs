//! The crate reads each snapshot in `tests/corpus` with the result in the index.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use vmsnap::{
    Error, GuestDestination, Identity, KeyProvider, Passphrase, ProblemKind, ProviderError, Result, SecretKey,
    SnapshotOptions, SnapshotReader,
};

/// The key service of `tests/make_golden.py`, which protects nothing.
struct Mask;

impl KeyProvider for Mask {
    fn name(&self) -> &'static str {
        "golden-mask"
    }

    fn wrap(&self, payload: &[u8]) -> std::result::Result<Vec<u8>, ProviderError> {
        Ok(payload.iter().map(|byte| byte ^ 0xa5).collect())
    }

    fn unwrap(&self, wrapped: &[u8]) -> std::result::Result<Vec<u8>, ProviderError> {
        self.wrap(wrapped)
    }
}

fn options(case: &Value) -> SnapshotOptions {
    let options = SnapshotOptions::new();
    match case {
        _ if case.get("key_provider").is_some() => options.key_provider(Arc::new(Mask)),
        _ if case.get("identity").is_some() => options.identities([Identity::text(text(&case["identity"]).to_owned())]),
        _ if case.get("passphrase").is_some() => {
            options.passphrase(Passphrase::from(text(&case["passphrase"]).to_owned()))
        }
        _ if case.get("key").is_some() => options.key(key(text(&case["key"]))),
        _ => options,
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn key(hex: &str) -> SecretKey {
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    }
    bytes.into()
}

fn kind(error: &Error) -> &'static str {
    match error {
        _ if error.is_authentication() => "authentication",
        _ if error.is_corrupt() => "corrupt",
        _ if error.is_unsupported_format() => "unsupported",
        _ if error.is_key_unavailable() => "key",
        _ if error.is_not_encrypted() => "not-encrypted",
        _ if error.raw_os_error() == Some(2) => "missing",
        _ => panic!("the index does not have this kind of error: {error}"),
    }
}

fn or_kind(result: Result<Value>) -> Value {
    result.unwrap_or_else(|error| json!({ "error": kind(&error) }))
}

fn holds(data: &[u8]) -> Value {
    let sha256 = Sha256::digest(data).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    json!({ "size": data.len(), "sha256": sha256 })
}

/// Adds all fragments in and below a namespace, by their paths.
fn fragments(reader: &SnapshotReader, into: &mut BTreeMap<String, Value>) -> Result<()> {
    let path = |name: &str| match reader.namespace_path() {
        "" => name.to_owned(),
        namespace => format!("{namespace}/{name}"),
    };
    for name in reader.list_fragments()? {
        into.insert(path(&name), or_kind(reader.raw_fragment(&name).and_then(|mut fragment| read(&mut fragment))));
    }
    for name in reader.list_namespaces()? {
        fragments(&reader.namespace(&name)?, into)?;
    }
    Ok(())
}

fn read(fragment: &mut vmsnap::FragmentReader) -> Result<Value> {
    let mut data = Vec::new();
    std::io::Read::read_to_end(fragment, &mut data)?;
    Ok(holds(&data))
}

fn memory(root: &SnapshotReader, namespace: &str, directory: &Path) -> Result<Value> {
    let mut reader = root.clone();
    for name in namespace.split('/').filter(|name| !name.is_empty()) {
        reader = reader.namespace(name)?;
    }
    let memory = reader.memory()?;
    let files: Vec<_> =
        memory.regions().iter().map(|region| directory.join(format!("{:016x}", region.start))).collect();
    let create = |file| File::options().read(true).write(true).create_new(true).open(file).unwrap();
    let created: Vec<_> = files.iter().map(create).collect();
    let mut destinations: Vec<_> = created.iter().map(|file| GuestDestination::file(file, None)).collect();
    memory.restore(&mut destinations)?;
    let regions = files.iter().map(|file| {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        (name, holds(&fs::read(file).unwrap()))
    });
    Ok(json!({ "regions": regions.collect::<Map<_, _>>() }))
}

/// Reads a case, and returns the result in the terms of the index.
fn result(root: &Path, case: &Value) -> Value {
    let reader = match options(case).open(root) {
        Ok(reader) => reader,
        Err(error) => return json!({ "result": { "error": kind(&error) } }),
    };
    let mut found = BTreeMap::new();
    if let Err(error) = fragments(&reader, &mut found) {
        return json!({ "result": { "error": kind(&error) } });
    }
    let mut result = json!({ "result": { "fragments": found } });
    if let Some(namespaces) = case.get("memory") {
        let memories = namespaces.as_object().unwrap().keys().map(|namespace| {
            let directory = tempfile::tempdir().unwrap();
            (namespace.clone(), or_kind(memory(&reader, namespace, directory.path())))
        });
        result["memory"] = Value::Object(memories.collect());
    }
    result
}

/// Whether everything was checked and nothing is wrong, except that the snapshot may not be sealed.
fn verifies(root: &Path, case: &Value) -> bool {
    options(case).verify(root).is_ok_and(|found| {
        found.not_checked.is_empty() && found.problems.iter().all(|problem| problem.kind == ProblemKind::NotSealed)
    })
}

/// The kind of file is checked before the read, because in one case it is a pipe.
fn is_wrapped_by_age(root: &Path) -> bool {
    let file = root.join("enc_metadata");
    fs::symlink_metadata(&file).is_ok_and(|found| found.is_file())
        && fs::read(&file).unwrap().starts_with(b"age-encryption.org/")
}

#[test]
fn every_case_of_the_corpus_gives_what_its_index_says() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let index: Value = serde_json::from_slice(&fs::read(corpus.join("index.json")).unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for name in ["snapshots.tar.gz", "archives.tar.gz"] {
        let file = corpus.join(name);
        let unpacked = Command::new("tar").arg("-xzf").arg(file).arg("-C").arg(directory.path()).status().unwrap();
        assert!(unpacked.success());
    }

    let cases = index["cases"].as_object().unwrap();
    assert!(cases.len() > 100);
    for (name, case) in cases {
        let root = directory.path().join("snapshots").join(name);
        if !cfg!(feature = "age") && is_wrapped_by_age(&root) {
            let error = options(case).open(&root).unwrap_err();
            assert!(error.is_unsupported_format() || error.is_key_unavailable(), "{name}: {error}");
            continue;
        }
        let mut expected = json!({ "result": case["result"] });
        if let Some(memory) = case.get("memory") {
            expected["memory"] = memory.clone();
        }
        assert_eq!(result(&root, case), expected, "{name}");
        assert_eq!(verifies(&root, case), case["verifies"], "{name}");
    }
}

/// Unpacking reads every byte, so it accepts the archives that verify, and no other. Packing gives the same bytes.
#[test]
fn every_sound_archive_of_the_corpus_is_unpacked_and_packed_again() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let index: Value = serde_json::from_slice(&fs::read(corpus.join("index.json")).unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = corpus.join("archives.tar.gz");
    assert!(Command::new("tar").arg("-xzf").arg(file).arg("-C").arg(directory.path()).status().unwrap().success());
    let mut sound = 0;
    let cases = index["cases"].as_object().unwrap().iter().filter(|(name, _)| name.starts_with("archive-"));
    for (name, case) in cases {
        let archive = directory.path().join("snapshots").join(name);
        let bytes = fs::read(&archive).unwrap();
        let [copy, streamed, again] = ["copy", "streamed", "again"].map(|name| directory.path().join(name));
        let options = options(case).durable(false);
        let results = [options.unpack(&archive, &copy), options.unpack_from(&mut &bytes[..], &streamed)];
        for result in &results {
            assert_eq!(result.is_ok(), case["verifies"], "{name}: {result:?}");
        }
        if case["verifies"] == true {
            sound += 1;
            options.pack(&streamed, &again).unwrap();
            assert!(fs::read(&again).unwrap() == bytes, "{name}");
            fs::remove_file(again).unwrap();
            fs::remove_dir_all(copy).unwrap();
            fs::remove_dir_all(streamed).unwrap();
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{name}");
    }
    assert!(sound > 10);
}
