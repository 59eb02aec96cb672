//! The check of untrusted bytes before another decoder than serde reads them.
//!
//! serde knows the type that it must build, and stops at anything else. A decoder that builds any value is open to
//! attacks: nesting that overflows the stack, declared lengths that exhaust the memory, tags that build unexpected
//! objects, keys that collide. So the bytes are checked first, without building values.

use super::malformed::Malformed;
use super::{Format, cbor, json};

/// Checks that `bytes` are one value; returns its format, which is detected if it is not given.
pub(crate) fn check(bytes: &[u8], format: Option<Format>) -> Result<Format, Malformed> {
    let format = format.unwrap_or_else(|| Format::of(bytes));
    match format {
        Format::Cbor => cbor::check(bytes)?,
        Format::Json => json::check(bytes)?,
    }
    Ok(format)
}

#[cfg(test)]
mod tests {
    use super::super::malformed::MAX_DEPTH;
    use super::{Format, check};

    /// The reason why `bytes` are refused, and the offset.
    fn refused(format: Format, bytes: &[u8]) -> (String, usize) {
        let malformed = check(bytes, Some(format)).unwrap_err();
        (malformed.reason, malformed.offset)
    }

    fn array(levels: usize, innermost: &[u8]) -> Vec<u8> {
        [&vec![0x81; levels], innermost].concat()
    }

    #[test]
    fn any_value_that_serde_writes_passes() {
        let value = serde_json::json!({"a": [1, -1, 1.5, null, true, "é\u{1f600}\n"], "b": {"c": {}}, "": u64::MAX});
        for format in [Format::Cbor, Format::Json] {
            let bytes = super::super::encode(&value, format).unwrap();
            assert_eq!(check(&bytes, None).unwrap(), format);
        }
    }

    #[test]
    fn well_formed_cbor_passes() {
        for good in [
            &b"\x18\x01"[..],     // not the shortest form
            b"\x5f\x41a\x40\xff", // a string in parts
            b"\x7f\x61a\xff",
            b"\x9f\x01\x9f\xff\xff",
            b"\xbf\x61a\xbf\xff\xff",
            b"\xf9\x7e\x00",                  // NaN as a value
            b"\xa2\x01\x00\x82\x01\x61a\x00", // a number and a list as keys
            b"\xc0\x74tttttttttttttttttttt",  // the decoder checks the meaning
            b"\xc1\xfb\x7f\xf0\x00\x00\x00\x00\x00\x00",
            b"\xc2\x5f\x41\x01\xff",
            b"\xd8\x25\x500123456789abcdef",
            b"\xd9\x01\x02\x82\x01\xd9\x01\x02\x80", // a set in a set
            b"\xd8\x28\x82\x82\x01\x02\xd8\x45\x44abcd",
            b"\xd8\x28\x82\x82\x1a\0\x10\0\0\x00\xd8\x40\x40",
            b"\xa3\xf9\x3c\x00\x00\xf9\xfc\x00\x00\xfa\x3f\x80\0\0\x00", // floats as keys
        ] {
            check(good, Some(Format::Cbor)).unwrap_or_else(|malformed| panic!("{good:x?}: {malformed:?}"));
        }
        check(&array(MAX_DEPTH, b"\x01"), None).unwrap();
    }

    #[test]
    fn any_other_cbor_is_refused_where_it_goes_wrong() {
        let cases: &[(&[u8], &str, usize)] = &[
            (b"", "truncated", 0),
            (b"\x19\x01", "truncated", 2),
            (b"\x82\x01", "declares 2 items, but only 1 bytes are left", 0),
            (b"\x81\x9b\xff\xff\xff\xff\xff\xff\xff\xff", "declares 18446744073709551615 items", 1),
            (b"\xbb\x80\x00\x00\x00\x00\x00\x00\x00", "declares 9223372036854775808 pairs", 0),
            (b"\x81\x42a", "declares 2 bytes, but only 1 are left", 1),
            (b"\x7b\xff\xff\xff\xff\xff\xff\xff\xff", "declares 18446744073709551615 bytes", 0),
            (b"\x01\x01", "bytes follow its end", 1),
            (b"\x1c", "the byte 0x1c does not begin an item", 0),
            (b"\x1f", "does not begin an item", 0),
            (b"\xdf", "does not begin an item", 0),
            (b"\x82\x01\xff", "a break is at the wrong place", 2),
            (b"\xbf\x01\xff", "a break is at the wrong place", 2),
            (b"\x5f\x61a\xff", "not a string of the same kind", 1),
            (b"\x7f\x7f\xff\xff", "not a string of the same kind", 1),
            (b"\x81\x62\xc3\x28", "not UTF-8", 1),
            (b"\x63\xed\xa0\x80", "not UTF-8", 0), // a lone surrogate
            (b"\x81\xf7", "not false, true or null", 1),
            (b"\xf8\x14", "not false, true or null", 0),
            (b"\xa1\xf9\x7e\x00\x01", "not a number", 1),
            (b"\xa1\x81\xfa\x7f\xc0\x00\x00\x01", "not a number", 2),
            (b"\xa1\xfb\xff\xf8\x00\x00\x00\x00\x00\x00\x01", "not a number", 1),
            (b"\xa1\xa0\x01", "a key is a map", 1),
            (b"\xd9\x01\x02\x81\xa0", "a key is a map", 4),
            (b"\xa1\xd8\x40\x41a\x01", "a key has tag 64", 1),
            (b"\x81\xd8\x1c\x80", "tag 28 is unknown", 1), // shareable
            (b"\xd8\x1d\x00", "tag 29 is unknown", 0),
            (b"\xd8\x23\x61a", "tag 35 is unknown", 0), // a regular expression
            (b"\xd8\x24\x61a", "tag 36 is unknown", 0),
            (b"\xdb\xff\xff\xff\xff\xff\xff\xff\xff\x00", "tag 18446744073709551615 is unknown", 0),
            (b"\xc0\x01", "tag 0 is not on a text", 0),
            (b"\xc1\x61a", "tag 1 is not on a number", 0),
            (b"\xc1\xf5", "tag 1 is not on a number", 0),
            (b"\xc1\xf6", "tag 1 is not on a number", 0),
            (b"\xc2\x01", "tag 2 is not on a byte string", 0),
            (b"\xd8\x25\x41a", "tag 37 is not on 16 bytes", 0),
            (b"\xd8\x46\x43abc", "tag 70 is not on elements of 4 bytes", 0),
            (b"\xd9\x01\x02\xa0", "tag 258 is not on an array", 0),
            (b"\xd8\x28\x81\x81\x01", "lacks its elements", 2),
            (b"\xd8\x28\x82\x81\x20\xd8\x40\x40", "a dimension is not an unsigned integer", 4),
            (b"\xd8\x28\x82\x82\x1a\0\x20\0\0\x00\xd8\x40\x40", "without elements has 2097152 rows", 3),
            (b"\xd8\x28\x82\x83\x1b\xff\0\0\0\0\0\0\0\x02\0\xd8\x40\x40", "without elements has", 3),
            (b"\xd8\x28\x82\x81\x01\x81\x01", "does not consist of dimensions and a typed array", 5),
            (b"\xc2\xc2\x41\x01", "tag 2 is not on a byte string", 0),
        ];
        for (bytes, reason, offset) in cases {
            let (found, at) = refused(Format::Cbor, bytes);
            assert!(found.contains(reason), "{bytes:x?}: {found}");
            assert_eq!(at, *offset, "{bytes:x?}: {found}");
        }
        assert_eq!(refused(Format::Cbor, &array(MAX_DEPTH + 1, b"\x01")).1, MAX_DEPTH);
        assert_eq!(refused(Format::Cbor, &array(MAX_DEPTH, b"\x80")).1, MAX_DEPTH);
        assert!(refused(Format::Cbor, &vec![0xc2; 100_000]).0.contains("byte string"));
        assert!(refused(Format::Cbor, &vec![0x9f; 100_000]).0.contains("deeper"));
    }

    #[test]
    fn keys_that_can_be_made_to_collide_are_few() {
        // Maps with lists as keys: the comparisons grow with the square of their number, and with their length.
        let map = |keys: u16, length: usize| {
            let mut bytes = vec![0xb9];
            bytes.extend(keys.to_be_bytes());
            for number in 0..keys {
                bytes.extend([&[0x81, 0x59][..], &u16::try_from(length).unwrap().to_be_bytes()].concat());
                bytes.extend(number.to_be_bytes().iter().chain(&vec![0; length - 2]));
                bytes.push(0);
            }
            bytes
        };
        check(&map(9000, 16), None).unwrap();
        assert!(refused(Format::Cbor, &map(11_000, 16)).0.contains("too many"));
        assert!(refused(Format::Cbor, &map(2000, 1000)).0.contains("too many"));
        // Several smaller maps add up.
        let many = [&[0x98, 100][..], &map(2000, 16).repeat(100)].concat();
        assert!(refused(Format::Cbor, &many).0.contains("too many"));
        // Few numbers can be made to collide: any number of keys passes, unless they were chosen to collide.
        let numbers = |step: u64, count: u32| {
            let mut bytes = vec![0xba];
            bytes.extend(count.to_be_bytes());
            (0..u64::from(count))
                .for_each(|number| bytes.extend([&[0x1b][..], &(number * step).to_be_bytes(), &[0]].concat()));
            bytes
        };
        check(&numbers(4096, 1 << 14), None).unwrap();
        assert!(refused(Format::Cbor, &numbers(0, 1001)).0.contains("hash values collide"));
        let floats = [&[0xba, 0, 0, 4, 0][..], &[0xf9, 0x3c, 0, 0].repeat(1024)].concat();
        assert!(refused(Format::Cbor, &floats).0.contains("hash values collide"));
        let set = [&[0xd9, 1, 2, 0x9a, 0, 0, 4, 0][..], &[0x21].repeat(1024)].concat();
        assert!(refused(Format::Cbor, &set).0.contains("hash values collide"));
    }

    #[test]
    fn any_other_json_is_refused_where_it_goes_wrong() {
        let cases: &[(&str, &str, usize)] = &[
            ("", "EOF", 0),
            ("[1,", "EOF", 3),
            ("{}x", "trailing", 2),
            (r#"{"a":1,"a":2}"#, "a key of a map comes twice", 9),
            (r#"{"a":1,"\u0061":2}"#, "a key of a map comes twice", 14),
            (r#"["\ud800"]"#, "hex escape", 8),
            (r#"{"\udc00":1}"#, "surrogate", 7),
            ("[NaN]", "expected value", 1),
            ("[\n\n1e999]", "number out of range", 7),
            ("[Infinity]", "expected value", 1),
            ("[1,\n tru]", "expected ident", 8),
            ("'a'", "expected value", 0),
            ("[01]", "invalid number", 2),
        ];
        for (text, reason, offset) in cases {
            let (found, at) = refused(Format::Json, text.as_bytes());
            assert!(found.contains(reason), "{text}: {found}");
            assert_eq!(at, *offset, "{text}: {found}");
        }
        assert!(refused(Format::Json, b"[\"\xff\"]").0.contains("unicode"));
        assert!(refused(Format::Json, b"\xef\xbb\xbf{}").0.contains("expected value"));
        check(["[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH)].concat().as_bytes(), None).unwrap();
        assert!(refused(Format::Json, "[".repeat(100_000).as_bytes()).0.contains("recursion limit"));
    }
}
