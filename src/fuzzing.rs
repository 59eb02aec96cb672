//! All parsers of untrusted bytes, for fuzzers: `make fuzz`. The tests below run a short version.

#![allow(missing_docs, unsafe_code, reason = "only for tests and fuzzers, not part of the public API")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use zeroize::Zeroizing;

use crate::cipher::{HEADER_BYTES, SecretKey, check_declared_chunk_size, decrypt_message};
use crate::key::{self, KeyPayload};
use crate::manifest::Manifest;
use crate::memory::Metadata;
use crate::qemu;
use crate::store::archive::member::{self, Member};

/// The number of bytes that a parser may allocate for each byte of input.
const MAX_BYTES_PER_INPUT_BYTE: usize = 10;
/// The number of bytes that a parser may allocate for any input, for error texts and the buffers of libraries.
const MAX_FIXED_BYTES: usize = 64 << 10;

type Parser = fn(&[u8]);

/// The parsers, each with the name of its directory in `fuzz/seeds`.
pub const PARSERS: [(&str, Parser); 7] = [
    ("manifest", |bytes| drop(Manifest::decode(bytes, None))),
    ("payload", |bytes| drop(KeyPayload::decode(Zeroizing::new(bytes.to_vec())))),
    ("mem_metadata", |bytes| drop(Metadata::decode(bytes))),
    ("enc_metadata", |bytes| drop(key::wrapping(bytes))),
    ("floe", |bytes| {
        if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
            drop(check_declared_chunk_size(*header));
        }
        drop(decrypt_message(&SecretKey::from([7; 32]), b"fuzz", 64, bytes));
    }),
    ("archive", parse_member),
    ("migration", |bytes| drop(qemu::pass_all(bytes))),
];

/// Parses the headers at the beginning of `bytes` as those of the first member of an archive.
fn parse_member(bytes: &[u8]) {
    let start = member::GLOBAL_HEADER_BYTES as u64;
    let Some(Ok(Some(length))) = bytes.first_chunk().map(|first| member::headers_bytes_from(start, first)) else {
        return;
    };
    let Some(headers) = bytes.get(..length) else { return };
    if let Ok(member) = Member::parse(start, headers) {
        assert_eq!(member.headers(), headers);
        assert_eq!(member.data().start, start + length as u64);
    }
}

/// Runs every parser on `bytes`. [`Counting`] must be the global allocator.
///
/// # Panics
///
/// If a parser panics or allocates too much at once.
pub fn parse_all(bytes: &[u8]) {
    for (name, parse) in PARSERS {
        let most = peak_of(|| parse(bytes));
        let allowed = MAX_BYTES_PER_INPUT_BYTE * bytes.len() + MAX_FIXED_BYTES;
        assert!(most <= allowed, "{name}: {most} bytes were allocated at once for {} bytes", bytes.len());
    }
}

fn peak_of(work: impl FnOnce()) -> usize {
    HELD.set(0);
    PEAK.set(0);
    work();
    usize::try_from(PEAK.get()).unwrap_or(0)
}

/// The system's allocator, with a count of the bytes that this thread has allocated.
pub struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(more: usize, less: usize) {
    // Both calls fail only in a thread that is ending.
    let _ = HELD.try_with(|held| {
        held.set(held.get().wrapping_add_unsigned(more).wrapping_sub_unsigned(less));
        PEAK.try_with(|peak| peak.set(peak.get().max(held.get())))
    });
}

// SAFETY: every method calls the system's allocator with the caller's arguments, and counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size, layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.realloc(place, layout, new_size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strict_cbor;
    use ciborium::Value;

    #[global_allocator]
    static COUNTING: Counting = Counting;

    fn seeds() -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds");
        PARSERS
            .iter()
            .flat_map(|(name, _)| std::fs::read_dir(format!("{folder}/{name}")).unwrap())
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
            .collect()
    }

    /// A generator of the same numbers in every run (xorshift64, Marsaglia 2003). Not for secrets.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 >> 1).unwrap() % end.max(1)
        }

        /// Returns one of the seeds with changes that damage or an attacker could make.
        fn mutated(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
            /// CBOR heads that declare huge lengths, or begin or end an item of indefinite length.
            const HEADS: [&[u8]; 8] = [
                b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
                b"\xbb\x00\x00\x00\x01\x00\x00\x00\x00",
                b"\x7b\x7f\xff\xff\xff\xff\xff\xff\xff",
                b"\x5a\xff\xff\xff\xff",
                b"\x9f",
                b"\xff",
                b"\xd9\xd9\xf7",
                b"\x80",
            ];
            let mut bytes = seeds[self.below(seeds.len())].clone();
            for _ in 0..=self.below(4) {
                let at = self.below(bytes.len() + 1);
                let end = (at + 1 + self.below(16)).min(bytes.len());
                match self.below(7) {
                    0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                    1 if at < bytes.len() => bytes[at] = [0, 0x7f, 0x80, 0xff][self.below(4)],
                    2 => drop(bytes.drain(at..end)),
                    3 => bytes.truncate(at),
                    4 => drop(bytes.splice(at..end, HEADS[self.below(HEADS.len())].iter().copied())),
                    5 => {
                        let other = &seeds[self.below(seeds.len())];
                        bytes.truncate(at);
                        bytes.extend_from_slice(&other[self.below(other.len())..]);
                    }
                    _ => {
                        let part = bytes[at..end].repeat(self.below(200));
                        bytes.splice(at..at, part);
                    }
                }
            }
            bytes
        }
    }

    fn parse_mutated(times: usize) {
        let seeds = seeds();
        assert!(seeds.len() >= 10);
        for seed in &seeds {
            parse_all(seed);
        }
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for _ in 0..times {
            parse_all(&numbers.mutated(&seeds));
        }
    }

    #[test]
    fn no_parser_panics_or_allocates_much() {
        parse_mutated(20_000);
    }

    #[test]
    #[ignore = "the long form, for make torture"]
    fn no_parser_panics_or_allocates_much_for_long() {
        parse_mutated(5_000_000);
    }

    #[test]
    fn seeds_are_what_they_are_called() {
        let read = |path: &str| std::fs::read(format!("{}/fuzz/seeds/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        Manifest::decode(&read("manifest/plain"), None).unwrap();
        Manifest::decode(&read("manifest/encrypted"), None).unwrap_err();
        strict_cbor::check(&read("manifest/encrypted")).unwrap();
        KeyPayload::decode(Zeroizing::new(read("payload/staged"))).unwrap();
        for wrapped in ["raw", "age", "passphrase", "provider"] {
            let _ = key::wrapping(&read(&format!("enc_metadata/{wrapped}"))).unwrap();
        }
        decrypt_message(&SecretKey::from([7; 32]), b"fuzz", 64, &read("floe/message")).unwrap();
        for seed in ["early", "thinned", "zeros"] {
            qemu::pass_all(&read(&format!("migration/{seed}"))).unwrap();
        }
        for (seed, path) in [("key_metadata", "enc_metadata"), ("namespace", "disks/é"), ("large", "mem_data")] {
            let headers = read(&format!("archive/{seed}"));
            assert_eq!(Member::parse(member::GLOBAL_HEADER_BYTES as u64, &headers).unwrap().path, path);
        }
    }

    /// The lists that take the most memory for their size, in every field that can contain a list.
    #[test]
    fn little_is_kept_of_lists_without_end() {
        const COUNT: usize = 200_000;
        let texts: fn(usize) -> Vec<Value> =
            |length| (0..COUNT).map(|number| format!("{number:0length$}").into()).collect();
        let empty = || Value::Array(vec!["".into(); COUNT]);
        let pairs = |value: &Value| Value::Map((0..COUNT).map(|n| (format!("{n:x}").into(), value.clone())).collect());
        // The shortest texts of which there are `COUNT` different ones.
        let digit = |number: usize| {
            char::from(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_"[number & 63])
        };
        let short = |number: usize| (0..3).map(|place| digit(number >> (6 * place))).collect::<String>();
        let names = (0..COUNT).map(|number| short(number).into()).collect();
        for (key, value) in [
            ("requires", empty()),
            ("namespaces", empty()),
            ("namespaces", Value::Array(texts(6))),
            ("namespaces", Value::Array(names)),
            ("fragments", pairs(&Value::Map(vec![]))),
            ("fragments", pairs(&0.into())),
            ("hint", pairs(&0.into())),
            ("hint", empty()),
            ("created", "\u{1}".repeat(COUNT).into()),
            ("namespaces", Value::Array(vec!["\u{1}".repeat(COUNT).into()])),
            ("format", "\u{1}".repeat(COUNT).into()),
        ] {
            let seed = seeds().into_iter().find(|seed| Manifest::decode(seed, None).is_ok()).unwrap();
            let mut fields = ciborium::from_reader::<Value, _>(&seed[..]).unwrap().into_map().unwrap();
            fields.retain(|(field, _)| field.as_text() != Some(key));
            fields.push((key.into(), value));
            let mut bytes = Vec::new();
            ciborium::into_writer(&Value::Map(fields), &mut bytes).unwrap();
            let peak = peak_of(|| drop(Manifest::decode(&bytes, None)));
            assert!(peak <= MAX_BYTES_PER_INPUT_BYTE * bytes.len(), "{key}: {peak} bytes for {}", bytes.len());
        }
    }
}
