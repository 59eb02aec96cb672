//! Values as bytes, by serde: CBOR, or JSON in the form that crosvm wrote before March 2025.
//!
//! ```text
//! mod.rs           the two formats, their detection, encoding and decoding
//! any_snapshot.rs  values that are nested in other values
//! floats.rs        JSON with floats in the form that crosvm printed
//! check.rs         the check of untrusted bytes before another decoder than serde reads them
//! cbor.rs          the check of CBOR
//! json.rs          the check of JSON
//! malformed.rs     the error for bytes that are not one value
//! hashes.rs        keys that make Python's dicts and sets slow
//! ```

mod any_snapshot;
#[cfg(any(feature = "python", test))]
mod cbor;
#[cfg(any(feature = "python", test))]
mod check;
mod floats;
#[cfg(any(feature = "python", test))]
mod hashes;
#[cfg(any(feature = "python", test))]
mod json;
#[cfg(any(feature = "python", test))]
mod malformed;

pub use any_snapshot::AnySnapshot;
#[cfg(feature = "python")]
pub(crate) use {check::check, hashes::crowded};

use std::io::{BufRead, ErrorKind};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::buffer::{Growing, OUT_OF_MEMORY};
use crate::error::{Error, Kind, Result};

/// The format in which `write_fragment` and `read_fragment` serialize values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// CBOR (RFC 8949), which crosvm has written since March 2025.
    #[default]
    Cbor,
    /// JSON, which crosvm wrote before March 2025.
    Json,
}

impl Format {
    /// The name of the format: `cbor` or `json`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cbor => "cbor",
            Self::Json => "json",
        }
    }

    #[cfg(feature = "python")]
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Cbor, Self::Json].into_iter().find(|format| format.as_str() == name)
    }

    /// Detects the format of a value that begins with `start`: the whole value, or more than one byte.
    ///
    /// No whole CBOR item looks like the JSON texts that are recognised here. Numbers in JSON are not recognised,
    /// because a digit is a CBOR item, too.
    fn of(start: &[u8]) -> Self {
        let json = match start {
            // In CBOR, a string whose length has eight bytes. JSON does not continue with a zero byte, and without a
            // zero byte the string would have petabytes.
            [b'{' | b'[', rest @ ..] => rest.first() != Some(&0),
            // In CBOR, the number -3, which is one byte long.
            [b'"', rest @ ..] => !rest.is_empty(),
            // In CBOR texts of 20, 6 and 14 bytes.
            _ => matches!(start, b"true" | b"false" | b"null"),
        };
        if json { Self::Json } else { Self::Cbor }
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

pub(crate) fn encode<T: Serialize + ?Sized>(value: &T, format: Format) -> std::result::Result<Vec<u8>, Cause> {
    let mut bytes = Growing::default();
    match format {
        Format::Cbor => ciborium::into_writer(value, &mut bytes).map_err(|error| match error {
            ciborium::ser::Error::Io(error) => Error::from(error).into(),
            error @ ciborium::ser::Error::Value(_) => Cause::from(error),
        })?,
        Format::Json => floats::to_writer(&mut bytes, value).map_err(|error| {
            if error.is_io() { Cause::from(Error::from(std::io::Error::from(error))) } else { error.into() }
        })?,
    }
    Ok(bytes.0)
}

/// Reads one value, which must be the whole contents of `place`. The format is detected if it is not given.
pub(crate) fn decode<T: DeserializeOwned>(mut reader: impl BufRead, format: Option<Format>, place: &str) -> Result<T> {
    let unfit = |reason: &str| {
        if reason.starts_with(OUT_OF_MEMORY) {
            // The text of a buffer that cannot grow.
            return Error::new(Kind::OutOfMemory, format!("{place}: {OUT_OF_MEMORY} for its value"));
        }
        Error::corrupt(format!("{place} does not contain a value of this type: {}", without_value(reason)))
    };
    let format = match format {
        Some(format) => format,
        None => Format::of(reader.fill_buf()?),
    };
    match format {
        Format::Cbor => {
            use ciborium::de::Error::{Io, RecursionLimitExceeded, Semantic, Syntax};

            let value = ciborium::from_reader(&mut reader).map_err(|error| match error {
                Io(error) if error.kind() != ErrorKind::UnexpectedEof => Error::from(error),
                Io(_) => unfit("it is truncated"),
                Syntax(offset) => unfit(&format!("invalid CBOR at byte {offset}")),
                Semantic(Some(offset), reason) => unfit(&format!("{reason} at byte {offset}")),
                Semantic(None, reason) => unfit(&reason),
                RecursionLimitExceeded => unfit("it is nested too deeply"),
            })?;
            if reader.fill_buf()?.is_empty() { Ok(value) } else { Err(unfit("bytes follow its end")) }
        }
        Format::Json => serde_json::from_reader(reader).map_err(|error| {
            if error.is_io() { Error::from(std::io::Error::from(error)) } else { unfit(&error.to_string()) }
        }),
    }
}

/// serde's message about a value of a wrong type, without the value: an error never shows contents of a snapshot.
fn without_value(reason: &str) -> String {
    // The form in `serde::de::Error`: "invalid type: string \"content\", expected u64".
    let found =
        ["invalid type: ", "invalid value: ", "unknown variant ", "unknown field "].into_iter().find_map(|start| {
            let (found, expected) = reason.strip_prefix(start)?.rsplit_once(", expected ")?;
            let kind = found.split(['"', '`']).next().unwrap_or_default();
            Some(format!("{}, expected {expected}", format_args!("{start}{kind}").to_string().trim_end()))
        });
    found.unwrap_or_else(|| reason.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Format, decode, encode};

    #[test]
    fn a_format_is_told_by_its_first_bytes() {
        for json in [&b"{}"[..], b"{\"a\":1}", b"[1]", b"\"\"", b"true", b"false", b"null", b"{", b"["] {
            assert_eq!(Format::of(json), Format::Json, "{json:?}");
        }
        // Among them -3, texts that begin as the JSON words do, and strings with a length of eight bytes.
        for cbor in
            [&b"\xa0"[..], b"\"", b"ttttttttttttttttttttt", b"falsey!", b"{\0\0\0\0\0\0\0\x01a", b"[\0", b"1", b""]
        {
            assert_eq!(Format::of(cbor), Format::Cbor, "{cbor:?}");
        }
    }

    #[test]
    fn every_value_is_told_but_a_number_in_json() {
        let values = [
            serde_json::json!(null),
            true.into(),
            false.into(),
            "".into(),
            "x".repeat(100_000).into(),
            vec![0; 1000].into(),
            serde_json::json!({"a": {}}),
        ];
        for value in values {
            for format in [Format::Cbor, Format::Json] {
                let bytes = encode(&value, format).unwrap();
                assert_eq!(Format::of(&bytes), format);
                assert_eq!(decode::<serde_json::Value>(&*bytes, None, "x").unwrap(), value);
            }
        }
        for number in -30_000..30_000 {
            assert_eq!(decode::<i64>(&*encode(&number, Format::Cbor).unwrap(), None, "x").unwrap(), number);
            assert_eq!(
                decode::<i64>(&*encode(&number, Format::Json).unwrap(), Some(Format::Json), "x").unwrap(),
                number
            );
        }
    }

    #[test]
    fn an_error_shows_the_type_of_the_value_and_not_the_value() {
        #[derive(Debug, serde::Serialize, serde::Deserialize)]
        enum Variants {
            One,
        }

        let text = |error: crate::Error| {
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2"), "{shown}");
            error.to_string()
        };
        for format in [Format::Cbor, Format::Json] {
            let bytes = encode("hunter2, expected", format).unwrap();
            let error = text(decode::<u8>(&*bytes, Some(format), "x").unwrap_err());
            assert!(
                error.starts_with("x does not contain a value of this type: invalid type: string, expected"),
                "{error}"
            );
            let error = text(decode::<Variants>(&*bytes, Some(format), "x").unwrap_err());
            assert!(
                error.starts_with("x does not contain a value of this type: unknown variant, expected `One`"),
                "{error}"
            );
            let error = text(decode::<bool>(&*encode(&77, format).unwrap(), Some(format), "x").unwrap_err());
            assert!(error.contains("expected") && error.contains("bool") && !error.contains("77"), "{error}");
        }
    }

    #[test]
    fn what_follows_a_value_is_an_error() {
        for (bytes, format) in [(&b"\x01\x01"[..], Format::Cbor), (b"1 1", Format::Json)] {
            let error = decode::<u8>(bytes, Some(format), "x").unwrap_err();
            assert!(
                error.is_corrupt() && error.to_string().contains("x does not contain a value of this type"),
                "{error}"
            );
        }
    }
}
