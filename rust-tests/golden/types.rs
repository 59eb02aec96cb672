//! The Rust types of the golden values, with fields in the order of the bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmsnap::AnySnapshot;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Empty {}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Unit;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Newtype(pub(super) u32);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pair {
    pub(super) left: u16,
    pub(super) right: i16,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NewtypeStruct(pub(super) Pair);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TupleStruct(pub(super) u8, pub(super) String, pub(super) bool);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Queue {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) desc: u64,
    pub(super) next: Option<u16>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) queues: Vec<Queue>,
    pub(super) inner: AnySnapshot,
    pub(super) children: BTreeMap<String, AnySnapshot>,
}

/// The value from which `Device::inner` was made.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Inner {
    pub(super) deep: AnySnapshot,
}

/// Guest memory, as crosvm's `GuestMemory::snapshot` describes it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MemoryMetadata {
    pub(super) regions: Vec<RegionMetadata>,
    pub(super) compressed: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RegionMetadata {
    pub(super) guest_base: u64,
    pub(super) size: usize,
    pub(super) data_ranges: Vec<Range<usize>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ints {
    pub(super) u8_zero: u8,
    pub(super) u8_23: u8,
    pub(super) u8_24: u8,
    pub(super) u8_max: u8,
    pub(super) u16_256: u16,
    pub(super) u16_max: u16,
    pub(super) u32_65536: u32,
    pub(super) u32_max: u32,
    pub(super) u64_4294967296: u64,
    pub(super) u64_max: u64,
    pub(super) usize_page: usize,
    pub(super) i8_minus1: i8,
    pub(super) i8_minus24: i8,
    pub(super) i8_minus25: i8,
    pub(super) i8_min: i8,
    pub(super) i8_max: i8,
    pub(super) i16_min: i16,
    pub(super) i16_max: i16,
    pub(super) i32_min: i32,
    pub(super) i32_max: i32,
    pub(super) i64_min: i64,
    pub(super) i64_max: i64,
    pub(super) i64_minus_2_pow_53_minus_1: i64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WideInts {
    pub(super) u128_small: u128,
    pub(super) u128_u64_max: u128,
    pub(super) u128_u64_max_plus_1: u128,
    pub(super) u128_max: u128,
    pub(super) i128_minus_1: i128,
    pub(super) i128_i64_min: i128,
    pub(super) i128_minus_2_pow_64: i128,
    pub(super) i128_minus_2_pow_64_minus_1: i128,
    pub(super) i128_min: i128,
    pub(super) i128_max: i128,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Floats {
    pub(super) f32_zero: f32,
    pub(super) f32_neg_zero: f32,
    pub(super) f32_one_and_half: f32,
    pub(super) f32_tenth: f32,
    pub(super) f32_max: f32,
    pub(super) f32_min_positive_subnormal: f32,
    pub(super) f64_zero: f64,
    pub(super) f64_neg_zero: f64,
    pub(super) f64_one_and_half: f64,
    pub(super) f64_tenth: f64,
    pub(super) f64_1e300: f64,
    pub(super) f64_65504: f64,
    pub(super) f64_65505: f64,
    pub(super) f64_third: f64,
    pub(super) f64_integral_3: f64,
    pub(super) f64_2_pow_24_plus_1: f64,
    pub(super) f64_min_positive_subnormal: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FloatsSpecial {
    pub(super) f32_nan: f32,
    pub(super) f32_inf: f32,
    pub(super) f32_neg_inf: f32,
    pub(super) f64_nan: f64,
    pub(super) f64_inf: f64,
    pub(super) f64_neg_inf: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Blobs {
    pub(super) plain_vec: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pub(super) bytes: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pub(super) empty_bytes: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pub(super) bytes_300: Vec<u8>,
    pub(super) array: [u8; 4],
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Kind {
    Unit,
    Newtype(u32),
    NewtypeText(String),
    NewtypeUnit(()),
    Tuple(u8, String, Option<bool>),
    Struct { id: u64, label: String },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type")]
pub(super) enum Tagged {
    Plain,
    Fields { id: u32, name: String },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Flattened {
    pub(super) head: u8,
    #[serde(flatten)]
    pub(super) pair: Pair,
    #[serde(flatten)]
    pub(super) rest: BTreeMap<String, u8>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Maps {
    pub(super) by_number: BTreeMap<u32, String>,
    pub(super) by_negative: BTreeMap<i64, bool>,
    pub(super) by_name: BTreeMap<String, u64>,
    pub(super) nested: BTreeMap<String, BTreeMap<u32, Vec<Pair>>>,
    pub(super) empty: BTreeMap<String, u8>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Options {
    pub(super) none: Option<u32>,
    pub(super) some: Option<u32>,
    pub(super) some_zero: Option<u32>,
    pub(super) none_text: Option<String>,
    pub(super) some_empty_text: Option<String>,
    pub(super) some_pair: Option<Pair>,
    pub(super) list: Vec<Option<u8>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RangesTuples {
    pub(super) range: Range<usize>,
    pub(super) tuple: (u8, i32, String),
    pub(super) nested: Vec<Vec<u16>>,
    pub(super) empty: Vec<u32>,
    pub(super) unit: (),
    pub(super) duration: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Skips {
    pub(super) kept: u8,
    #[serde(skip)]
    #[expect(dead_code, reason = "it exists to be left out")]
    pub(super) skipped: u8,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) absent: Option<u8>,
    #[serde(rename = "other-name")]
    pub(super) other_name: u8,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Strings {
    pub(super) empty: String,
    pub(super) ascii: String,
    pub(super) unicode: String,
    pub(super) escapes: String,
    pub(super) len_23: String,
    pub(super) len_24: String,
    pub(super) len_256: String,
    pub(super) ch: char,
}
