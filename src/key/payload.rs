//! The unwrapped contents of `enc_metadata`: a CBOR map. `docs/format.md` describes its keys.

use std::fmt;

use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::cipher::{SecretKey, fill_random};
use crate::error::{Error, Kind, Result};
use crate::strict_cbor::{Schema, byte_string};

const SCHEMA: Schema = Schema {
    name: "key metadata",
    format: "vmsnap-key",
    version: 1,
    malformed: "the key metadata is authentic but malformed",
};

/// Enough for a payload of about 130 bytes; a vector that grows would leave copies of the key behind.
const CAPACITY_BYTES: usize = 4096;

/// The secret of one snapshot.
#[derive(Debug)]
pub(crate) struct KeyPayload {
    /// The encoded payload, with any keys of a later version.
    bytes: SecretBytes,
    data_key: SecretKey,
    snapshot_id: [u8; 16],
    sealed: bool,
}

/// The fields to write, in the order of the format.
#[derive(Serialize)]
struct Fields<'a> {
    format: &'static str,
    version: u64,
    #[serde(with = "serde_bytes")]
    snapshot_id: [u8; 16],
    data_key: &'a SecretKey,
    sealed: bool,
    requires: [&'static str; 0],
}

/// Bytes that are wiped when they are dropped, and that `Debug` does not show.
pub(crate) struct SecretBytes(Zeroizing<Vec<u8>>);

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes(…)")
    }
}

impl KeyPayload {
    /// A new random data key. `sealed` says whether the snapshot must have a manifest; one written in place need not.
    pub(crate) fn generate(sealed: bool) -> Result<Self> {
        let mut snapshot_id = [0; 16];
        fill_random(&mut snapshot_id)?;
        Self::of(SecretKey::generate()?, snapshot_id, sealed)
    }

    fn of(data_key: SecretKey, snapshot_id: [u8; 16], sealed: bool) -> Result<Self> {
        let fields = Fields {
            format: SCHEMA.format,
            version: SCHEMA.version,
            snapshot_id,
            data_key: &data_key,
            sealed,
            requires: [],
        };
        let mut bytes = Zeroizing::new(Vec::with_capacity(CAPACITY_BYTES));
        ciborium::into_writer(&fields, &mut *bytes)
            .map_err(|error| Error::with_source(Kind::Serialization, "the key metadata cannot be written", error))?;
        Ok(Self { bytes: SecretBytes(bytes), data_key, snapshot_id, sealed })
    }

    pub(crate) fn data_key(&self) -> &SecretKey {
        &self.data_key
    }

    pub(crate) fn snapshot_id(&self) -> [u8; 16] {
        self.snapshot_id
    }

    /// Whether the snapshot must have a manifest.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// The bytes to wrap.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes.0
    }

    /// Reads an authenticated payload.
    pub(crate) fn decode(bytes: Zeroizing<Vec<u8>>) -> Result<Self> {
        let Body { snapshot_id, data_key, sealed } = SCHEMA.decode(&bytes)?;
        Ok(Self { bytes: SecretBytes(bytes), data_key, snapshot_id, sealed })
    }
}

/// The keys of this format version.
#[derive(Deserialize)]
struct Body {
    #[serde(deserialize_with = "byte_string")]
    snapshot_id: [u8; 16],
    #[serde(deserialize_with = "secret_byte_string")]
    data_key: SecretKey,
    sealed: bool,
}

fn secret_byte_string<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<SecretKey, D::Error> {
    struct SecretByteString;

    impl Visitor<'_> for SecretByteString {
        type Value = SecretKey;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a byte string of 32 bytes")
        }

        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> std::result::Result<SecretKey, E> {
            SecretKey::from_slice(bytes).map_err(|_| E::invalid_length(bytes.len(), &self))
        }
    }

    deserializer.deserialize_bytes(SecretByteString)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ciborium::Value;

    fn fields() -> Vec<(Value, Value)> {
        vec![
            ("format".into(), SCHEMA.format.into()),
            ("version".into(), 1.into()),
            ("snapshot_id".into(), Value::Bytes(vec![7; 16])),
            ("data_key".into(), Value::Bytes(vec![9; 32])),
            ("sealed".into(), false.into()),
            ("requires".into(), Value::Array(vec![])),
        ]
    }

    fn decode(fields: Vec<(Value, Value)>) -> Result<KeyPayload> {
        let mut bytes = Vec::new();
        ciborium::into_writer(&Value::Map(fields), &mut bytes).unwrap();
        KeyPayload::decode(Zeroizing::new(bytes))
    }

    fn with(name: &str, value: Value) -> Result<KeyPayload> {
        let mut fields = fields();
        fields.retain(|(key, _)| key.as_text() != Some(name));
        fields.push((name.into(), value));
        decode(fields)
    }

    #[test]
    fn the_payload_has_its_keys_in_the_order_of_the_format() {
        let mut expected = Vec::new();
        ciborium::into_writer(&Value::Map(fields()), &mut expected).unwrap();
        assert_eq!(KeyPayload::of([9; 32].into(), [7; 16], false).unwrap().bytes(), expected);
    }

    #[test]
    fn an_unknown_key_is_ignored_and_kept() {
        let payload = with("hint", Value::Array(vec![1.into()])).unwrap();
        assert!(payload.bytes().windows(4).any(|bytes| bytes == b"hint"));
    }

    #[test]
    fn what_a_later_version_needs_is_refused_by_name() {
        let requirement = Value::Array(vec!["zstd".into()]);
        for (name, value, said) in [("version", 2.into(), "version 2"), ("requires", requirement, "zstd")] {
            let error = with(name, value).unwrap_err();
            assert!(error.is_unsupported_format() && error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn a_malformed_payload_is_corrupt() {
        let mut twice = fields();
        twice.push(("hint".into(), 1.into()));
        twice.push(("hint".into(), 2.into()));
        assert!(decode(twice).unwrap_err().to_string().contains("comes twice"));
        for (name, value) in [
            ("format", "vmsnap-manifest".into()),
            ("data_key", Value::Bytes(vec![9; 31])),
            ("data_key", Value::Array(vec![9.into(); 32])),
            ("snapshot_id", "text".into()),
            ("sealed", 0.into()),
        ] {
            assert!(with(name, value).unwrap_err().is_corrupt(), "{name}");
        }
        assert!(decode(fields()[..5].to_vec()).unwrap_err().is_corrupt());
        assert!(KeyPayload::decode(Zeroizing::default()).unwrap_err().is_corrupt());
        let mut bytes = decode(fields()).unwrap().bytes;
        bytes.0.push(0);
        assert!(KeyPayload::decode(bytes.0).unwrap_err().to_string().contains("bytes follow"));
    }
}
