//! The manifest: the list of everything in a sealed snapshot. `docs/format.md` describes its bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use serde::de::Deserializer;
use serde::{Deserialize, Serialize};
use serde_bytes::Bytes;

use crate::buffer::{self, Growing};
use crate::cipher::{self, SecretKey, check_chunk_size};
use crate::error::{Error, Kind, Result};
use crate::name::{self, SnapshotPath, shown};
use crate::strict_cbor::{Schema, byte_string, text_set};

const SCHEMA: Schema =
    Schema { name: "manifest", format: "vmsnap-manifest", version: 1, malformed: "the manifest is malformed" };

/// A larger manifest is neither written nor read. This is enough for about two million fragments.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// A manifest in memory takes at most this many times its encoded size: two maps of paths and numbers during the check.
const MEMORY_PER_BYTE: usize = 4;

/// The chunk size of an encrypted manifest, which is a FLOE message.
const CHUNK_SIZE_BYTES: usize = 64 << 10;
const AAD: &[u8] = b"vmsnap/1/manifest";

/// Identifies a sealed snapshot. Keep it outside the snapshot to check later that the snapshot is unchanged, with
/// [`crate::SnapshotOptions::expect_seal_digest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealId {
    /// Random bytes, different for each snapshot.
    pub snapshot_id: [u8; 16],
    /// The BLAKE3 hash of the manifest's plaintext.
    pub seal_digest: [u8; 32],
}

/// The contents of a sealed snapshot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) snapshot_id: [u8; 16],
    /// RFC 3339, UTC.
    pub(crate) created: String,
    pub(crate) generator: String,
    pub(crate) encrypted: bool,
    pub(crate) namespaces: BTreeSet<Box<str>>,
    pub(crate) fragments: BTreeMap<String, Entry>,
}

/// A fragment in the manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Plaintext bytes.
    pub(crate) size: u64,
    /// Bytes of the file.
    pub(crate) stored_size: u64,
    pub(crate) proof: Proof,
}

/// A value that identifies the contents of a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// The BLAKE3 of a plain fragment's file.
    Blake3([u8; 32]),
    /// The header tag of an encrypted fragment. It covers the random IV and the path, from which the segment keys
    /// derive.
    HeaderTag { chunk_size_bytes: u64, tag: [u8; 32] },
}

impl Manifest {
    /// The manifest of a snapshot sealed now.
    pub(crate) fn new(
        snapshot_id: [u8; 16],
        encrypted: bool,
        namespaces: BTreeSet<Box<str>>,
        fragments: BTreeMap<String, Entry>,
    ) -> Self {
        Self {
            snapshot_id,
            created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            generator: concat!("vmsnap ", env!("CARGO_PKG_VERSION")).to_owned(),
            encrypted,
            namespaces,
            fragments,
        }
    }

    /// The contents of the file, and the seal digest.
    pub(crate) fn encode(&self, data_key: Option<&SecretKey>) -> Result<(Vec<u8>, [u8; 32])> {
        let fields = Fields {
            format: SCHEMA.format,
            version: SCHEMA.version,
            snapshot_id: self.snapshot_id,
            created: &self.created,
            generator: &self.generator,
            encrypted: self.encrypted,
            requires: [],
            namespaces: &self.namespaces,
            fragments: self.fragments.iter().map(|(path, entry)| (path.as_str(), FieldsOfEntry::of(entry))).collect(),
        };
        let mut bytes = Growing::default();
        ciborium::into_writer(&fields, &mut bytes).map_err(|error| match error {
            ciborium::ser::Error::Io(error) => Error::from(error),
            error @ ciborium::ser::Error::Value(_) => {
                Error::with_source(Kind::Serialization, "the manifest cannot be written", error)
            }
        })?;
        let Growing(bytes) = bytes;
        let digest = *blake3::hash(&bytes).as_bytes();
        let stored = match data_key {
            None => bytes,
            Some(key) => cipher::encrypt_message(key, AAD, CHUNK_SIZE_BYTES, &bytes)?,
        };
        if stored.len() as u64 > MAX_MANIFEST_BYTES {
            let text = format!("the manifest would be {} bytes long; the limit of the format is 2^28", stored.len());
            return Err(Error::invalid_argument(text + ": use fewer fragments, or shorter names"));
        }
        Ok((stored, digest))
    }

    /// Reads the contents of the file; returns the manifest and the seal digest.
    pub(crate) fn decode(stored: &[u8], data_key: Option<&SecretKey>) -> Result<(Self, [u8; 32])> {
        let opened;
        let bytes = match data_key {
            None => stored,
            Some(key) => {
                opened = cipher::decrypt_message(key, AAD, CHUNK_SIZE_BYTES, stored)?;
                &opened[..]
            }
        };
        // serde makes many small allocations, which would abort.
        buffer::probe(bytes.len().saturating_mul(MEMORY_PER_BYTE))?;
        let manifest = Self::check(SCHEMA.decode(bytes)?)?;
        if manifest.encrypted != data_key.is_some() {
            return Err(SCHEMA.malformed("it belongs to another snapshot: only one of the two is encrypted"));
        }
        Ok((manifest, *blake3::hash(bytes).as_bytes()))
    }

    fn check(body: Body) -> Result<Self> {
        let namespaces = body.namespaces;
        namespaces.iter().try_for_each(|path| check_path(path))?;
        let mut fragments = BTreeMap::new();
        for (path, entry) in body.fragments {
            check_path(&path)?;
            let entry = entry
                .checked(body.encrypted)
                .map_err(|reason| SCHEMA.malformed(format!("{}: {reason}", shown(&path))))?;
            fragments.insert(path, entry);
        }
        for path in namespaces.iter().map(|path| &**path).chain(fragments.keys().map(String::as_str)) {
            let parent = path.rsplit_once('/').map(|(parent, _)| parent);
            if let Some(parent) = parent.filter(|parent| !namespaces.contains(*parent)) {
                let text = format!("it lists {} but not the namespace {}", shown(path), shown(parent));
                return Err(SCHEMA.malformed(text));
            }
        }
        if let Some(path) = fragments.keys().find(|path| namespaces.contains(path.as_str())) {
            return Err(SCHEMA.malformed(format!("{} is both a fragment and a namespace", shown(path))));
        }
        if !is_moment(&body.created) {
            return Err(SCHEMA.malformed("'created' is not an RFC 3339 date in UTC with Z"));
        }
        Ok(Self {
            snapshot_id: body.snapshot_id,
            created: body.created,
            generator: body.generator,
            encrypted: body.encrypted,
            namespaces,
            fragments,
        })
    }

    /// Names of the fragments in a namespace, sorted.
    pub(crate) fn fragments_in(&self, namespace: &SnapshotPath) -> Vec<String> {
        names_in(namespace, |start| self.fragments.range(start..).map(|(path, _)| path.as_str()))
    }

    /// Names of the namespaces in a namespace, sorted.
    pub(crate) fn namespaces_in(&self, namespace: &SnapshotPath) -> Vec<String> {
        names_in(namespace, |start| self.namespaces.range(start.into_boxed_str()..).map(|path| &**path))
    }
}

/// Names directly in `namespace`; `from` returns sorted paths from a given one on.
fn names_in<'a, I: Iterator<Item = &'a str>>(namespace: &SnapshotPath, from: impl FnOnce(String) -> I) -> Vec<String> {
    let prefix = match namespace.as_str() {
        "" => String::new(),
        path => format!("{path}/"),
    };
    from(prefix.clone())
        .map_while(|path| path.strip_prefix(&prefix))
        .filter(|name| !name.contains('/'))
        .map(str::to_owned)
        .collect()
}

/// Whether a text is a date and time of RFC 3339 in UTC with Z. humantime is more lenient about the end.
fn is_moment(text: &str) -> bool {
    let Some(local) = text.strip_suffix('Z') else { return false };
    let (seconds, fraction) = local.split_once('.').unwrap_or((local, "0"));
    let digits = !fraction.is_empty() && fraction.bytes().all(|byte| byte.is_ascii_digit());
    digits && seconds.len() == "2026-11-26T12:00:00".len() && humantime::parse_rfc3339(&format!("{seconds}Z")).is_ok()
}

fn check_path(path: &str) -> Result<()> {
    if path.is_empty() {
        return Err(SCHEMA.malformed("it lists an empty path"));
    }
    path.split('/').try_for_each(name::check).map_err(|error| SCHEMA.malformed(error))
}

/// The fields to write, in the order of the format.
#[derive(Serialize)]
struct Fields<'a> {
    format: &'static str,
    version: u64,
    #[serde(with = "serde_bytes")]
    snapshot_id: [u8; 16],
    created: &'a str,
    generator: &'a str,
    encrypted: bool,
    requires: [&'static str; 0],
    namespaces: &'a BTreeSet<Box<str>>,
    fragments: BTreeMap<&'a str, FieldsOfEntry<'a>>,
}

#[derive(Serialize)]
struct FieldsOfEntry<'a> {
    size: u64,
    stored_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blake3: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floe_header_tag: Option<&'a Bytes>,
}

impl<'a> FieldsOfEntry<'a> {
    fn of(entry: &'a Entry) -> Self {
        let (chunk_size, blake3, floe_header_tag) = match &entry.proof {
            Proof::Blake3(digest) => (None, Some(Bytes::new(digest)), None),
            Proof::HeaderTag { chunk_size_bytes, tag } => (Some(*chunk_size_bytes), None, Some(Bytes::new(tag))),
        };
        Self { size: entry.size, stored_size: entry.stored_size, chunk_size, blake3, floe_header_tag }
    }
}

/// The keys of this format version.
#[derive(Deserialize)]
struct Body {
    #[serde(deserialize_with = "byte_string")]
    snapshot_id: [u8; 16],
    created: String,
    generator: String,
    encrypted: bool,
    #[serde(deserialize_with = "text_set")]
    namespaces: BTreeSet<Box<str>>,
    fragments: BTreeMap<String, BodyOfEntry>,
}

#[derive(Deserialize)]
struct BodyOfEntry {
    size: u64,
    stored_size: u64,
    #[serde(default, deserialize_with = "some")]
    chunk_size: Option<u64>,
    #[serde(default, deserialize_with = "some_byte_string")]
    blake3: Option<[u8; 32]>,
    #[serde(default, deserialize_with = "some_byte_string")]
    floe_header_tag: Option<[u8; 32]>,
}

/// Requires a value for an existing key; serde's own `Option` would treat null as absence.
fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> std::result::Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

fn some_byte_string<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<[u8; 32]>, D::Error> {
    byte_string(deserializer).map(Some)
}

impl BodyOfEntry {
    fn checked(self, encrypted: bool) -> std::result::Result<Entry, &'static str> {
        let Self { size, stored_size, chunk_size, blake3, floe_header_tag } = self;
        let proof = match (encrypted, chunk_size, blake3, floe_header_tag) {
            (false, None, Some(digest), None) => Proof::Blake3(digest),
            (true, Some(chunk_size_bytes), None, Some(tag)) => Proof::HeaderTag { chunk_size_bytes, tag },
            (false, ..) => {
                return Err("a plain fragment must have only 'blake3', not 'chunk_size' or 'floe_header_tag'");
            }
            (true, ..) => {
                return Err("an encrypted fragment must have 'chunk_size' and 'floe_header_tag', not 'blake3'");
            }
        };
        let fits = match proof {
            Proof::Blake3(_) => stored_size == size,
            Proof::HeaderTag { chunk_size_bytes, .. } => usize::try_from(chunk_size_bytes)
                .ok()
                .filter(|chunk| check_chunk_size(*chunk).is_ok())
                .is_some_and(|chunk| cipher::is_stored_size(stored_size, size, chunk)),
        };
        if fits { Ok(Entry { size, stored_size, proof }) } else { Err("the sizes contradict each other") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ciborium::Value;

    fn manifest(encrypted: bool) -> Manifest {
        let proof =
            if encrypted { Proof::HeaderTag { chunk_size_bytes: 4096, tag: [5; 32] } } else { Proof::Blake3([5; 32]) };
        let entry = Entry { size: 10, stored_size: if encrypted { 116 } else { 10 }, proof };
        let fragments = ["a", "ns/b", "ns-c"].map(|path| (path.to_owned(), entry.clone())).into();
        Manifest::new([7; 16], encrypted, ["ns".into(), "ns/deep".into()].into(), fragments)
    }

    fn value() -> Vec<(Value, Value)> {
        let (bytes, _) = manifest(false).encode(None).unwrap();
        ciborium::from_reader::<Value, _>(&bytes[..]).unwrap().into_map().unwrap()
    }

    fn decode(fields: Vec<(Value, Value)>) -> Result<Manifest> {
        let mut bytes = Vec::new();
        ciborium::into_writer(&Value::Map(fields), &mut bytes).unwrap();
        Manifest::decode(&bytes, None).map(|(manifest, _)| manifest)
    }

    fn with(name: &str, value_: Value) -> Result<Manifest> {
        let mut fields = value();
        fields.retain(|(key, _)| key.as_text() != Some(name));
        fields.push((name.into(), value_));
        decode(fields)
    }

    #[test]
    fn what_was_written_is_read_and_listed() {
        let key = SecretKey::from([1; 32]);
        for key in [None, Some(&key)] {
            let written = manifest(key.is_some());
            let (bytes, digest) = written.encode(key).unwrap();
            assert_eq!(Manifest::decode(&bytes, key).unwrap(), (written, digest));
        }
        let manifest = manifest(false);
        let root = SnapshotPath::default();
        assert_eq!(manifest.fragments_in(&root), ["a", "ns-c"]);
        assert_eq!(manifest.namespaces_in(&root), ["ns"]);
        assert_eq!(manifest.fragments_in(&root.join("ns").unwrap()), ["b"]);
        assert_eq!(manifest.namespaces_in(&root.join("ns").unwrap()), ["deep"]);
    }

    #[test]
    fn one_of_the_other_kind_is_refused() {
        let key = SecretKey::from([1; 32]);
        let (plain, _) = manifest(false).encode(Some(&key)).unwrap();
        assert!(Manifest::decode(&plain, Some(&key)).unwrap_err().is_corrupt());
        let (encrypted, _) = manifest(true).encode(Some(&key)).unwrap();
        assert!(Manifest::decode(&encrypted, None).unwrap_err().is_corrupt());
        assert!(Manifest::decode(&encrypted, Some(&[2; 32].into())).unwrap_err().is_authentication());
    }

    #[test]
    fn the_keys_are_in_the_order_of_the_format_and_unknown_ones_are_ignored() {
        let fields = value();
        let keys: Vec<_> = fields.iter().filter_map(|(key, _)| key.as_text()).collect();
        assert_eq!(
            keys,
            [
                "format",
                "version",
                "snapshot_id",
                "created",
                "generator",
                "encrypted",
                "requires",
                "namespaces",
                "fragments"
            ]
        );
        with("hint", 1.into()).unwrap();
    }

    #[test]
    fn what_a_later_version_needs_is_refused_by_name() {
        for (name, value, said) in
            [("version", 2.into(), "version 2"), ("requires", Value::Array(vec!["zstd".into()]), "zstd")]
        {
            let error = with(name, value).unwrap_err();
            assert!(error.is_unsupported_format() && error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn one_that_lies_is_corrupt() {
        let entry = |pairs: &[(&str, Value)]| {
            let all = pairs.iter().map(|(key, value)| ((*key).into(), value.clone())).collect();
            Value::Map(vec![("x".into(), Value::Map(all))])
        };
        let digest = Value::Bytes(vec![5; 32]);
        let texts = |texts: &[&str]| Value::Array(texts.iter().map(|text| (*text).into()).collect());
        for (name, value) in [
            ("format", "vmsnap-key".into()),
            ("snapshot_id", Value::Bytes(vec![7; 15])),
            ("created", "yesterday".into()),
            ("created", "2026-11-26T12:00:00+00:00".into()),
            ("created", "2026-11-26T12:00:00.Z".into()),
            ("created", "2026-11-26T12:00:00ZZ".into()),
            ("encrypted", true.into()),
            ("namespaces", texts(&["ns", "ns"])),
            ("namespaces", texts(&[])),
            ("namespaces", texts(&["ns", "../up"])),
            ("namespaces", texts(&["ns", ""])),
            ("namespaces", texts(&["ns", "a"])),
            ("namespaces", texts(&["ns", "other/below"])),
            ("fragments", entry(&[("size", 1.into()), ("stored_size", 2.into()), ("blake3", digest.clone())])),
            ("fragments", entry(&[("size", 1.into()), ("stored_size", 1.into())])),
            (
                "fragments",
                entry(&[("size", 1.into()), ("stored_size", 1.into()), ("blake3", Value::Bytes(vec![5; 31]))]),
            ),
            (
                "fragments",
                entry(&[
                    ("size", 1.into()),
                    ("stored_size", 1.into()),
                    ("blake3", digest.clone()),
                    ("floe_header_tag", digest),
                ]),
            ),
        ] {
            let error = with(name, value).unwrap_err();
            assert!(error.is_corrupt(), "{name}: {error}");
        }
    }
}
