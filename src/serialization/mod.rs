//! Values as bytes, by serde: CBOR, or JSON as crosvm wrote it before March 2025.
//!
//! ```text
//! mod.rs     the two formats, telling them apart, and what serde makes of them
//! floats.rs  JSON with floats as crosvm printed them
//! check.rs   what bytes of a stranger's must be before another decoder than serde's sees them
//! cbor.rs, json.rs    the same for each format
//! malformed.rs  what is wrong with them
//! hashes.rs  keys that make Python's dicts and sets slow
//! ```

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

#[cfg(feature = "python")]
pub(crate) use {check::check, hashes::crowded};

use std::io::{BufRead, ErrorKind};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::buffer::{Growing, OUT_OF_MEMORY};
use crate::error::{Error, Kind, Result};

/// How `write_fragment` and `read_fragment` serialize values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// CBOR (RFC 8949), as crosvm has written since March 2025.
    #[default]
    Cbor,
    /// JSON, as crosvm wrote before.
    Json,
}

impl Format {
    /// The name: `cbor` or `json`.
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

    /// The format of a value that begins with `start`: of all of it, or more than one byte.
    ///
    /// No whole CBOR item looks like the JSON texts recognised here. That leaves out numbers: a digit is CBOR as well.
    fn of(start: &[u8]) -> Self {
        let json = match start {
            // In CBOR a string with a length of eight bytes: one that begins with zero cannot be a letter of JSON's, and one
            // that does not is of a petabyte.
            [b'{' | b'[', rest @ ..] => rest.first() != Some(&0),
            // In CBOR -3, which is one byte.
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

/// Reads one value, which must be all there is at `place`. Without a format it is found out.
pub(crate) fn decode<T: DeserializeOwned>(mut reader: impl BufRead, format: Option<Format>, place: &str) -> Result<T> {
    let unfit = |reason: &str| {
        if reason.starts_with(OUT_OF_MEMORY) {
            // What a list of ours says that cannot grow.
            return Error::new(Kind::OutOfMemory, format!("{place}: {OUT_OF_MEMORY} for what it holds"));
        }
        Error::corrupt(format!("{place} does not hold such a value: {}", without_value(reason)))
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
                Io(_) => unfit("it is cut off"),
                Syntax(offset) => unfit(&format!("no CBOR at byte {offset}")),
                Semantic(Some(offset), reason) => unfit(&format!("{reason} at byte {offset}")),
                Semantic(None, reason) => unfit(&reason),
                RecursionLimitExceeded => unfit("it is nested too deep"),
            })?;
            if reader.fill_buf()?.is_empty() { Ok(value) } else { Err(unfit("bytes follow its end")) }
        }
        Format::Json => serde_json::from_reader(reader).map_err(|error| {
            if error.is_io() { Error::from(std::io::Error::from(error)) } else { unfit(&error.to_string()) }
        }),
    }
}

/// What serde says of a value that is none of the type, without the value: no error tells what a snapshot holds.
fn without_value(reason: &str) -> String {
    // As in `serde::de::Error`: "invalid type: string \"content\", expected u64".
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
    fn an_error_tells_the_type_of_what_was_found_and_not_what_it_is() {
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
            assert!(error.starts_with("x does not hold such a value: invalid type: string, expected"), "{error}");
            let error = text(decode::<Variants>(&*bytes, Some(format), "x").unwrap_err());
            assert!(error.starts_with("x does not hold such a value: unknown variant, expected `One`"), "{error}");
            let error = text(decode::<bool>(&*encode(&77, format).unwrap(), Some(format), "x").unwrap_err());
            assert!(error.contains("expected") && error.contains("bool") && !error.contains("77"), "{error}");
        }
    }

    #[test]
    fn what_follows_a_value_is_an_error() {
        for (bytes, format) in [(&b"\x01\x01"[..], Format::Cbor), (b"1 1", Format::Json)] {
            let error = decode::<u8>(bytes, Some(format), "x").unwrap_err();
            assert!(error.is_corrupt() && error.to_string().contains("x does not hold such a value"), "{error}");
        }
    }
}
