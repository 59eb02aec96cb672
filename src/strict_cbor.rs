//! The CBOR of vmsnap's own metadata. `docs/format.md` allows exactly one encoding of each value, so that readers in
//! all languages refuse the same input. Decoders, also serde's, are more lenient, each in its own way.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, SeqAccess, Visitor};
use zeroize::Zeroizing;

use crate::error::{Error, Kind, Result};
use crate::name::shown;

/// The outermost item is the first level.
const MAX_DEPTH: usize = 16;

/// The size of the buffer that ciborium copies texts and bytes through.
const SCRATCH_BYTES: usize = 4096;

/// A map of vmsnap's own metadata, identified by the keys that every version has.
pub(crate) struct Schema {
    /// The name in errors.
    pub(crate) name: &'static str,
    pub(crate) format: &'static str,
    pub(crate) version: u64,
    /// The beginning of an error about a malformed map.
    pub(crate) malformed: &'static str,
}

/// The keys that every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
    requires: FirstText,
}

impl Schema {
    /// Decodes a map of this schema. Keys that `T` does not have are ignored.
    ///
    /// # Errors
    ///
    /// [`Error::is_corrupt`] if the map is malformed, [`Error::is_unsupported_format`] if a later version wrote it.
    pub(crate) fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        check(bytes).map_err(|reason| self.malformed(reason))?;
        // Version and requirements first: a later version may encode the rest differently.
        let Head { format, version, requires } = self.parse(bytes)?;
        if format != self.format {
            return Err(self.malformed(format!("its format is {}, not {:?}", shown(&format), self.format)));
        }
        if version != self.version {
            return Err(unsupported(&format!("version {version} of the {}", self.name)));
        }
        if let FirstText(Some(requirement)) = requires {
            return Err(unsupported(&format!("the feature {}", shown(&requirement))));
        }
        self.parse(bytes)
    }

    fn parse<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        // A key may pass through this buffer, so it is wiped. ciborium's default is a buffer on the stack.
        let mut scratch = Zeroizing::new(vec![0; SCRATCH_BYTES]);
        ciborium::de::from_reader_with_buffer(bytes, &mut scratch).map_err(|error| self.malformed(error))
    }

    pub(crate) fn malformed(&self, reason: impl fmt::Display) -> Error {
        Error::corrupt(format!("{}: {reason}", self.malformed))
    }
}

fn unsupported(what: &str) -> Error {
    let text = format!("the snapshot needs {what}, which this version of vmsnap does not support; install a newer one");
    Error::new(Kind::Unsupported, text)
}

/// Checks that `bytes` are one item with definite lengths, shortest forms, no tags, and maps whose keys are distinct
/// texts.
pub(crate) fn check(bytes: &[u8]) -> Scan<()> {
    let mut scanner = Scanner { rest: bytes };
    scanner.item(1)?;
    if scanner.rest.is_empty() { Ok(()) } else { Err("bytes follow its end".to_owned()) }
}

/// The scanned value, or the reason why it is malformed.
type Scan<T> = std::result::Result<T, String>;

struct Scanner<'a> {
    rest: &'a [u8],
}

impl<'a> Scanner<'a> {
    fn take(&mut self, count: u64) -> Scan<&'a [u8]> {
        let split = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let (taken, rest) = split.ok_or("it is truncated")?;
        self.rest = rest;
        Ok(taken)
    }

    /// Major type and argument (RFC 8949, 3).
    fn head(&mut self) -> Scan<(u8, u64)> {
        let [first] = self.take(1)? else { return Err("it is truncated".to_owned()) };
        let (major, info) = (first >> 5, first & 0x1f);
        let argument = match info {
            0..24 => return Ok((major, u64::from(info))),
            24..28 => self.take(1 << (info - 24))?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)),
            _ => return Err("an item is not well-formed, or its length is indefinite".to_owned()),
        };
        // The argument of a float is its bits, which have no shortest form.
        let shortest = match info {
            24 => argument >= 24,
            25 => argument > 0xff,
            26 => argument > 0xffff,
            _ => argument > 0xffff_ffff,
        };
        if shortest || (major == 7 && info > 24) {
            Ok((major, argument))
        } else {
            Err("a number or length is not written in its shortest form".to_owned())
        }
    }

    fn item(&mut self, depth: usize) -> Scan<()> {
        if depth > MAX_DEPTH {
            return Err(format!("it is nested deeper than {MAX_DEPTH} levels"));
        }
        let start = self.rest;
        let (major, argument) = self.head()?;
        match major {
            0 | 1 => Ok(()),
            2 => self.take(argument).map(drop),
            3 => self.text(argument).map(drop),
            4 => (0..argument).try_for_each(|_| self.item(depth + 1)),
            5 => {
                let mut keys = BTreeSet::new();
                (0..argument).try_for_each(|_| {
                    let (major, length) = self.head()?;
                    if major != 3 {
                        return Err("a key is not text".to_owned());
                    }
                    let key = self.text(length)?;
                    if !keys.insert(key) {
                        return Err(format!("the key {} comes twice", shown(key)));
                    }
                    self.item(depth + 1)
                })
            }
            6 => Err("it has a tag".to_owned()),
            // false, true, null; half, single and double floats.
            _ if matches!(start[0], 0xf4..=0xf6 | 0xf9..=0xfb) => Ok(()),
            _ => Err("it has a simple value other than false, true and null".to_owned()),
        }
    }

    fn text(&mut self, length: u64) -> Scan<&'a str> {
        std::str::from_utf8(self.take(length)?).map_err(|_| "a text is not UTF-8".to_owned())
    }
}

/// The first text of an array. The others are dropped, because there may be as many as the file has bytes.
struct FirstText(Option<String>);

impl<'de> Deserialize<'de> for FirstText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut first = None;
        each_text(deserializer, |text| {
            first.get_or_insert(text);
            Ok(())
        })?;
        Ok(Self(first))
    }
}

/// The texts of an array, which must be distinct.
pub(crate) fn text_set<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<BTreeSet<Box<str>>, D::Error> {
    let mut texts = BTreeSet::<Box<str>>::new();
    each_text(deserializer, |text| match texts.replace(text.into_boxed_str()) {
        Some(text) => Err(format!("{} comes twice", shown(&text))),
        None => Ok(()),
    })?;
    Ok(texts)
}

/// Calls `take` for each text of an array; ciborium itself would accept an empty byte string as an empty array.
fn each_text<'de, D: Deserializer<'de>>(
    deserializer: D,
    take: impl FnMut(String) -> Scan<()>,
) -> std::result::Result<(), D::Error> {
    struct Texts<F>(F);

    impl<'de, F: FnMut(String) -> Scan<()>> Visitor<'de> for Texts<F> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of texts")
        }

        fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> std::result::Result<(), A::Error> {
            while let Some(text) = items.next_element()? {
                (self.0)(text).map_err(serde::de::Error::custom)?;
            }
            Ok(())
        }
    }

    deserializer.deserialize_any(Texts(take))
}

/// A byte string of exactly `N` bytes; serde's own arrays would accept a list of numbers, too.
pub(crate) fn byte_string<'de, D: Deserializer<'de>, const N: usize>(
    deserializer: D,
) -> std::result::Result<[u8; N], D::Error> {
    struct ByteString<const N: usize>;

    impl<const N: usize> Visitor<'_> for ByteString<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a byte string of {N} bytes")
        }

        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> std::result::Result<[u8; N], E> {
            bytes.try_into().map_err(|_| E::invalid_length(bytes.len(), &self))
        }
    }

    deserializer.deserialize_bytes(ByteString)
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn the_one_encoding_of_each_value_is_accepted() {
        for good in [
            &b"\x00"[..],
            b"\x18\x18",
            b"\x19\x01\x00",
            b"\x38\x18",
            b"\x42ab",
            b"\x63abc",
            b"\x80",
            b"\x82\x01\xf6",
            b"\xa0",
            b"\xa2\x61a\x01\x61b\xa1\x61a\xf4",
            b"\xf5",
            b"\xf9\x00\x00",
            b"\xfb\x00\x00\x00\x00\x00\x00\x00\x00",
        ] {
            check(good).unwrap();
        }
        check(&[[0x81; 15].as_slice(), &[0x80]].concat()).unwrap();
    }

    #[test]
    fn any_other_encoding_is_refused() {
        for bad in [
            &b""[..],
            b"\x18",
            b"\x18\x17",
            b"\x19\x00\xff",
            b"\x1a\x00\x00\xff\xff",
            b"\x1b\x00\x00\x00\x00\xff\xff\xff\xff",
            b"\x1c",
            b"\x1f",
            b"\x42a",
            b"\x5f\x41a\xff",
            b"\x61\xff",
            b"\x81",
            b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x9f\xff",
            b"\xa1\x01\x01",
            b"\xa2\x61a\x01\x61a\x02",
            b"\xbf\xff",
            b"\xc0\x00",
            b"\xd9\xd9\xf7\x00",
            b"\xf7",
            b"\xf8\x14",
            b"\xf8\xff",
            b"\xff",
            b"\x00\x00",
        ] {
            check(bad).unwrap_err();
        }
        assert!(check(&[[0x81; 16].as_slice(), &[0x80]].concat()).unwrap_err().contains("deeper"));
    }
}
