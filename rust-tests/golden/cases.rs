//! The values of every golden fragment.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_bytes::ByteBuf;
use serde_json::json;
use vmsnap::{AnySnapshot, Result, SnapshotReader, SnapshotWriter};

use super::types::*;
use super::{Golden, hex};

/// A golden fragment: how it is written, and the text of the value that a typed read returns. A text tells -0.0 from
/// 0.0, and makes one NaN equal to another.
pub(super) struct Case {
    pub(super) path: &'static str,
    pub(super) write: Call<SnapshotWriter, ()>,
    pub(super) read: Call<SnapshotReader, String>,
    pub(super) written: String,
}

/// A call on a fragment by its name, in a namespace.
pub(super) type Call<Namespace, T> = Box<dyn Fn(&Namespace, &str) -> Result<T>>;

fn value<T: Serialize + DeserializeOwned + Debug + 'static>(path: &'static str, value: T) -> Case {
    Case {
        path,
        written: format!("{value:?}"),
        write: Box::new(move |writer, name| writer.write_fragment(name, &value)),
        read: Box::new(|reader, name| Ok(format!("{:?}", reader.read_fragment::<T>(name)?))),
    }
}

/// A value that is converted to an `AnySnapshot` before it is written.
fn erased<T: Serialize + DeserializeOwned + Debug + 'static>(path: &'static str, value: T) -> Case {
    Case {
        path,
        written: format!("{value:?}"),
        write: Box::new(move |writer, name| writer.write_fragment(name, &AnySnapshot::to_any(&value)?)),
        read: Box::new(|reader, name| Ok(format!("{:?}", AnySnapshot::from_any::<T>(reader.read_fragment(name)?)?))),
    }
}

fn raw(path: &'static str, bytes: Vec<u8>) -> Case {
    Case {
        path,
        written: hex(&bytes),
        write: Box::new(move |writer, name| {
            let mut fragment = writer.raw_fragment(name)?;
            fragment.write_all(&bytes)?;
            fragment.finish()
        }),
        read: Box::new(|reader, name| {
            let mut bytes = Vec::new();
            reader.raw_fragment(name)?.read_to_end(&mut bytes)?;
            Ok(hex(&bytes))
        }),
    }
}

fn device() -> Device {
    let queue = |index: u16| Queue {
        size: 256,
        ready: index != 1,
        desc: 0x1_0000_0000 + 0x1000 * u64::from(index),
        next: (index != 0).then_some(index),
    };
    let any = |name: &str, value| (name.to_owned(), value);
    Device {
        name: "virtio-blk".to_owned(),
        queues: (0..3).map(queue).collect(),
        inner: AnySnapshot::to_any(Inner { deep: AnySnapshot::to_any(Pair { left: 5, right: -5 }).unwrap() }).unwrap(),
        children: BTreeMap::from([
            any("by_number", AnySnapshot::to_any(by_number()).unwrap()),
            any("bytes", AnySnapshot::to_any(ByteBuf::from([1, 2, 255])).unwrap()),
            any("float", AnySnapshot::to_any(0.1_f32).unwrap()),
            any("kind", AnySnapshot::to_any(Kind::Struct { id: 3, label: "c".to_owned() }).unwrap()),
            any("negative", AnySnapshot::to_any(i64::MIN).unwrap()),
            any("numbers", AnySnapshot::to_any([u64::MAX, 0, 1]).unwrap()),
            any("unit", AnySnapshot::to_any(()).unwrap()),
        ]),
    }
}

/// Returns the text of a device, after the erased values in it got their types back.
fn shown(mut device: Device) -> Result<String> {
    fn next<T: DeserializeOwned + Debug>(device: &mut Device, name: &str) -> Result<String> {
        Ok(format!("{name}: {:?}", AnySnapshot::from_any::<T>(device.children.remove(name).unwrap())?))
    }
    let inner: Inner = AnySnapshot::from_any(device.inner.clone())?;
    let children = [
        next::<BTreeMap<u32, String>>(&mut device, "by_number")?,
        next::<ByteBuf>(&mut device, "bytes")?,
        next::<f32>(&mut device, "float")?,
        next::<Kind>(&mut device, "kind")?,
        next::<i64>(&mut device, "negative")?,
        next::<Vec<u64>>(&mut device, "numbers")?,
        next::<()>(&mut device, "unit")?,
    ];
    assert!(device.children.is_empty());
    Ok(format!("{} {:?} {:?} {children:?}", device.name, device.queues, AnySnapshot::from_any::<Pair>(inner.deep)?))
}

fn by_number() -> BTreeMap<u32, String> {
    [(0, "zero"), (7, "seven"), (1000, "thousand"), (u32::MAX, "max")].map(|(key, name)| (key, name.to_owned())).into()
}

fn by_name() -> BTreeMap<String, u64> {
    [("", 0), ("alpha", 1), ("beta", u64::MAX), ("ключ", 3)].map(|(name, number)| (name.to_owned(), number)).into()
}

fn numbers() -> Vec<Case> {
    vec![
        value(
            "numbers/ints",
            Ints {
                u8_zero: 0,
                u8_23: 23,
                u8_24: 24,
                u8_max: u8::MAX,
                u16_256: 256,
                u16_max: u16::MAX,
                u32_65536: 65536,
                u32_max: u32::MAX,
                u64_4294967296: 1 << 32,
                u64_max: u64::MAX,
                usize_page: 4096,
                i8_minus1: -1,
                i8_minus24: -24,
                i8_minus25: -25,
                i8_min: i8::MIN,
                i8_max: i8::MAX,
                i16_min: i16::MIN,
                i16_max: i16::MAX,
                i32_min: i32::MIN,
                i32_max: i32::MAX,
                i64_min: i64::MIN,
                i64_max: i64::MAX,
                i64_minus_2_pow_53_minus_1: -(1 << 53) - 1,
            },
        ),
        value(
            "numbers/wide_ints",
            WideInts {
                u128_small: 5,
                u128_u64_max: u64::MAX.into(),
                u128_u64_max_plus_1: 1 << 64,
                u128_max: u128::MAX,
                i128_minus_1: -1,
                i128_i64_min: i64::MIN.into(),
                i128_minus_2_pow_64: -(1 << 64),
                i128_minus_2_pow_64_minus_1: -(1 << 64) - 1,
                i128_min: i128::MIN,
                i128_max: i128::MAX,
            },
        ),
        value(
            "numbers/floats",
            Floats {
                f32_zero: 0.0,
                f32_neg_zero: -0.0,
                f32_one_and_half: 1.5,
                f32_tenth: 0.1,
                f32_max: f32::MAX,
                f32_min_positive_subnormal: f32::from_bits(1),
                f64_zero: 0.0,
                f64_neg_zero: -0.0,
                f64_one_and_half: 1.5,
                f64_tenth: 0.1,
                f64_1e300: 1e300,
                f64_65504: 65504.0, // the largest of 16 bits
                f64_65505: 65505.0,
                f64_third: 1.0 / 3.0,
                f64_integral_3: 3.0,
                f64_2_pow_24_plus_1: 16_777_217.0, // the first whole number that 32 bits do not hold
                f64_min_positive_subnormal: f64::from_bits(1),
            },
        ),
        value(
            "numbers/floats_special",
            FloatsSpecial {
                f32_nan: f32::NAN,
                f32_inf: f32::INFINITY,
                f32_neg_inf: f32::NEG_INFINITY,
                f64_nan: f64::NAN,
                f64_inf: f64::INFINITY,
                f64_neg_inf: f64::NEG_INFINITY,
            },
        ),
        value("numbers/vectors/vec_10000_u32", ten_thousand()),
        value("numbers/vectors/vec_empty", Vec::<u32>::new()),
        value("numbers/vectors/vec_small_ints", vec![-1, 0, 1, 23, 24, 255, 256, -257]),
    ]
}

fn ten_thousand() -> Vec<u32> {
    (0..10_000_u32).map(|index| index.wrapping_mul(2_654_435_761)).collect()
}

fn shapes() -> Vec<Case> {
    vec![
        value(
            "shapes/blobs",
            Blobs {
                plain_vec: vec![0, 1, 24, 255],
                bytes: vec![0xde, 0xad, 0xbe, 0xef],
                empty_bytes: vec![],
                bytes_300: std::iter::successors(Some(0), |byte: &u8| Some(byte.wrapping_add(7))).take(300).collect(),
                array: [1, 2, 3, 4],
            },
        ),
        value(
            "shapes/flattened",
            Flattened {
                head: 1,
                pair: Pair { left: 2, right: -3 },
                rest: [("x".to_owned(), 4), ("y".to_owned(), 5)].into(),
            },
        ),
        value("shapes/map_string_u64", by_name()),
        value("shapes/map_u32_string", by_number()),
        value(
            "shapes/maps",
            Maps {
                by_number: by_number(),
                by_negative: [(-5, true), (0, false), (5, true)].into(),
                by_name: by_name(),
                nested: [
                    ("one".to_owned(), [(1, vec![Pair { left: 1, right: -1 }]), (2, vec![])].into()),
                    ("two".to_owned(), BTreeMap::new()),
                ]
                .into(),
                empty: BTreeMap::new(),
            },
        ),
        value(
            "shapes/options",
            Options {
                none: None,
                some: Some(9),
                some_zero: Some(0),
                none_text: None,
                some_empty_text: Some(String::new()),
                some_pair: Some(Pair { left: 1, right: -1 }),
                list: vec![None, Some(1), None, Some(255)],
            },
        ),
        value(
            "shapes/ranges_tuples",
            RangesTuples {
                range: 4096..8192,
                tuple: (1, -2, "three".to_owned()),
                nested: vec![vec![], vec![1], vec![2, 3]],
                empty: vec![],
                unit: (),
                duration: Duration::new(3, 500_000_001),
            },
        ),
        // `skipped` is not written, and reads as the value of Default.
        value("shapes/skips", Skips { kept: 1, skipped: 0, absent: None, other_name: 2 }),
        value(
            "shapes/strings",
            Strings {
                empty: String::new(),
                ascii: "plain".to_owned(),
                unicode: "żółć ☃ 𝄞".to_owned(),
                escapes: "quote\" back\\ nl\n tab\t del\u{7f} ls\u{2028}".to_owned(),
                len_23: "a".repeat(23),
                len_24: "b".repeat(24),
                len_256: "x".repeat(256),
                ch: '界',
            },
        ),
    ]
}

fn enums() -> Vec<Case> {
    let text = str::to_owned;
    vec![
        value("shapes/enums/internally_tagged", vec![Tagged::Plain, Tagged::Fields { id: 1, name: text("n") }]),
        value("shapes/enums/newtype_text_variant", Kind::NewtypeText(text("t"))),
        value("shapes/enums/newtype_unit_variant", Kind::NewtypeUnit(())),
        value("shapes/enums/newtype_variant", Kind::Newtype(42)),
        value("shapes/enums/result_ok_err", vec![Ok::<u8, _>(1), Err(text("bad"))]),
        value("shapes/enums/struct_variant", Kind::Struct { id: 1 << 40, label: text("lbl") }),
        value("shapes/enums/tuple_variant", Kind::Tuple(1, text("two"), None)),
        value("shapes/enums/unit_variant", Kind::Unit),
        value(
            "shapes/enums/vec_of_variants",
            vec![Kind::Unit, Kind::Newtype(0), Kind::Tuple(0, String::new(), Some(false))],
        ),
    ]
}

/// Returns the two fragments of guest memory, made from its full contents, which are in a file beside the snapshot.
fn memory(snapshot: &Golden) -> Vec<Case> {
    let metadata: MemoryMetadata = serde_json::from_value(snapshot.fragment("mem_metadata").value.clone()).unwrap();
    let mut mem = Vec::new();
    for (region, ram) in metadata.regions.iter().zip(&snapshot.expected.ram) {
        let ram = std::fs::read(snapshot.directory.join(&ram.file_relative_to_this_json)).unwrap();
        assert_eq!(ram.len(), region.size);
        mem.extend(region.data_ranges.iter().flat_map(|range| &ram[range.clone()]));
    }
    assert_eq!(json!(mem.len()), snapshot.fragment("mem").value["uncompressed_bytes"]);
    assert_eq!(metadata.compressed, snapshot.expected.memory_compressed);
    if metadata.compressed {
        mem = snapshot.bytes("mem"); // a raw fragment like any other here
    }
    vec![raw("mem", mem), erased("mem_metadata", metadata)]
}

/// Returns all fragments of a snapshot, with the values that crosvm's writer was given.
pub(super) fn cases(snapshot: &Golden) -> Vec<Case> {
    let mut cases = memory(snapshot);
    if snapshot.directory.ends_with("mem-only-lz4-256k-blocks") {
        return cases;
    }
    cases.extend([
        value("bool_false", false),
        value("bool_true", true),
        Case {
            path: "devices/block0",
            write: Box::new(|writer, name| writer.write_fragment(name, &device())),
            read: Box::new(|reader, name| shown(reader.read_fragment(name)?)),
            written: shown(device()).unwrap(),
        },
        raw("devices/raw_blob", (0..=255).collect()),
        erased("devices/vcpu/vcpu0", Pair { left: 0, right: 0 }),
        erased("devices/vcpu/vcpu1", Pair { left: 1, right: -1 }),
        value("empty_struct", Empty {}),
        value("newtype_of_struct", NewtypeStruct(Pair { left: u16::MAX, right: i16::MIN })),
        value("newtype_struct", Newtype(70_000)),
        value("option_none", None::<u32>),
        value("option_some", Some(5_u32)),
        value("string_unicode", "Grüße 世界 🚀 \0\u{1f} e\u{301}".to_owned()),
        value("tuple_struct", TupleStruct(7, "seven".to_owned(), true)),
        value("unit_struct", Unit),
        value("unit_value", ()),
    ]);
    cases.extend(numbers());
    cases.extend(shapes());
    cases.extend(enums());
    cases
}
